// The weight gradient of a depth-wise convolution in 16 bits, contiguous tensors, on tensor cores.
//
// One channel's gradient is dw[i][j] = the sum over pixels of g[y][x] * in[y + si][x + sj]: for a
// vertical shift si, products of columns of g and columns of the input. So a matrix product does
// it: of 16 rows of g, 16 columns wide, and the same rows si further down of the input, a halo
// wider. Element (m, n) of the product belongs to the shift n - m, and the sum along a diagonal is
// what one tap gets from 16 x 16 pixels. Most elements belong to no tap, and yet it takes a tenth
// of the instructions that FMAs would: no conversions, no shared-memory read for each product, and
// the dilation does not matter.
//
// A block owns a region of one plane and goes over it in tiles, which arrive by cp.async one step
// ahead. A warp has the products of up to Units vertical taps in registers, for its share of the
// tile's 16 x 16 pixels; at the end its diagonals are summed, and the block writes one partial sum
// of each tap and of g. sum_parts adds these.
#pragma once

#include "mma.cuh"
#include "wgrad_region.cuh"

namespace sdan_fast::cuda {

constexpr int kMmaThreads = 256, kMmaSide = 16;

// A tile's sides are multiples of 16.
struct MmaParams : RegionParams {
  int32_t lead;                   // columns of the input before a tile's own; a multiple of 8
  int32_t rows, columns;          // staged of g, and of the input
  int32_t units, groups, splits;  // vertical taps of a warp, warps for all of them, by as many
};

// Floats from one row of a product in shared memory to the next, for the banks.
__host__ __device__ constexpr int product_pitch(int pairs) {
  return 2 * 8 * pairs + 8;
}

// 16 rows of pairs of 8 columns, from `from` on.
template <int Pair, int Pairs>
__device__ __forceinline__ void load_pairs(SharedAddress from, uint32_t (&b)[Pairs][4]) {
  if constexpr (Pair < Pairs) {
    load_transposed<2 * kMmaSide * Pair>(from, b[Pair]);
    load_pairs<Pair + 1>(from, b);
  }
}

// grid: (planes * regions, blocks that share out the groups). Each block writes
// partial[blockIdx.x][tap] for its taps, and block y = 0 partial[blockIdx.x][taps] = the sum of g.
// Dynamic shared memory: one or (if a region is more than one tile) two stages, or the products.
template <typename T, int Units, int Pairs>
__global__ void __launch_bounds__(kMmaThreads, 1)
    wgrad_mma_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                     float* __restrict__ partial, const MmaParams p) {
  constexpr int S = kMmaSide, kPitch = product_pitch(Pairs);
  SDAN_DYNAMIC_SHARED(raw);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int group = static_cast<int>(blockIdx.y) * (static_cast<int>(blockDim.x) / 32 / p.splits) +
                    warp / p.splits,
            split = warp % p.splits;
  const int first = group * p.units,
            count = p.kh - first < p.units ? p.kh - first : p.units;  // none, beyond the groups
  const Region region(p);
  const int64_t base = region.plane * p.height * p.width;
  const int middle = (p.kh - 1) / 2, pitch_x = p.columns + 8, pitch_g = p.tile_w + 8;
  const int elements = p.tile_h * pitch_x + p.rows * pitch_g;
  const int per_access = p.wide ? 8 : 1, across_x = p.columns / per_access,
            across_g = p.tile_w / per_access;
  auto* stages = reinterpret_cast<T*>(raw);
  const Share share_x(across_x, p.wide, p.wide && p.lead % S ? 1 : 0), share_g(across_g, p.wide, 0);
  const auto fetch = [&](int y, int left, int buffer) {
    T* to = stages + buffer * elements;
    const auto both = [&](auto wide) {
      constexpr bool kWide = decltype(wide)::value;
      fetch_tile<kWide>(x + base, to, share_x, p.width, pitch_x, y, left - p.lead, p.tile_h,
                        across_x, region.ys, Span{0, p.width});
      fetch_tile<kWide>(grad + base, to + p.tile_h * pitch_x, share_g, p.width, pitch_g,
                        y - middle * p.dh, left, p.rows, across_g, Span{0, p.height}, region.xs);
    };
    if (p.wide)
      both(std::true_type{});
    else
      both(std::false_type{});
  };
  // Taps are counted from the middle one on, whose g are the region's own, to be summed as well.
  const auto tap_at = [&](int number) {
    return number + middle < p.kh ? number + middle : number + middle - p.kh;
  };
  // Where this lane's row of the four matrices lies: the second matrix is the right half of g's 16
  // x 16, but the lower half of the input's.
  const int x_at = ((lane % 8 + lane / 8 % 2 * 8) * pitch_x + lane / 16 * 8) * 2;
  int g_at[Units];
  SDAN_UNROLL
  for (int u = 0; u < Units; ++u) {
    const int tap = tap_at(first + u), row = lane % 8 + lane / 16 * 8;
    g_at[u] =
        (p.tile_h * pitch_x + (row + (p.kh - 1 - tap) * p.dh) * pitch_g + lane / 8 % 2 * 8) * 2;
  }

  float acc[Units][2 * Pairs][4], total[4] = {0, 0, 0, 0};
  SDAN_UNROLL
  for (int i = 0; i < Units * 8 * Pairs; ++i) acc[i / (8 * Pairs)][i / 4 % (2 * Pairs)][i % 4] = 0;
  constexpr uint32_t one = std::is_same_v<T, bfloat16> ? 0x3f803f80u : 0x3c003c00u;
  const uint32_t ones[2] = {one, one};

  // A warp's first 16 x 16 of a tile, the way to its next one, and what the end of a row adds.
  const int across = p.tile_w / S;
  const int first_row = split / across * S, first_column = split % across * S;
  const int rows_on = p.splits / across * S, columns_on = p.splits % across * S;
  const int first_x = x_at + (first_row * pitch_x + first_column) * 2,
            first_g = (first_row * pitch_g + first_column) * 2;
  const int on_x = (rows_on * pitch_x + columns_on) * 2,
            on_g = (rows_on * pitch_g + columns_on) * 2, wrap_x = (S * pitch_x - p.tile_w) * 2,
            wrap_g = (S * pitch_g - p.tile_w) * 2;

  over_tiles(p, region, fetch, [&](int y, int, int buffer) {
    const int down = region.ys.end - y, rows = count > 0 ? down < p.tile_h ? down : p.tile_h : 0;
    const SharedAddress stage = shared_address(stages + buffer * elements);
    SharedAddress from_x = stage + first_x, from_g = stage + first_g;
    int row = first_row, column = first_column;
    while (row < rows) {
      uint32_t a[4], b[Pairs][4];
      load_pairs<0>(from_x, b);
      SDAN_UNROLL
      for (int u = 0; u < Units; ++u) {
        if (u >= count) break;
        load_transposed<0>(from_g + g_at[u], a);
        if (u == 0 && group == 0) multiply_add<T>(total, a, ones);
        SDAN_UNROLL
        for (int j = 0; j < 2 * Pairs; ++j) {
          const uint32_t half[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          multiply_add<T>(acc[u][j], a, half);
        }
      }
      row += rows_on, column += columns_on;
      from_x += on_x, from_g += on_g;
      if (column >= p.tile_w) {
        row += S, column -= p.tile_w;
        from_x += wrap_x, from_g += wrap_g;
      }
    }
  });

  // The products of one vertical tap of each warp at a time, then half a warp for each tap: the sum
  // along a diagonal.
  constexpr int kSection = S * kPitch + S;
  auto* products = reinterpret_cast<float*>(raw);
  const int warps = static_cast<int>(blockDim.x) / 32, here = warps / p.splits;
  float* to = partial + static_cast<int64_t>(blockIdx.x) * (p.kh * p.kw + 1);
  float* mine = products + warp * kSection + lane / 4 * kPitch + lane % 4 * 2;
  const float* diagonal = products + lane % S * (kPitch + 1) + p.lead - (p.kw - 1) / 2 * p.dw;
  const int item = 2 * warp + lane / S, first_one = item / p.kw, first_j = item % p.kw,
            step_g = 2 * warps / p.kw, step_j = 2 * warps % p.kw;
  SDAN_UNROLL
  for (int u = 0; u < Units; ++u) {
    if (u >= p.units) break;
    __syncthreads();
    SDAN_UNROLL
    for (int j = 0; j < 4 * Pairs; ++j) {
      float2 v;
      v.x = acc[u][j / 2][j % 2 * 2], v.y = acc[u][j / 2][j % 2 * 2 + 1];
      *reinterpret_cast<float2*>(mine + j % 2 * 8 * kPitch + j / 2 * 8) = v;
    }
    __syncthreads();
    int g = first_one, j = first_j;
    for (int i = 2 * warp; i < here * p.kw; i += 2 * warps) {
      const int number = (static_cast<int>(blockIdx.y) * here + g) * p.units + u;
      const bool there = g < here && number < p.kh;
      float sum = 0;
      if (there) {
        const float* from = diagonal + g * p.splits * kSection + j * p.dw;
        for (int k = 0; k < p.splits; ++k) sum += from[k * kSection];
      }
      SDAN_UNROLL
      for (int d = S / 2; d > 0; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
      if (there && lane % S == 0) to[tap_at(number) * p.kw + j] = sum;
      g += step_g, j += step_j;
      if (j >= p.kw) ++g, j -= p.kw;
    }
  }
  if (blockIdx.y > 0) return;
  __syncthreads();
  const float sum = warp_sum(lane % 4 == 0 ? total[0] + total[2] : 0.0f);
  if (lane == 0 && group == 0) products[split] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  float all = 0;
  for (int k = 0; k < p.splits; ++k) all += products[k];
  to[p.kh * p.kw] = all;
}

}  // namespace sdan_fast::cuda
