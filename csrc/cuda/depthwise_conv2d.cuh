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
  int32_t splits;            // weight gradient: blocks that share a plane
  int32_t vertical;          // channels_last: the inner axis is H, not W
};

constexpr int kColumnOutputs = 8;  // rows per thread of the weight gradient of columns
constexpr int kLastOutputs = 8;    // pixels per thread of conv_last

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

// The strip axis of conv_last and wgrad_last: along W, or along H.
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

// blockDim.x channel lanes of V channels each, blockDim.y pixel groups. A pixel group is P outputs
// along the inner axis (W, or H if p.vertical), a dilation apart. K inner taps are unrolled, the
// outer taps are a loop; K = 1 stands for any inner taps. grid: (pixel groups / blockDim.y,
// channels / (V blockDim.x), images), x and z with a stride. Dynamic shared memory: kh * kw * V *
// blockDim.x floats.
template <typename T, int K, int V>
__global__ void __launch_bounds__(kFewThreads, 1)
    conv_last_kernel(const T* __restrict__ x, const T* __restrict__ weight,
                     const T* __restrict__ bias, T* __restrict__ y, const ConvParams p) {
  constexpr int P = kLastOutputs;
  SDAN_DYNAMIC_SHARED(raw);
  auto* taps = reinterpret_cast<float*>(raw);  // [tap][channel]
  const int lanes = static_cast<int>(blockDim.x) * V, n = p.kh * p.kw,
            c0 = static_cast<int>(blockIdx.y) * lanes;
  for (int i = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); i < n * lanes;
       i += static_cast<int>(blockDim.x * blockDim.y)) {
    const int c = c0 + i / n, k = i % n;
    const int to = p.vertical ? k % p.kw * p.kh + k / p.kw : k;  // [outer][inner]
    taps[to * lanes + i / n] =
        c < p.channels ? load_one(weight + static_cast<int64_t>(c) * n + (p.flip ? n - 1 - k : k))
                       : 0.0f;
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) * V, c = c0 + lane;
  if (c >= p.channels) return;
  const Axes axes = axes_of(p);
  const Axis in = axes.inner, out = axes.outer;
  const int groups_in = (in.length + P * in.dilation - 1) / (P * in.dilation) * in.dilation;
  const int groups = out.length * groups_in;
  const int halo = (in.taps - 1) / 2 * in.dilation, halo_out = (out.taps - 1) / 2 * out.dilation;
  const int64_t tap_step = in.dilation * in.stride;
  const int64_t first_g = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  for (int64_t next = first_g, image = blockIdx.z; image < p.planes;) {
    if (next >= groups) {
      next = first_g;
      image += gridDim.z;
      continue;
    }
    const int g = static_cast<int>(next);
    next += static_cast<int64_t>(gridDim.x) * blockDim.y;
    // Neighbouring groups are neighbours along W, where the tensor is dense.
    const int gi = p.vertical ? g / out.length : g % groups_in,
              o = p.vertical ? g % out.length : g / groups_in;
    const int i0 = gi / in.dilation * (P * in.dilation) + gi % in.dilation;
    if (i0 >= in.length) continue;
    const int64_t plane = image * p.height * p.width * p.channels + c;
    float acc[P][V];
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) {
      const float b = bias ? load_one(bias + c + e) : 0.0f;
      SDAN_UNROLL
      for (int j = 0; j < P; ++j) acc[j][e] = b;
    }
    for (int ko = 0; ko < out.taps; ++ko) {
      const int at = o - halo_out + ko * out.dilation;
      if (at < 0 || at >= out.length) continue;
      for (int l = 0; l < in.taps; l += K) {
        float w[K][V];
        SDAN_UNROLL
        for (int k = 0; k < K; ++k) {
          SDAN_UNROLL
          for (int e = 0; e < V; ++e) w[k][e] = taps[(ko * in.taps + l + k) * lanes + lane + e];
        }
        int i = i0 - halo + l * in.dilation;
        const T* from = x + plane + at * out.stride + i * in.stride;
        SDAN_UNROLL
        for (int q = 0; q < P + K - 1; ++q) {
          float v[V];
          if (i >= 0 && i < in.length) {
            load<V>(from, v);
          } else {
            SDAN_UNROLL
            for (int e = 0; e < V; ++e) v[e] = 0;
          }
          SDAN_UNROLL
          for (int j = 0; j < P; ++j) {
            if (q - j < 0 || q - j >= K) continue;
            SDAN_UNROLL
            for (int e = 0; e < V; ++e) acc[j][e] = fmaf(w[q - j][e], v[e], acc[j][e]);
          }
          i += in.dilation;
          from += tap_step;
        }
      }
    }
    T* to = y + plane + o * out.stride + i0 * in.stride;
    SDAN_UNROLL
    for (int j = 0; j < P; ++j) {
      if (i0 + j * in.dilation >= in.length) break;
      store<V>(to + j * tap_step, acc[j]);
    }
  }
}

}  // namespace sdan_fast::cuda
