// The weight gradient of a depth-wise convolution: a sum over all pixels. wgrad_tile and wgrad_last
// leave one partial sum per block, wgrad_finish adds them in a fixed order.
#pragma once

#include "depthwise_conv2d.cuh"

namespace sdan_fast::cuda {

constexpr int kGradTaps = 8;     // taps per thread of the weight gradient
constexpr int kGradOutputs = 7;  // columns per thread of a 1 x K strip's; odd, for the banks
constexpr int kGradRows = 8;     // rows of its tile

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
