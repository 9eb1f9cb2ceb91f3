// Depth-wise convolution of contiguous tensors with a kernel that is no strip, and its input
// gradient (the taps reversed).
//
// Rows a vertical dilation apart form images of their own, which never meet. A block takes a tile
// of one of them, so that what neighbouring blocks read again is kh - 1 rows whatever the dilation.
// It stages the tile in shared memory as float32, with zeros around.
//
//   D > 0   K x K taps with dilation D: a thread computes square_rows(K, D) rows of four columns.
//           All that a row of taps meets are whole 128-bit reads of shared memory, and a shift is
//           the name of a register.
//   D = 0   anything else: a thread computes 8 rows of one column. K rows of taps are unrolled,
//           and what stands beside each other is a loop; with K = 1 both are.
#pragma once

#include "quad_tile.cuh"

namespace sdan_fast::cuda {

// Sizes in elements; square_plan.h chooses the tiles.
struct SquareParams {
  int64_t planes;
  DType dtype;
  int32_t channels, height, width;
  int32_t kh, kw, dh, dw;
  int32_t flip;              // 1: correlate with the taps reversed (input gradient)
  int32_t wide;              // 1: rows of the tensors begin at multiples of 4 elements
  int32_t tile_h, tile_w;    // outputs of a tile; its rows are dh apart
  int32_t tiles_y, tiles_x;  // of each of the dh images of a plane
  int32_t pitch, margin;     // quads of a staged row; of them, before the first output
  int32_t tile;              // where it begins in shared memory, in floats
};

constexpr int kSquareThreads = 256;

// Rows of a thread: fewer where all taps and sums at once would not fit into registers.
__host__ __device__ __forceinline__ constexpr int square_rows(int k, int d) {
  return d == 0 ? 8 : d == 1 || k > 7 ? 5 : 9;
}

// Floats of taps in shared memory from one row (D = 0: column) of them to the next.
__host__ __device__ __forceinline__ constexpr int square_taps_pitch(int k) {
  return k < 3 ? k : (k + 3) / 4 * 4;
}

// The outputs of four columns: `from` is the quad that holds the first of the columns that are met.
template <int K, int D, int R>
__device__ __forceinline__ void square_outputs(const float4* from, int pitch, const float* taps,
                                               float (&acc)[R][4]) {
  constexpr int M = (K / 2 * D + 3) / 4, W = square_taps_pitch(K);
  float w[K][W];
  SDAN_UNROLL
  for (int j = 0; j < R + K - 1; ++j) {
    if (j < K) {
      SDAN_UNROLL
      for (int k = 0; k < W; k += 4) {
        const float4 v = *reinterpret_cast<const float4*>(taps + j * W + k);
        w[j][k] = v.x, w[j][k + 1] = v.y, w[j][k + 2] = v.z, w[j][k + 3] = v.w;
      }
    }
    float row[4 * (2 * M + 1)];  // those that no tap meets are never read
    get_quads<2 * M + 1>(from, row);
    from += pitch;
    SDAN_UNROLL
    for (int k = 0; k < K; ++k) {
      SDAN_UNROLL
      for (int r = 0; r < R; ++r) {
        if (j - r < 0 || j - r >= K) continue;
        SDAN_UNROLL
        for (int e = 0; e < 4; ++e)
          acc[r][e] = fmaf(w[j - r][k], row[4 * M + e + (k - K / 2) * D], acc[r][e]);
      }
    }
  }
}

// grid: (plane, image of its rows, tile). Dynamic shared memory: the taps, the tile.
template <int K, int D>
__global__ void __launch_bounds__(kSquareThreads, 2)
    conv_square_kernel(const void* __restrict__ x, const void* __restrict__ weight,
                       const void* __restrict__ bias, void* __restrict__ y, const SquareParams p) {
  constexpr int R = square_rows(K, D);
  SDAN_DYNAMIC_SHARED(raw);
  auto* taps = reinterpret_cast<float*>(raw);
  float* tile = taps + p.tile;
  auto* quads = reinterpret_cast<float4*>(tile);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x),
            threads = static_cast<int>(blockDim.x * blockDim.y);
  const auto per_plane = static_cast<unsigned>(p.dh * p.tiles_y * p.tiles_x);
  const int64_t plane = blockIdx.x / per_plane;
  const int in_plane = static_cast<int>(blockIdx.x % per_plane),
            c = static_cast<int>(plane % p.channels);
  const int x0 = in_plane % p.tiles_x * p.tile_w, image = in_plane / p.tiles_x / p.tiles_y,
            y0 = in_plane / p.tiles_x % p.tiles_y * p.tile_h;
  const int rows = (p.height - image + p.dh - 1) / p.dh;  // of the image; none, perhaps
  const int n = rows - y0 < p.tile_h ? rows - y0 : p.tile_h;
  if (n <= 0) return;
  const int columns = p.width - x0 < p.tile_w ? p.width - x0 : p.tile_w;
  const int halo = (p.kh - 1) / 2, low = y0 > halo ? y0 - halo : 0,
            high = rows - y0 - n > halo ? y0 + n + halo : rows, first = low - (y0 - halo);
  const int64_t base = (plane * p.height + image) * p.width + x0,
                next = static_cast<int64_t>(p.dh) * p.width;
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(x) + base + low * next;
    for (int q = static_cast<int>(threadIdx.x); q < p.pitch; q += static_cast<int>(blockDim.x)) {
      const int column = 4 * (q - p.margin), there = x0 + column < 0 ? 0 : p.width - x0 - column;
      float4* to = quads + first * p.pitch + q;
      if (p.wide)
        stage_quads<true>(from + column, next, to, p.pitch, high - low, there);
      else
        stage_quads<false>(from + column, next, to, p.pitch, high - low, there);
    }
    const T* channel = static_cast<const T*>(weight) + static_cast<int64_t>(c) * p.kh * p.kw;
    const int pitch = square_taps_pitch(D ? K : p.kh), lines = D ? K : p.kw;
    for (int i = thread; i < pitch * lines; i += threads) {
      const int line = i / pitch, at = i - line * pitch, kh = D ? line : at, kw = D ? at : line;
      float tap = 0;
      if (kh < p.kh && kw < p.kw) {
        const int k = kh * p.kw + kw;
        tap = load_one(channel + (p.flip ? p.kh * p.kw - 1 - k : k));
      }
      taps[i] = tap;
    }
  });
  for (int q = static_cast<int>(threadIdx.x); q < p.pitch; q += static_cast<int>(blockDim.x)) {
    clear_quads(quads + q, p.pitch, 0, first);
    clear_quads(quads + q, p.pitch, first + high - low, p.tile_h + p.kh - 1);
  }
  __syncthreads();
  const float b = bias ? load_any(p.dtype, bias, c) : 0.0f;
  const int64_t corner = base + y0 * next;
  if constexpr (D > 0) {
    const int across = p.tile_w / 4, whole = threads < 32 ? threads : round_down(threads, 32);
    // A warp that is not whole would take as long as one that is.
    for (int item = thread < whole ? thread : p.tile_h * across; item < (n + R - 1) / R * across;
         item += whole) {
      const int g = item / across, q = item - g * across, there = columns - 4 * q;
      if (there <= 0) continue;
      float acc[R][4];
      SDAN_UNROLL
      for (int j = 0; j < R; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = b;
      square_outputs<K, D, R>(quads + g * R * p.pitch + q, p.pitch, taps, acc);
      with_element(p.dtype, [&](auto element) {
        using T = decltype(element);
        T* to = static_cast<T*>(y) + corner + g * R * next + 4 * q;
        const int64_t bytes = next * static_cast<int>(sizeof(T));
        if (p.wide)
          store_quads<true>(to, bytes, n - g * R, there, acc);
        else
          store_quads<false>(to, bytes, n - g * R, there, acc);
      });
    }
  } else {
    const int step = 4 * p.pitch, loops = K == 1 ? p.kh : 1;
    const float* start = tile + 4 * p.margin - (p.kw - 1) / 2 * p.dw;
    for (int item = thread; item < (n + R - 1) / R * p.tile_w; item += threads) {
      const int g = item / p.tile_w, column = item - g * p.tile_w;
      if (column >= columns) continue;
      float acc[R];
      SDAN_UNROLL
      for (int j = 0; j < R; ++j) acc[j] = b;
      for (int kw = 0; kw < p.kw; ++kw) {
        for (int l = 0; l < loops; ++l) {
          float w[square_taps_pitch(K)];
          if constexpr (K == 1) {
            w[0] = taps[kw * square_taps_pitch(p.kh) + l];
          } else {
            SDAN_UNROLL
            for (int k = 0; k < K; k += 4) {
              const float4 v =
                  *reinterpret_cast<const float4*>(taps + kw * square_taps_pitch(K) + k);
              w[k] = v.x, w[k + 1] = v.y, w[k + 2] = v.z, w[k + 3] = v.w;
            }
          }
          const float* from = start + (g * R + l) * step + column + kw * p.dw;
          SDAN_UNROLL
          for (int q = 0; q < R + K - 1; ++q) {
            const float v = from[q * step];
            SDAN_UNROLL
            for (int j = 0; j < R; ++j)
              if (q - j >= 0 && q - j < K) acc[j] = fmaf(w[q - j], v, acc[j]);
          }
        }
      }
      with_element(p.dtype, [&](auto element) {
        using T = decltype(element);
        T* to = static_cast<T*>(y) + corner + g * R * next + column;
        SDAN_UNROLL
        for (int j = 0; j < R; ++j) {
          if (g * R + j < n) *to = from_float<T>(acc[j]);
          to += next;
        }
      });
    }
  }
}

}  // namespace sdan_fast::cuda
