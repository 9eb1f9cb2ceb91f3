// Depth-wise convolution with "same" zero padding, and its input gradient: the same kernels with
// the taps flipped. The weight gradient is conv_wgrad.cuh.
//
// Strips, 1 x K and K x 1, are passes of one convolution of strip_conv_chain.cuh; the rest of
// contiguous tensors is conv_square.cuh's. Here are
//   conv_last    channels_last tensors: lanes are channels, so that nothing needs staging: the taps
//                of a channel stay in shared memory, the inputs come through L1.
#pragma once

#include "conv_tile.cuh"

namespace sdan_fast::cuda {

// What a launch needs to know. Sizes in elements; see the .cu file for how tiles are chosen.
struct ConvParams {
  DType dtype;
  int64_t planes;  // N * C of contiguous tensors; N for channels_last
  int32_t channels, height, width;
  int32_t kh, kw, dh, dw;    // taps and dilations
  int32_t flip;              // 1: correlate with the taps reversed (input gradient)
  int32_t tile_h, tile_w;    // outputs of a tile
  int32_t tiles_y, tiles_x;  // tiles of a plane
  int32_t rows, pitch;       // staged rows, and floats from one to the next
  int32_t wide;              // 1: rows of the tensors are 16-byte aligned
  int32_t abreast;           // weight gradient: columns that a block goes down at a time
  int32_t vertical;          // channels_last: the inner axis is H, not W
};

constexpr int kColumnOutputs = 8;  // rows per thread of the weight gradient of columns
constexpr int kLastOutputs = 8;    // pixels per thread of wgrad_last

constexpr int kFewThreads = 256;  // of a block, at most

// ---- staging

// Reads rows [y, y + rows) and columns [x, x + columns) of a plane into `tile`, with zeros outside
// the image. x and `columns` are multiples of kGroup.
__device__ __forceinline__ void stage(const void* tensor, int64_t base, float* tile,
                                      const ConvParams& p, int y, int x, int rows, int columns) {
  const auto inside = [&](int r, int c) {
    return y + r >= 0 && y + r < p.height && x + c >= 0 && x + c < p.width;
  };
  const auto index = [&](int r, int c) {
    return base + static_cast<int64_t>(y + r) * p.width + (x + c);
  };
  if (!p.wide) {
    for (Walk at(columns); at.row < rows; at.advance())
      tile[at.row * p.pitch + at.column] =
          inside(at.row, at.column) ? load_any(p.dtype, tensor, index(at.row, at.column)) : 0.0f;
  } else if (p.dtype == DType::kFloat32) {
    SDAN_UNROLL_BY(4)
    for (Walk at(columns / 4); at.row < rows; at.advance()) {
      const int r = at.row, c = at.column * 4;
      float v[4] = {0, 0, 0, 0};
      if (inside(r, c)) load<4>(static_cast<const float*>(tensor) + index(r, c), v);
      put_shared<4>(tile + r * p.pitch + c, v);
    }
  } else {
    SDAN_UNROLL_BY(4)
    for (Walk at(columns / 8); at.row < rows; at.advance()) {
      const int r = at.row, c = at.column * 8;
      float v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      if (inside(r, c)) load8_any(p.dtype, tensor, index(r, c), v);
      put_shared<8>(tile + r * p.pitch + c, v);
    }
  }
}

struct Tile {
  int64_t plane;
  int y, x;  // first output
};

__device__ __forceinline__ Tile tile_at(const ConvParams& p, int64_t index) {
  Tile t;
  const int per_plane = p.tiles_y * p.tiles_x;
  t.plane = index / per_plane;
  const int in_plane = static_cast<int>(index % per_plane);
  t.y = in_plane / p.tiles_x * p.tile_h;
  t.x = in_plane % p.tiles_x * p.tile_w;
  return t;
}

// ---- channels_last

// The inner axis of wgrad_last: along W, or along H.
struct Axis {
  int length, taps, dilation;
  int64_t stride;
};
struct Axes {
  Axis inner, outer;
};

__device__ __forceinline__ Axes axes_of(const ConvParams& p) {
  const Axis w{p.width, p.kw, p.dw, p.channels},
      h{p.height, p.kh, p.dh, static_cast<int64_t>(p.width) * p.channels};
  return p.vertical ? Axes{h, w} : Axes{w, h};
}

}  // namespace sdan_fast::cuda
