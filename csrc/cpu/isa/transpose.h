// A square of kLanes x kLanes floats transposed in registers.
#pragma once

#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

#if SDAN_IS_AVX512

SDAN_INLINE void transpose(Vec (&r)[kLanes]) {
  // Pairs of rows, then pairs of pairs, inside the four 128-bit quarters; then the quarters
  // themselves.
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    u[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  // u[4 g + k] holds, in quarter q, column 4 q + k of rows 4 g .. 4 g + 3.
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m512 a = _mm512_shuffle_f32x4(u[k], u[4 + k], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(u[k], u[4 + k], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[8 + k], u[12 + k], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(u[8 + k], u[12 + k], 0xdd);
    r[k] = {_mm512_shuffle_f32x4(a, c, 0x88)};
    r[4 + k] = {_mm512_shuffle_f32x4(b, d, 0x88)};
    r[8 + k] = {_mm512_shuffle_f32x4(a, c, 0xdd)};
    r[12 + k] = {_mm512_shuffle_f32x4(b, d, 0xdd)};
  }
}

#elif SDAN_IS_AVX2

SDAN_INLINE void transpose(Vec (&r)[kLanes]) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    r[k] = {_mm256_permute2f128_ps(u[k], u[4 + k], 0x20)};
    r[4 + k] = {_mm256_permute2f128_ps(u[k], u[4 + k], 0x31)};
  }
}

#else

SDAN_INLINE void transpose(Vec (&r)[kLanes]) {
  float t[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) store(t[i], r[i]);
  for (int i = 0; i < kLanes; ++i) {
    float row[kLanes];
    for (int j = 0; j < kLanes; ++j) row[j] = t[j][i];
    r[i] = load(row);
  }
}

#endif

}  // namespace SDAN_ISA
}  // namespace sdan_fast
