// Depth-wise convolution with "same" zero padding, its input gradient (the same kernels with the
// taps flipped) and its weight gradient.
//
// Strips, 1 x K and K x 1, are passes of one convolution of strip_conv_chain.cuh; the rest of
// contiguous tensors is conv_square.cuh's. Here are
//   conv_last    channels_last tensors: lanes are channels, so that nothing needs staging: the taps
//                of a channel stay in shared memory, the inputs come through L1.
// The weight gradient is a sum over all pixels: wgrad_tile and wgrad_last leave one partial sum per
// block, wgrad_finish adds them in a fixed order.
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
constexpr int kGradTaps = 8;       // taps per thread of the weight gradient
constexpr int kGradOutputs = 7;    // columns per thread of a 1 x K strip's; odd, for the banks
constexpr int kGradRows = 8;       // rows of its tile

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

// ---- weight gradient

// Partial sums of one unit of taps (up to kGradTaps along the inner axis, at one outer tap) over
// this thread's outputs.
struct Unit {
  int outer, first;  // outer tap, first inner tap
};
__device__ __forceinline__ Unit unit_at(int unit, int inner_taps) {
  const int per_outer = (inner_taps + kGradTaps - 1) / kGradTaps;
  return Unit{unit / per_outer, unit % per_outer * kGradTaps};
}

// Contiguous tensors. A warp belongs to one unit of taps: unit = blockIdx.y * (warps / warps per
// unit) + ...; blocks (x) are (plane, split) pairs, and block x writes partial[x][tap] for its
// units' taps and, from unit 0, partial[x][taps] = sum of the gradient. Inner axis: W (then a tile
// has kGradRows rows, pitch is 4 modulo 32) or, if Vertical, H. Dynamic shared memory: the tile
// (rows x pitch), the gradient (tile_h x pitch), 32 * (kGradTaps + 1) floats.
template <bool Vertical>
__global__ void __launch_bounds__(kFewThreads, 1)
    wgrad_tile_kernel(const void* __restrict__ grad, const void* __restrict__ x,
                      float* __restrict__ partial, const ConvParams p, int warps_per_unit) {
  constexpr int P = Vertical ? kColumnOutputs : kGradOutputs, K = kGradTaps;
  SDAN_DYNAMIC_SHARED(raw);
  auto* tile = reinterpret_cast<float*>(raw);
  float* g = tile + p.rows * p.pitch;
  float* sums = g + p.tile_h * p.pitch;  // [warp][K + 1]
  const int taps = p.kh * p.kw, inner = Vertical ? p.kh : p.kw, outer = Vertical ? p.kw : p.kh;
  const int units = outer * ((inner + K - 1) / K);
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32 + warp % warps_per_unit * 32,
            lanes = warps_per_unit * 32;
  const int unit = static_cast<int>(blockIdx.y) * (warps / warps_per_unit) + warp / warps_per_unit;
  const Unit u = unit_at(unit, inner);
  const int halo_y = (p.kh - 1) / 2 * p.dh, halo_x = (p.kw - 1) / 2 * p.dw;
  const int d = Vertical ? p.dh : p.dw, step = Vertical ? d * p.pitch : d;
  const int valid = inner - u.first < K ? inner - u.first : K;
  const int tiles = p.tiles_y * p.tiles_x;
  const int64_t plane = blockIdx.x / p.splits;
  const int split = static_cast<int>(blockIdx.x % p.splits);
  const int64_t base = plane * p.height * p.width;
  float acc[K];
  CarefulSum total;
  SDAN_UNROLL
  for (int k = 0; k < K; ++k) acc[k] = 0;
  for (int index = split; index < tiles; index += p.splits) {
    const Tile t = tile_at(p, index);
    const int first_x = round_down(t.x - halo_x, kGroup), shift_x = t.x - halo_x - first_x;
    const int first_g = round_down(t.x, kGroup), shift_g = t.x - first_g;
    __syncthreads();
    stage(x, base, tile, p, t.y - halo_y, first_x, p.rows,
          round_up(p.tile_w + 2 * halo_x + shift_x, kGroup));
    stage(grad, base, g, p, t.y, first_g, p.tile_h, round_up(p.tile_w + shift_g, kGroup));
    __syncthreads();
    if (unit >= units) continue;
    const int across = p.tile_w / (Vertical ? 1 : P), down = p.tile_h / (Vertical ? P : 1),
              items = across * down;
    for (int i = lane; i < items; i += lanes) {
      int row, column;
      if (Vertical) {
        column = i % across;
        row = i / across / d * (P * d) + i / across % d;
      } else {
        row = i % down;
        column = i / down / d * (P * d) + i / down % d;
      }
      // Outputs beyond the tile's own columns are another tile's: their gradient counts as zero
      // here.
      const int stride_g = Vertical ? step : d;
      const float* from_g = g + row * p.pitch + shift_g + column;
      float gv[P];
      SDAN_UNROLL
      for (int j = 0; j < P; ++j) {
        gv[j] = from_g[j * stride_g];
        if (unit == 0) total.add(gv[j]);
      }
      const int ro = Vertical ? u.first * d : u.outer * p.dh,
                co = Vertical ? u.outer * p.dw : u.first * d;
      const float* from = tile + (row + ro) * p.pitch + shift_x + column + co;
      SDAN_UNROLL
      for (int q = 0; q < P + K - 1; ++q) {
        const float v = q < P + valid - 1 ? from[q * step] : 0.0f;
        SDAN_UNROLL
        for (int j = 0; j < P; ++j)
          if (q - j >= 0 && q - j < K) acc[q - j] = fmaf(gv[j], v, acc[q - j]);
      }
    }
  }
  SDAN_UNROLL
  for (int k = 0; k < K; ++k) {
    const float s = warp_sum(acc[k]);
    if (threadIdx.x % 32 == 0) sums[warp * (K + 1) + k] = s;
  }
  const float all = warp_sum(total);
  if (threadIdx.x % 32 == 0) sums[warp * (K + 1) + K] = all;
  __syncthreads();
  if (unit < units && lane <= K) {  // the first lanes of the unit's first warp
    CarefulSum s;
    for (int i = 0; i < warps_per_unit; ++i) s.add(sums[(warp + i) * (K + 1) + lane]);
    float* to = partial + static_cast<int64_t>(blockIdx.x) * (taps + 1);
    const int k = u.first + lane;
    if (lane < valid) to[Vertical ? k * p.kw + u.outer : u.outer * p.kw + k] = s.sum;
    if (lane == K && unit == 0) to[taps] = s.sum;
  }
}

// channels_last tensors. blockDim.x channel lanes, blockDim.y pixel groups; grid: (splits, channels
// / blockDim.x, units). Block x writes partial[x][channel][tap] for its unit's taps, and unit 0
// partial[x][channel][taps] = sum of the gradient. Dynamic shared memory: blockDim.x * blockDim.y *
// (kGradTaps + 1) floats.
template <typename T>
__global__ void __launch_bounds__(kFewThreads, 1)
    wgrad_last_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                      float* __restrict__ partial, const ConvParams p) {
  constexpr int P = kLastOutputs, K = kGradTaps;
  SDAN_DYNAMIC_SHARED(raw);
  auto* sums = reinterpret_cast<float*>(raw);  // [k][thread]
  const Axes axes = axes_of(p);
  const Axis in = axes.inner, out = axes.outer;
  const Unit u = unit_at(static_cast<int>(blockIdx.z), in.taps);
  const int valid = in.taps - u.first < K ? in.taps - u.first : K, taps = p.kh * p.kw;
  const int c = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  const int groups_in = (in.length + P * in.dilation - 1) / (P * in.dilation) * in.dilation;
  const int groups = out.length * groups_in;
  const int halo = (in.taps - 1) / 2 * in.dilation, halo_out = (out.taps - 1) / 2 * out.dilation;
  const int64_t tap_step = in.dilation * in.stride;
  float acc[K];
  CarefulSum total;
  SDAN_UNROLL
  for (int k = 0; k < K; ++k) acc[k] = 0;
  const int64_t first_g = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  for (int64_t next = first_g, image = 0; c < p.channels && image < p.planes;) {
    if (next >= groups) {
      next = first_g;
      ++image;
      continue;
    }
    const int g = static_cast<int>(next);
    next += static_cast<int64_t>(gridDim.x) * blockDim.y;
    const int gi = p.vertical ? g / out.length : g % groups_in,
              o = p.vertical ? g % out.length : g / groups_in;
    const int i0 = gi / in.dilation * (P * in.dilation) + gi % in.dilation;
    if (i0 >= in.length) continue;
    const int64_t plane = image * p.height * p.width * p.channels + c;
    const T* from_g = grad + plane + o * out.stride + i0 * in.stride;
    float gv[P];
    SDAN_UNROLL
    for (int j = 0; j < P; ++j) {
      gv[j] = i0 + j * in.dilation < in.length ? load_one(from_g + j * tap_step) : 0.0f;
      if (blockIdx.z == 0) total.add(gv[j]);
    }
    const int at = o - halo_out + u.outer * out.dilation;
    if (at < 0 || at >= out.length) continue;
    int i = i0 - halo + u.first * in.dilation;
    const T* from = x + plane + at * out.stride + i * in.stride;
    SDAN_UNROLL
    for (int q = 0; q < P + K - 1; ++q) {
      const float v = i >= 0 && i < in.length && q < P + valid - 1 ? load_one(from) : 0.0f;
      SDAN_UNROLL
      for (int j = 0; j < P; ++j)
        if (q - j >= 0 && q - j < K) acc[q - j] = fmaf(gv[j], v, acc[q - j]);
      i += in.dilation;
      from += tap_step;
    }
  }
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  SDAN_UNROLL
  for (int k = 0; k < K; ++k) sums[k * threads + thread] = acc[k];
  sums[K * threads + thread] = total.sum;
  __syncthreads();
  if (c >= p.channels) return;
  for (int k = static_cast<int>(threadIdx.y); k <= K; k += static_cast<int>(blockDim.y)) {
    CarefulSum s;
    for (int i = 0; i < static_cast<int>(blockDim.y); ++i)
      s.add(sums[k * threads + i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)]);
    float* to = partial + (static_cast<int64_t>(blockIdx.x) * p.channels + c) * (taps + 1);
    const int tap = u.first + k;
    if (k < valid) to[p.vertical ? tap * p.kw + u.outer : u.outer * p.kw + tap] = s.sum;
    if (k == K && blockIdx.z == 0) to[taps] = s.sum;
  }
}

// grad_weight[c][tap] and grad_bias[c] (either may be null): the sum over images n and splits s, in
// this order, of partial[(n * image_stride + c * channel_stride + s * split_stride) * (taps + 1) +
// tap]. One thread for each sum.
template <typename T>
__global__ void __launch_bounds__(256)
    wgrad_finish_kernel(const float* __restrict__ partial, T* __restrict__ grad_weight,
                        T* __restrict__ grad_bias, int channels, int taps, int64_t images,
                        int splits, int64_t image_stride, int64_t channel_stride,
                        int64_t split_stride) {
  const int64_t sums = static_cast<int64_t>(channels) * (taps + 1);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < sums;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t c = i / (taps + 1);
    const int tap = static_cast<int>(i % (taps + 1));
    if (tap < taps ? !grad_weight : !grad_bias) continue;
    CarefulSum total;
    for (int64_t n = 0; n < images; ++n) {
      SDAN_UNROLL_BY(8)
      for (int s = 0; s < splits; ++s)
        total.add(
            partial[(n * image_stride + c * channel_stride + s * split_stride) * (taps + 1) + tap]);
    }
    if (tap < taps)
      grad_weight[c * taps + tap] = from_float<T>(total.sum);
    else
      grad_bias[c] = from_float<T>(total.sum);
  }
}

}  // namespace sdan_fast::cuda
