// The 1x1 convolution of planes (NCHW) of which a tile of pixels was copied into scratch: outputs
// go straight to where they are wanted, no tile of them is written and read again.
//
// The register blocks are those of pointwise.h. Group after group of outputs goes over all pixels
// of the tile.
#pragma once

#include "pointwise.h"
#include "prefetch.h"
#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

// Pixels to copy at a time: rows of several lines, and inputs that about fill a first-level cache.
// With AVX-512, whose products ask each level of the caches for less, an eighth of a second-level
// one: the longer the rows, the more of them the processor's own prefetchers see coming.
constexpr int64_t kPlaneFloats = SDAN_IS_AVX512 ? 65536 : 8192;
constexpr int64_t kPlanePixels = SDAN_IS_AVX512 ? 384 : 256;

SDAN_INLINE int64_t plane_pixels(int64_t ci) {
  const int64_t n = kPlaneFloats / ci / 64 * 64;
  return n < 64 ? 64 : n > kPlanePixels ? kPlanePixels : n;
}

// finish(m, v, sum) takes M x V sums. Of every 64 inputs, of a few pixels (V = 1) of every 16, the
// sums are taken apart, and the bias comes last: one long chain rounds more than a blocked product,
// and the fewer the results the more luck PyTorch's largest error may have.
//
// fetch(m) asks for memory, for each output once, in between: all of a block's lines at once are
// more than a core may have outstanding.
template <int M, int V, typename Fetch, typename Finish>
SDAN_INLINE void plane_kernel(const float* x, ptrdiff_t stride, int ci, const float* weight,
                              const float* bias, const Fetch& fetch, const Finish& finish) {
  constexpr int S = kPointwiseSums<M, V>;
  constexpr int kSummed = V == 1 ? 16 : 64;
  Vec acc[S][M][V], before[M][V];
  const auto add_row = [&](int s) __attribute__((always_inline)) {
    Vec in[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) in[v] = load(x + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec w = set1(weight[m]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[s][m][v] = fma(in[v], w, acc[s][m][v]);
    }
    x += stride;
    weight += M;
  };
  const int every = 2 * ci >= M * S ? 2 * ci / M / S * S : S;  // inputs for two outputs' lines
  int fetched = 0;
  for (int begin = 0; begin < ci; begin += kSummed) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        if (begin > 0) before[m][v] = begin > kSummed ? before[m][v] + acc[0][m][v] : acc[0][m][v];
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) acc[s][m][v] = zero();
      }
    }
    int left = ci - begin < kSummed ? ci - begin : kSummed;
    while (left >= S) {
      int steps = (left < every ? left : every) / S;
      left -= steps * S;
      for (int end = fetched + 2; fetched < end && fetched < M; ++fetched) fetch(fetched);
      do {
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) add_row(s);
      } while (--steps > 0);
    }
    for (; left > 0; --left) add_row(0);
    add_up(acc);
  }
  for (; fetched < M; ++fetched) fetch(fetched);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const Vec b = set1(bias[m]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      finish(m, v, (ci > kSummed ? before[m][v] + acc[0][m][v] : acc[0][m][v]) + b);
    }
  }
}

// A group of M outputs, `first` and on, of n pixels. The callables are taken by value, here and in
// all that they hold: what they hold by reference would be loaded again after each store of a
// vector, and the next block's loads would wait for it.
template <int M, typename Fetch, typename Finish>
static void plane_group(const Pointwise& pw, int first, const float* x, ptrdiff_t stride, int64_t n,
                        Fetch fetch, Finish finish) {
  constexpr int V = kPointwiseVecs;
  const int ci = pw.ci;
  const float* weight = pw.weight + static_cast<int64_t>(first) * ci;
  const float* bias = pw.bias + first;
  const auto pixels = [&](int64_t i) __attribute__((always_inline)) {
    plane_kernel<M, V>(
        x + i, stride, ci, weight, bias,
        [&](int m) __attribute__((always_inline)) { fetch(first + m, i); },
        [&](int m, int v, Vec sum)
            __attribute__((always_inline)) { finish(first + m, i + v * kLanes, sum, kLanes); });
  };
  if (n >= V * kLanes) {
    int64_t i = 0;
    for (; i + V * kLanes <= n; i += V * kLanes) pixels(i);
    // What is left is computed with some of those before it, again.
    if (i < n) pixels(n - V * kLanes);
    return;
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    plane_kernel<M, 1>(
        x + i, stride, ci, weight, bias, [](int) {},
        [&](int m, int, Vec sum)
            __attribute__((always_inline)) { finish(first + m, i, sum, lanes); });
  }
}

// finish(m, i, sum, lanes) for all outputs m of n pixels, a vector of them from pixel i on, some
// more than once; `lanes` of the vector are pixels. fetch(m, i) comes once for each output m and
// the kPointwiseVecs vectors from pixel i on. x: a tile, zero up to
// whole vectors; pw packed by pack_pointwise_weight. Neither may hold anything by reference
// (plane_group).
template <typename Fetch, typename Finish>
SDAN_INLINE void plane_products(const Pointwise& pw, const float* x, ptrdiff_t stride, int64_t n,
                                const Fetch& fetch, const Finish& finish) {
  const int groups = pointwise_groups(pw.co);
  for (int g = 0; g < groups; ++g) {
    const int first = pointwise_group_begin(pw.co, groups, g);
#define SDAN_PLANE_CASE(M)                                    \
  case M:                                                     \
    if constexpr (M <= kPointwiseRows) {                      \
      plane_group<M>(pw, first, x, stride, n, fetch, finish); \
    }                                                         \
    break;
    switch (pointwise_group_begin(pw.co, groups, g + 1) - first) {
      SDAN_PLANE_CASE(1)
      SDAN_PLANE_CASE(2)
      SDAN_PLANE_CASE(3)
      SDAN_PLANE_CASE(4)
      SDAN_PLANE_CASE(5)
      SDAN_PLANE_CASE(6)
      SDAN_PLANE_CASE(7)
      SDAN_PLANE_CASE(8)
      SDAN_PLANE_CASE(9)
      SDAN_PLANE_CASE(10)
      SDAN_PLANE_CASE(11)
      SDAN_PLANE_CASE(12)
      SDAN_PLANE_CASE(13)
      SDAN_PLANE_CASE(14)
      default:
        break;
    }
#undef SDAN_PLANE_CASE
  }
}

// The same pixels of the rows [ci * m / co, ci * (m + 1) / co) of planes, one step further on: over
// a tile every row is asked for once.
template <typename T>
SDAN_INLINE void fetch_planes(const T* x, int64_t plane, int ci, int co, int m) {
  constexpr int64_t kBytes = kPointwiseVecs * kLanes * sizeof(T);
  const int64_t end = int64_t{ci} * (m + 1) / co;
  for (int64_t k = int64_t{ci} * m / co; k < end; ++k) {
#pragma GCC unroll 2
    for (int64_t at = 0; at < kBytes; at += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + k * plane) + at, 0, 2);
    }
  }
}

template <typename T>
SDAN_INLINE void fetch_plane_to_write(T* y) {
  constexpr int64_t kBytes = kPointwiseVecs * kLanes * sizeof(T);
#pragma GCC unroll 2
  for (int64_t at = 0; at < kBytes; at += 64) {
    prefetch_write(reinterpret_cast<const char*>(y) + at);
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
