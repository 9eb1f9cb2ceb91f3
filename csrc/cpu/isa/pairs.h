// Tiles of bfloat16 pairs, for processors that multiply and add two of them at once (AVX512-BF16):
// each 32-bit lane of a row holds two channels of one pixel, the even one in the lower half.
//
// The two instructions are written as assembly, so that the AVX-512 units need no flag of their own
// for them and share their loops with float32; they run only where Pointwise says `pairs`.
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

SDAN_INLINE Vec make_pairs(Vec even, Vec odd) {
  __m512i both;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(odd.v), "v"(even.v));
  const __m512i interleaved =
      _mm512_set_epi32(0x001f000f, 0x001e000e, 0x001d000d, 0x001c000c, 0x001b000b, 0x001a000a,
                       0x00190009, 0x00180008, 0x00170007, 0x00160006, 0x00150005, 0x00140004,
                       0x00130003, 0x00120002, 0x00110001, 0x00100000);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(interleaved, both))};
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
