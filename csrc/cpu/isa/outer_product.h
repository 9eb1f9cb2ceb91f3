// The weight gradient of a 1x1 convolution over a tile: sums over its pixels of the products of
// each row of one tile with each row of another.
//
// Vectors run along the pixels in both tiles, as pointwise.h has them. Each step of the inner loop
// loads a vector of kOuterRows rows of g and of kOuterColumns rows of x, for the products of each
// of the ones with each of the others; a tile's vectors of sums then shrink to their totals.
#pragma once

#include "careful_sum.h"

namespace sdan_fast {
namespace SDAN_ISA {

constexpr int kOuterRows = 4;
#if SDAN_IS_AVX512
constexpr int kOuterColumns = 4;
#elif SDAN_IS_AVX2
constexpr int kOuterColumns = 3;
#else
constexpr int kOuterColumns = 2;
#endif

// sums[i] += the lanes of r[i], added up as a tree.
SDAN_INLINE void add_lanes(const Vec (&r)[kOuterRows], float* sums) {
#if SDAN_IS_AVX512 || SDAN_IS_AVX2
  // Inside the 128-bit quarters first, until each of them holds one number of every vector.
#if SDAN_IS_AVX512
  const __m512 ab =
      _mm512_add_ps(_mm512_unpacklo_ps(r[0].v, r[1].v), _mm512_unpackhi_ps(r[0].v, r[1].v));
  const __m512 cd =
      _mm512_add_ps(_mm512_unpacklo_ps(r[2].v, r[3].v), _mm512_unpackhi_ps(r[2].v, r[3].v));
  const __m512 all =
      _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#else
  const __m256 ab =
      _mm256_add_ps(_mm256_unpacklo_ps(r[0].v, r[1].v), _mm256_unpackhi_ps(r[0].v, r[1].v));
  const __m256 cd =
      _mm256_add_ps(_mm256_unpacklo_ps(r[2].v, r[3].v), _mm256_unpackhi_ps(r[2].v, r[3].v));
  const __m256 halves =
      _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
#endif
  const __m128 total = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), total));
#else
  for (int i = 0; i < kOuterRows; ++i) sums[i] += hsum(r[i]);
#endif
}

SDAN_INLINE int outer_blocks(int co) {
  return (co + kOuterRows - 1) / kOuterRows;
}

// Floats of the sums of co x ci products: ci x kOuterRows for each block of rows.
SDAN_INLINE int64_t outer_floats(int co, int ci) {
  return static_cast<int64_t>(outer_blocks(co)) * ci * kOuterRows;
}

// Where among them the sum of rows o and i is.
SDAN_INLINE int64_t outer_index(int ci, int o, int i) {
  return (static_cast<int64_t>(o / kOuterRows) * ci + i) * kOuterRows + o % kOuterRows;
}

// sums[k * kOuterRows + m] += gs[m] xs[k] over `vecs` vectors.
template <int C>
static void outer_block(const float* const (&gs)[kOuterRows], const float* x, ptrdiff_t x_stride,
                        int vecs, float* sums) {
  Vec acc[C][kOuterRows];
#pragma GCC unroll 4
  for (int k = 0; k < C; ++k) {
#pragma GCC unroll 4
    for (int m = 0; m < kOuterRows; ++m) acc[k][m] = zero();
  }
  const ptrdiff_t end = static_cast<ptrdiff_t>(vecs) * kLanes;
  for (ptrdiff_t at = 0; at < end; at += kLanes) {
    Vec in[C];
#pragma GCC unroll 4
    for (int k = 0; k < C; ++k) {
      Vec v = load(x + k * x_stride + at);
      pin(v);
      in[k] = v;
    }
#pragma GCC unroll 4
    for (int m = 0; m < kOuterRows; ++m) {
      Vec row = load(gs[m] + at);
      pin(row);
#pragma GCC unroll 4
      for (int k = 0; k < C; ++k) acc[k][m] = fma(row, in[k], acc[k][m]);
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < C; ++k) add_lanes(acc[k], sums + k * kOuterRows);
}

// sums[o][i] += sum over `vecs` vectors of g[o] x[i], placed as outer_index says.
static inline void outer_product(const float* g, ptrdiff_t g_stride, int co, const float* x,
                                 ptrdiff_t x_stride, int ci, int vecs, float* sums) {
  for (int o = 0; o < co; o += kOuterRows) {
    // Rows past the last one repeat it; nobody reads their sums.
    const float* gs[kOuterRows];
    for (int m = 0; m < kOuterRows; ++m) gs[m] = g + (o + m < co ? o + m : co - 1) * g_stride;
    int i = 0;
    for (; i + kOuterColumns <= ci; i += kOuterColumns, sums += kOuterColumns * kOuterRows) {
      outer_block<kOuterColumns>(gs, x + i * x_stride, x_stride, vecs, sums);
    }
    for (; i < ci; ++i, sums += kOuterRows) {
      outer_block<1>(gs, x + i * x_stride, x_stride, vecs, sums);
    }
  }
}

// sums[c], with what it is off by in sums[rows + c], += the sum of `vecs` vectors of row c: the
// gradient of a bias.
static inline void row_totals(const float* g, ptrdiff_t stride, int rows, int vecs, float* sums) {
  for (int c = 0; c < rows; ++c, g += stride) {
    CarefulSum row;
    row.add_row(g, static_cast<int64_t>(vecs) * kLanes);
    const double total =
        static_cast<double>(sums[c]) + static_cast<double>(sums[rows + c]) + row.total();
    sums[c] = static_cast<float>(total);
    sums[rows + c] = static_cast<float>(total - static_cast<double>(sums[c]));
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
