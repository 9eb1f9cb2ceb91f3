// Depth-wise convolution of channels_last tensors with a kernel that is no strip, and its input
// gradient (the taps reversed).
//
// As in conv_square.cuh, rows a vertical dilation apart form images of their own. A thread computes
// last_rows(K) rows of V channels of one pixel column of such an image. It walks over the columns
// of taps: K taps of its channels from shared memory, then the rows of the image that they meet,
// each loaded once and used by all outputs that it is a tap of. Neighbouring threads have
// neighbouring channels, then neighbouring pixels, so that loads are whole sectors; what a block
// reads again, for the next column of taps or the next thread, comes from L1.
//
// K = 1 stands for any number of rows of taps, which are a loop then.
#pragma once

#include "quad_tile.cuh"

namespace sdan_fast::cuda {

// Sizes in elements; last_plan.h chooses the tiles.
struct LastParams {
  int64_t images;
  int32_t channels, height, width;
  int32_t kh, kw, dh, dw;
  int32_t flip;              // 1: correlate with the taps reversed (input gradient)
  int32_t tile_g, tile_w;    // outputs of a tile: groups of rows, columns
  int32_t tiles_y, tiles_x;  // of each of the dh images of an image
};

constexpr int kLastThreads = 128;

__host__ __device__ __forceinline__ constexpr int last_rows(int k) {
  return k == 1 ? 8 : 9;
}

// V neighbouring floats of shared memory.
template <int V>
__device__ __forceinline__ void get_taps(const float* p, float (&v)[V]) {
  if constexpr (V == 4) {
    const float4 q = *reinterpret_cast<const float4*>(p);
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
  } else {
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) v[e] = p[e];
  }
}

// Adds a column of K taps to R outputs. from: the row of the first output's first tap, row `first`
// of `rows` that the image has; All says that it has all that are met.
template <bool All, int K, int R, int V, typename T>
__device__ __forceinline__ void add_column(const T* from, int64_t next, int first, int rows,
                                           const float (&w)[K][V], float (&acc)[R][V]) {
  SDAN_UNROLL
  for (int j = 0; j < R + K - 1; ++j) {
    float v[V];
    if (All || static_cast<unsigned>(first + j) < static_cast<unsigned>(rows)) {
      load<V>(from, v);
    } else {
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) v[e] = 0;
    }
    from = bytes_on(from, next);
    SDAN_UNROLL
    for (int r = 0; r < R; ++r) {
      if (j - r < 0 || j - r >= K) continue;
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) acc[r][e] = fmaf(w[j - r][e], v[e], acc[r][e]);
    }
  }
}

// blockDim.x vectors of V channels by blockDim.y pixels. grid: (image, image of its rows and tile;
// channels / (V blockDim.x)). Dynamic shared memory: kh * kw * V * blockDim.x floats.
template <typename T, int K, int V>
__global__ void __launch_bounds__(kLastThreads, K == 9 ? 2 : 3)  // 9 rows of taps spill otherwise
    conv_last_kernel(const T* __restrict__ x, const T* __restrict__ weight,
                     const T* __restrict__ bias, T* __restrict__ y, const LastParams p) {
  constexpr int R = last_rows(K);
  SDAN_DYNAMIC_SHARED(raw);
  auto* taps = reinterpret_cast<float*>(raw);  // [kw][kh][channel]
  const int lanes = static_cast<int>(blockDim.x) * V, count = p.kh * p.kw,
            c0 = static_cast<int>(blockIdx.y) * lanes, lane = static_cast<int>(threadIdx.x) * V,
            c = c0 + lane, threads = static_cast<int>(blockDim.x * blockDim.y);
  for (int i = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); i < count * lanes;
       i += threads) {
    // Neighbours have neighbouring channels, for the banks.
    const int k = i / lanes, at = i - k * lanes, kw = k / p.kh, kh = k - kw * p.kh;
    const int from = kh * p.kw + kw;
    taps[i] = c0 + at < p.channels ? load_one(weight + static_cast<int64_t>(c0 + at) * count +
                                              (p.flip ? count - 1 - from : from))
                                   : 0.0f;
  }
  __syncthreads();
  if (c >= p.channels) return;
  const auto per_image = static_cast<unsigned>(p.dh * p.tiles_y * p.tiles_x);
  const int64_t n = blockIdx.x / per_image;
  const int in_image = static_cast<int>(blockIdx.x % per_image), tx = in_image % p.tiles_x,
            ty = in_image / p.tiles_x % p.tiles_y, image = in_image / p.tiles_x / p.tiles_y;
  const int rows = (p.height - image + p.dh - 1) / p.dh;  // of the image; none, perhaps
  const int halo_y = (p.kh - 1) / 2, halo_x = (p.kw - 1) / 2 * p.dw;
  const int64_t pixels = static_cast<int64_t>(p.dh) * p.width * p.channels,  // to the next row
      next = pixels * static_cast<int>(sizeof(T)),
                base = (n * p.height + image) * p.width * p.channels + c;
  float offset[V];
  SDAN_UNROLL
  for (int e = 0; e < V; ++e) offset[e] = bias ? load_one(bias + c + e) : 0.0f;
  for (int item = static_cast<int>(threadIdx.y); item < p.tile_g * p.tile_w;
       item += static_cast<int>(blockDim.y)) {
    const int g = item / p.tile_w, column = tx * p.tile_w + item - g * p.tile_w,
              row = (ty * p.tile_g + g) * R;
    if (row >= rows || column >= p.width) continue;
    float acc[R][V];
    SDAN_UNROLL
    for (int r = 0; r < R; ++r) {
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) acc[r][e] = offset[e];
    }
    const float* tap = taps + lane;
    const T* corner = x + base + (row - halo_y) * pixels;
    for (int kw = 0; kw < p.kw; ++kw) {
      const int at = column - halo_x + kw * p.dw;
      if (static_cast<unsigned>(at) >= static_cast<unsigned>(p.width)) {
        tap += p.kh * lanes;
        continue;
      }
      const T* from = corner + static_cast<int64_t>(at) * p.channels;
      int first = row - halo_y;
      for (int kh = 0; kh < p.kh; kh += K) {  // once, unless K is 1
        float w[K][V];
        SDAN_UNROLL
        for (int k = 0; k < K; ++k) {
          get_taps<V>(tap, w[k]);
          tap += lanes;
        }
        if (first >= 0 && first + R + K - 1 <= rows)
          add_column<true, K, R, V>(from, next, first, rows, w, acc);
        else
          add_column<false, K, R, V>(from, next, first, rows, w, acc);
        first += K, from += K * pixels;
      }
    }
    T* to = y + base + row * pixels + static_cast<int64_t>(column) * p.channels;
    SDAN_UNROLL
    for (int r = 0; r < R; ++r) {
      if (row + r < rows) store<V>(to, acc[r]);
      to = bytes_on(to, next);
    }
  }
}

}  // namespace sdan_fast::cuda
