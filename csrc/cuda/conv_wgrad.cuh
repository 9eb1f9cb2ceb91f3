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

// Contiguous tensors: float32, and what the tensor cores do not take. A thread has the sums of
// `Inner` taps along the inner axis (H if Vertical, else W) at `Outer` taps of the other: all of a
// square's, where these are its own size.
struct TileParams : RegionParams {
  int32_t lead;            // columns of the input before a tile's own; a multiple of 8
  int32_t rows, columns;   // staged of the input
  int32_t pitch, pitch_g;  // floats from a staged row to the next, of the input and of g
  int32_t warps_per_unit;  // that share out the pixels of a unit of taps
};

// The sums over a warp of N values, each in one lane, which calls put(k, sum). Half of
// the values go each way at each step, which takes about N shuffles instead of 5 N.
template <int Bit, int N, typename F>
__device__ __forceinline__ void warp_sums(const float (&v)[N], int first, int count, F&& put) {
  if constexpr (Bit == 0) {
    SDAN_UNROLL
    for (int i = 0; i < N; ++i)
      if (i < count) put(first + i, v[i]);
  } else {
    constexpr int H = (N + 1) / 2;
    const bool upper = threadIdx.x & Bit;
    float half[H];
    SDAN_UNROLL
    for (int i = 0; i < H; ++i) {
      const float low = v[i], high = i + H < N ? v[i + H] : 0.0f;
      half[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, Bit);
    }
    warp_sums<Bit / 2>(half, upper ? first + H : first,
                       upper       ? count - H
                       : count < H ? count
                                   : H,
                       put);
  }
}

// grid: (planes * regions, units / units of a block). A unit's warps add up their pixels, P outputs
// of the inner axis a dilation apart at a time. Each block writes partial[blockIdx.x][tap] for its
// units' taps, and with unit 0 partial[blockIdx.x][taps] = the sum of the gradient. A row-wise tile
// has kGradRows rows, and its pitches are 4 modulo 32. Dynamic shared memory: one or (if a region
// is more than one tile) two stages, at least (Inner * Outer + 1) floats for each warp.
template <typename T, bool Vertical, int Inner, int Outer, int Step = 0>
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
  const int d = Step       ? Step
                : Vertical ? p.dh
                           : p.dw,
            step = Vertical ? d * p.pitch : d, step_g = Vertical ? d * p.pitch_g : d,
            step_outer = Step       ? Step
                         : Vertical ? p.dw
                                    : p.dh * p.pitch;
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
        if (!kAll && unit == 0) total.add(gv[j]);
        // Where a thread has all sums, two are added plainly, and their sum carefully.
        if (kAll && j % 2) total.add(gv[j - 1] + gv[j]);
        if (kAll && j == P - 1 && P % 2) total.add(gv[j]);
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
  warp_sums<16>(acc, 0, kSums - 1, [&](int k, float s) { sums[warp * kSums + k] = s; });
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

// Floats from one sum of all threads to the next: the next row of lanes follows in the banks.
__host__ __device__ constexpr int last_pitch(int x, int y) {
  return x * y + ((x - x * y) & 31);
}

// channels_last tensors. blockDim.x lanes of V channels, blockDim.y groups of P outputs along the
// inner axis, a dilation apart; grid: (splits, channels / (V blockDim.x), units). A unit is up to
// Inner taps of the inner axis at up to Outer of the other: a thread has all of their sums. Block x
// writes partial[x][channel][tap] for its unit's taps, and unit 0 partial[x][channel][taps] = the
// sum of the gradient. Dynamic shared memory: last_pitch * V * (Inner + 1) floats.
template <typename T, int V, int Inner, int Outer>
__global__ void __launch_bounds__(kFewThreads, 1)
    wgrad_last_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                      float* __restrict__ partial, const ConvParams p) {
  constexpr int P = kLastOutputs, K = Inner;
  SDAN_DYNAMIC_SHARED(raw);
  auto* sums = reinterpret_cast<float*>(raw);  // [k][e][thread]
  const Axes axes = axes_of(p);
  const Axis in = axes.inner, out = axes.outer;
  const int per_outer = (in.taps + K - 1) / K, taps = p.kh * p.kw;
  const int first_outer = static_cast<int>(blockIdx.z) / per_outer * Outer,
            first = static_cast<int>(blockIdx.z) % per_outer * K;
  const int valid = in.taps - first < K ? in.taps - first : K;
  const int c = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * V;
  // Groups of a residue of the dilation, which lie P dilations apart. A block's threads take
  // neighbouring groups at a time, and its turns follow one another: down a few columns if the
  // inner axis is H, of one residue after the other, so that few rows are read again; else along
  // the rows.
  const int groups = (in.length + P * in.dilation - 1) / (P * in.dilation),
            groups_in = groups * in.dilation, abreast = static_cast<int>(blockDim.y),
            down = abreast / p.abreast, steps = (groups + down - 1) / down;
  const int turns = p.vertical ? (out.length + p.abreast - 1) / p.abreast * in.dilation * steps
                               : (out.length * groups_in + abreast - 1) / abreast;
  const int own_column = static_cast<int>(threadIdx.y) % p.abreast,
            own_group = static_cast<int>(threadIdx.y) / p.abreast;
  const int64_t all = p.planes * turns, begin = all * blockIdx.x / gridDim.x,
                stop = all * (blockIdx.x + 1) / gridDim.x;
  const int halo = (in.taps - 1) / 2 * in.dilation, halo_out = (out.taps - 1) / 2 * out.dilation;
  const int64_t tap_step = in.dilation * in.stride;
  float acc[Outer * K][V];
  CarefulSum total[V];
  SDAN_UNROLL
  for (int k = 0; k < Outer * K * V; ++k) acc[k / V][k % V] = 0;
  int64_t image = begin / turns;
  int turn = static_cast<int>(begin % turns) - 1;
  for (int64_t step = begin; step < stop && c < p.channels; ++step) {
    if (++turn == turns) turn = 0, ++image;
    int at, i0;  // of the outer axis, and the first output of the inner one
    if (p.vertical) {
      const int line = turn / steps, columns = line / in.dilation;
      at = columns * p.abreast + own_column;
      i0 = ((turn - line * steps) * down + own_group) * (P * in.dilation) +
           (line - columns * in.dilation);
    } else {
      const int g = turn * abreast + static_cast<int>(threadIdx.y), gi = g % groups_in;
      at = g / groups_in;
      i0 = gi / in.dilation * (P * in.dilation) + gi % in.dilation;
    }
    if (at >= out.length) continue;
    if (i0 >= in.length) continue;
    const int64_t plane = image * p.height * p.width * p.channels + c;
    const T* from_g = grad + plane + at * out.stride + i0 * in.stride;
    float gv[P][V];
    SDAN_UNROLL
    for (int j = 0; j < P; ++j) {
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) gv[j][e] = 0;
      if (i0 + j * in.dilation < in.length) load<V>(from_g, gv[j]);
      from_g += tap_step;
      // In 16 bits two are added plainly, and their sum carefully.
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) {
        if (blockIdx.z != 0) continue;
        if constexpr (!is_16bit<T>)
          total[e].add(gv[j][e]);
        else if (j % 2)
          total[e].add(gv[j - 1][e] + gv[j][e]);
      }
    }
    const int i = i0 - halo + first * in.dilation, end = i + (P + valid - 2) * in.dilation;
    const auto add = [&](auto inside) {
      SDAN_UNROLL
      for (int o = 0; o < Outer; ++o) {
        const int y = at - halo_out + (first_outer + o) * out.dilation;
        if (first_outer + o >= out.taps || y < 0 || y >= out.length) continue;
        const T* from = x + plane + y * out.stride + i * in.stride;
        int position = i;
        SDAN_UNROLL
        for (int q = 0; q < P + K - 1; ++q) {
          float v[V] = {};
          if ((decltype(inside)::value || (position >= 0 && position < in.length)) &&
              (Outer > 1 || q < P + valid - 1))
            load<V>(from, v);
          SDAN_UNROLL
          for (int j = 0; j < P; ++j) {
            if (q - j < 0 || q - j >= K) continue;
            SDAN_UNROLL
            for (int e = 0; e < V; ++e)
              acc[o * K + q - j][e] = fmaf(gv[j][e], v[e], acc[o * K + q - j][e]);
          }
          position += in.dilation;
          from += tap_step;
        }
      }
    };
    if (i >= 0 && end < in.length)
      add(std::true_type{});
    else
      add(std::false_type{});
  }
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int pitch = last_pitch(static_cast<int>(blockDim.x), static_cast<int>(blockDim.y));
  SDAN_UNROLL
  for (int o = 0; o < Outer; ++o) {
    if (o > 0) __syncthreads();
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) {
      SDAN_UNROLL
      for (int k = 0; k < K; ++k) sums[(k * V + e) * pitch + thread] = acc[o * K + k][e];
      sums[(K * V + e) * pitch + thread] = total[e].sum;
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.y); c < p.channels && i < (K + 1) * V;
         i += static_cast<int>(blockDim.y)) {
      const int k = i / V, e = i % V, along = first + k, other = first_outer + o;
      const bool bias = k == K;
      if (bias ? blockIdx.z > 0 || o > 0 : k >= valid || other >= out.taps) continue;
      CarefulSum s;
      for (int y = 0; y < static_cast<int>(blockDim.y); ++y)
        s.add(sums[i * pitch + y * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)]);
      float* to = partial + (static_cast<int64_t>(blockIdx.x) * p.channels + c + e) * (taps + 1);
      to[bias ? taps : p.vertical ? along * p.kw + other : other * p.kw + along] = s.sum;
    }
  }
}

}  // namespace sdan_fast::cuda
