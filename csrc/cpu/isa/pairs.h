// Tiles of bfloat16 pairs, for processors that multiply and add two of them at once (AVX512-BF16):
// each 32-bit lane of a row holds two channels of one pixel, the even one in the lower half.
//
// The instruction is written as assembly, so that the AVX-512 units need no flag of their own for
// it and share their loops with float32; it runs only where Pointwise says `pairs`, and so does
// make_pairs (vec.h).
#pragma once

#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

#if SDAN_IS_AVX512
constexpr bool kHasPairs = true;

// c + both products of each lane, summed in float32.
SDAN_INLINE Vec dot_pairs(Vec a, Vec b, Vec c) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(c.v) : "v"(a.v), "v"(b.v));
  return c;
}

// Of numbers that are bfloat16 already; n of each, the odd ones zero unless `both`.
SDAN_INLINE Vec load_pairs(const bfloat16* even, const bfloat16* odd, int n, bool both) {
  const __m512i first = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(lane_mask(n), even));
  const __m256i second = _mm256_maskz_loadu_epi16(lane_mask(both ? n : 0), odd);
  return {_mm512_castsi512_ps(
      _mm512_permutexvar_epi16(pair_order(), _mm512_inserti64x4(first, second, 1)))};
}

#else
constexpr bool kHasPairs = false;

SDAN_INLINE Vec dot_pairs(Vec, Vec, Vec c) {
  return c;
}
SDAN_INLINE Vec make_pairs(Vec even, Vec) {
  return even;
}
#endif

struct MultiplyAdd {
  static SDAN_INLINE Vec first(Vec a, Vec b) { return a * b; }
  static SDAN_INLINE Vec add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

struct MultiplyPairs {
  static SDAN_INLINE Vec first(Vec a, Vec b) { return dot_pairs(a, b, zero()); }
  static SDAN_INLINE Vec add(Vec a, Vec b, Vec c) { return dot_pairs(a, b, c); }
};

// Rows of a tile of so many channels.
SDAN_INLINE int tile_rows(int channels, bool pairs) {
  return pairs ? (channels + 1) / 2 : channels;
}

#if SDAN_IS_AVX512
// The same of n pixels of planes of bfloat16, `plane` elements apart, zeros up to a whole vector.
static inline void load_pairs(const bfloat16* x, ptrdiff_t plane, int channels, int64_t n,
                              float* out, ptrdiff_t out_stride) {
  for (int c = 0; c < channels; c += 2, x += 2 * plane, out += out_stride) {
    const bool both = c + 1 < channels;
    for (int64_t i = 0; i < n; i += kLanes) {
      const int lanes = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
      store(out + i, load_pairs(x + i, both ? x + plane + i : x + i, lanes, both));
    }
  }
}
#endif

// out[r] = channels 2 r and 2 r + 1 of x; an odd last one is paired with zero. May be in place.
static inline void pack_pairs(const float* x, ptrdiff_t stride, int channels, int vecs, float* out,
                              ptrdiff_t out_stride) {
  int c = 0;
  for (; c + 2 <= channels; c += 2, x += 2 * stride, out += out_stride) {
    for (int v = 0; v < vecs; ++v) {
      store(out + v * kLanes, make_pairs(load(x + v * kLanes), load(x + stride + v * kLanes)));
    }
  }
  if (c == channels) return;
  for (int v = 0; v < vecs; ++v) store(out + v * kLanes, make_pairs(load(x + v * kLanes), zero()));
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
