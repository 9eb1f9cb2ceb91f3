// The weight gradient of a depth-wise convolution: a sum over all pixels. wgrad_mma (16 bits on
// tensor cores, conv_wgrad_mma.cuh), wgrad_tile and wgrad_last (channels_last) leave one partial
// sum per block, and sum_parts adds these.
#pragma once

#include "depthwise_conv2d.cuh"
#include "wgrad_region.cuh"

namespace sdan_fast::cuda {

constexpr int kGradTaps = 8, kMoreGradTaps = 12;  // taps per thread of the weight gradient
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

// Contiguous tensors: float32, and what the tensor cores do not take. A thread has the sums of
// `Inner` taps along the inner axis (H if Vertical, else W) at `Outer` taps of the other: all of a
// square's, where these are its own size.
struct TileParams : RegionParams {
  int32_t lead;            // columns of the input before a tile's own; a multiple of 8
  int32_t rows, columns;   // staged of the input
  int32_t pitch, pitch_g;  // floats from a staged row to the next, of the input and of g
  int32_t warps_per_unit;  // that share out the pixels of a unit of taps
};

// grid: (planes * regions, units / units of a block). A unit's warps add up their pixels, P outputs
// of the inner axis a dilation apart at a time. Each block writes partial[blockIdx.x][tap] for its
// units' taps, and with unit 0 partial[blockIdx.x][taps] = the sum of the gradient. A row-wise tile
// has kGradRows rows, and its pitches are 4 modulo 32. Dynamic shared memory: one or (if a region
// is more than one tile) two stages, at least (Inner * Outer + 1) floats for each warp.
template <typename T, bool Vertical, int Inner, int Outer>
__global__ void __launch_bounds__(kFewThreads, 1)
    wgrad_tile_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                      float* __restrict__ partial, const TileParams p) {
  constexpr int P = Vertical ? kColumnOutputs : kGradOutputs, K = Inner, kSums = Inner * Outer + 1;
  constexpr bool kAll = Outer > 1;  // no tap is missing
  SDAN_DYNAMIC_SHARED(raw);
  auto* stages = reinterpret_cast<float*>(raw);
  const int taps = p.kh * p.kw, inner = Vertical ? p.kh : p.kw, outer = Vertical ? p.kw : p.kh;
  const int per_outer = (inner + K - 1) / K, units = kAll ? 1 : outer * per_outer;
  const int warp = static_cast<int>(threadIdx.x) / 32,
            here = static_cast<int>(blockDim.x) / 32 / p.warps_per_unit;
  const int lane = static_cast<int>(threadIdx.x) % 32 + warp % p.warps_per_unit * 32,
            lanes = p.warps_per_unit * 32;
  const int unit = static_cast<int>(blockIdx.y) * here + warp / p.warps_per_unit;
  const int at_outer = unit / per_outer, first = unit % per_outer * K;
  const int valid = kAll || inner - first > K ? K : inner - first;
  const int halo_y = (p.kh - 1) / 2 * p.dh, halo_x = (p.kw - 1) / 2 * p.dw;
  const int d = Vertical ? p.dh : p.dw, step = Vertical ? d * p.pitch : d,
            step_g = Vertical ? d * p.pitch_g : d, step_outer = Vertical ? p.dw : p.dh * p.pitch;
  const Region region(p);
  const int64_t base = region.plane * p.height * p.width;
  const int elements = p.rows * p.pitch + p.tile_h * p.pitch_g;
  const int per_access = p.wide ? kWide<T> : 1, across_x = p.columns / per_access,
            across_g = (p.pitch_g - 4) / per_access;
  const Share share_x(across_x, p.wide, 0), share_g(across_g, p.wide, 0);
  // From a unit's first tap at the tile's first output: rows and columns of the staged input.
  const int corner =
      (Vertical ? first * d * p.pitch + at_outer * p.dw : at_outer * p.dh * p.pitch + first * d) +
      p.lead - halo_x;
  // A thread's outputs: (row, column) of a tile, in groups of P of the inner axis.
  const int across = Vertical ? p.tile_w : kGradRows;
  const int first_a = lane % across, first_b = lane / across, step_a = lanes % across,
            step_b = lanes / across;
  const int groups = (Vertical ? p.tile_h : p.tile_w) / P;
  float acc[kSums - 1];
  CarefulSum total;
  SDAN_UNROLL
  for (int k = 0; k < kSums - 1; ++k) acc[k] = 0;
  const auto fetch = [&](int y, int left, int buffer) {
    float* to = stages + buffer * elements;
    const auto both = [&](auto wide) {
      constexpr bool W = decltype(wide)::value;
      fetch_tile<W>(x + base, to, share_x, p.width, p.pitch, y - halo_y, left - p.lead, p.rows,
                    across_x, Span{0, p.height}, Span{0, p.width});
      fetch_tile<W>(grad + base, to + p.rows * p.pitch, share_g, p.width, p.pitch_g, y, left,
                    p.tile_h, across_g, region.ys, region.xs);
    };
    if (p.wide)
      both(std::true_type{});
    else
      both(std::false_type{});
  };
  over_tiles(p, region, fetch, [&](int, int, int buffer) {
    if (unit >= units) return;
    const float* tile = stages + buffer * elements;
    const float* g = tile + p.rows * p.pitch;
    for (int a = first_a, b = first_b; b < groups;) {
      // Neighbouring groups are neighbours in memory, within a dilation.
      const int at = b / d * (P * d) + b % d, row = Vertical ? at : a, column = Vertical ? a : at;
      const float *from_g = g + row * p.pitch_g + column,
                  *from = tile + row * p.pitch + column + corner;
      float gv[P];
      SDAN_UNROLL
      for (int j = 0; j < P; ++j, from_g += step_g) {
        gv[j] = *from_g;
        if (unit == 0) total.add(gv[j]);
      }
      SDAN_UNROLL
      for (int q = 0; q < P + K - 1; ++q, from += step) {
        const float* next = from;
        SDAN_UNROLL
        for (int o = 0; o < Outer; ++o, next += step_outer) {
          const float v = kAll || q < P + valid - 1 ? *next : 0.0f;
          SDAN_UNROLL
          for (int j = 0; j < P; ++j)
            if (q - j >= 0 && q - j < K) acc[o * K + q - j] = fmaf(gv[j], v, acc[o * K + q - j]);
        }
      }
      a += step_a, b += step_b;
      if (a >= across) a -= across, ++b;
    }
  });
  auto* sums = stages;  // [warp][kSums]
  SDAN_UNROLL
  for (int k = 0; k < kSums - 1; ++k) {
    const float s = warp_sum(acc[k]);
    if (threadIdx.x % 32 == 0) sums[warp * kSums + k] = s;
  }
  const float all = warp_sum(total);
  if (threadIdx.x % 32 == 0) sums[warp * kSums + kSums - 1] = all;
  __syncthreads();
  float* to = partial + static_cast<int64_t>(blockIdx.x) * (taps + 1);
  for (int k = lane; k < kSums && unit < units; k += lanes) {
    CarefulSum s;
    for (int i = 0; i < p.warps_per_unit; ++i)
      s.add(sums[(warp - warp % p.warps_per_unit + i) * kSums + k]);
    const int along = first + k % K, other = at_outer + k / K;
    if (k == kSums - 1) {
      if (unit == 0) to[taps] = s.sum;
    } else if (k % K < valid) {
      to[Vertical ? along * p.kw + other : other * p.kw + along] = s.sum;
    }
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

}  // namespace sdan_fast::cuda
