// One vector of float32 lanes per instruction set, with the storage conversions and the
// activations.
//
// Include it only from sources compiled with -DSDAN_ISA=avx512|avx2|portable. Everything here lives
// in the namespace of that instruction set, so units of different sets never share a symbol.
// Operands of min and max follow x86: if either is NaN the second one is returned, so max(zero(),
// x) keeps NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../dispatch.h"

#ifndef SDAN_ISA
#error "compile with -DSDAN_ISA=avx512, avx2 or portable"
#endif

#define SDAN_ISA_ID_portable 1
#define SDAN_ISA_ID_avx2 2
#define SDAN_ISA_ID_avx512 3
#define SDAN_ISA_CAT2(a, b) a##b
#define SDAN_ISA_CAT(a, b) SDAN_ISA_CAT2(a, b)
#define SDAN_ISA_ID SDAN_ISA_CAT(SDAN_ISA_ID_, SDAN_ISA)
#define SDAN_IS_AVX512 (SDAN_ISA_ID == 3)
#define SDAN_IS_AVX2 (SDAN_ISA_ID == 2)
#define SDAN_IS_PORTABLE (SDAN_ISA_ID == 1)

#if SDAN_IS_AVX512 || SDAN_IS_AVX2
// GCC before 13 takes the header's own undefined vectors for uninitialized ones.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define SDAN_INLINE inline __attribute__((always_inline))

namespace sdan_fast {
namespace SDAN_ISA {

// ---- scalars
// -------------------------------------------------------------------------------------

SDAN_INLINE float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

SDAN_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

SDAN_INLINE float to_float(float v) {
  return v;
}

SDAN_INLINE float to_float(bfloat16 v) {
  return bits_to_float(static_cast<uint32_t>(v.bits) << 16);
}

SDAN_INLINE float to_float(float16 v) {
  const uint32_t magnitude = v.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  uint32_t out;
  if (magnitude >= 0x7c00u) {
    out = 0x7f800000u | (magnitude << 13);  // inf, NaN
  } else if (magnitude >= 0x0400u) {
    out = (magnitude << 13) + 0x38000000u;
  } else {
    // Subnormal: magnitude * 2^-24 is exact in float32.
    out = float_to_bits(static_cast<float>(magnitude) * 5.9604644775390625e-8f);
  }
  return bits_to_float(out | sign);
}

template <typename T>
SDAN_INLINE T from_float(float v);

template <>
SDAN_INLINE float from_float<float>(float v) {
  return v;
}

template <>
SDAN_INLINE bfloat16 from_float<bfloat16>(float v) {
  const uint32_t u = float_to_bits(v);
  if (v != v) return bfloat16{static_cast<uint16_t>((u >> 16) | 0x0040u)};
  return bfloat16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

template <>
SDAN_INLINE float16 from_float<float16>(float v) {
  const uint32_t u = float_to_bits(v);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t out;
  if (magnitude > 0x7f800000u) {
    out = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x47800000u) {
    out = 0x7c00u;  // 2^16 and above
  } else if (magnitude < 0x38800000u) {
    // Subnormal or zero: adding 0.5 makes the hardware round at the right bit.
    out = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    const uint32_t odd = (magnitude >> 13) & 1u;
    out = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
  }
  return float16{static_cast<uint16_t>(out | sign)};
}

// ---- vectors
// -------------------------------------------------------------------------------------

// One bit for each lane. load_lanes(p, lanes) reads those lanes of p and no other memory; the
// others are zero.
using LaneBits = uint16_t;

#if SDAN_IS_AVX512

constexpr int kLanes = 16;

struct Vec {
  __m512 v;
};

SDAN_INLINE __mmask16 lane_mask(int n) {
  return static_cast<__mmask16>((1u << n) - 1u);
}

SDAN_INLINE Vec zero() {
  return {_mm512_setzero_ps()};
}
SDAN_INLINE Vec set1(float x) {
  return {_mm512_set1_ps(x)};
}
SDAN_INLINE Vec load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
SDAN_INLINE Vec load_n(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(lane_mask(n), p)};
}
SDAN_INLINE Vec load_lanes(const float* p, LaneBits lanes) {
  return {_mm512_maskz_loadu_ps(lanes, p)};
}
SDAN_INLINE void store(float* p, Vec a) {
  _mm512_storeu_ps(p, a.v);
}
SDAN_INLINE void store_n(float* p, Vec a, int n) {
  _mm512_mask_storeu_ps(p, lane_mask(n), a.v);
}

SDAN_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
SDAN_INLINE Vec fnma(Vec a, Vec b, Vec c) {
  return {_mm512_fnmadd_ps(a.v, b.v, c.v)};
}
SDAN_INLINE Vec operator+(Vec a, Vec b) {
  return {_mm512_add_ps(a.v, b.v)};
}
SDAN_INLINE Vec operator-(Vec a, Vec b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
SDAN_INLINE Vec operator*(Vec a, Vec b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
SDAN_INLINE Vec operator/(Vec a, Vec b) {
  return {_mm512_div_ps(a.v, b.v)};
}
SDAN_INLINE Vec min(Vec a, Vec b) {
  return {_mm512_min_ps(a.v, b.v)};
}
SDAN_INLINE Vec max(Vec a, Vec b) {
  return {_mm512_max_ps(a.v, b.v)};
}
SDAN_INLINE Vec abs(Vec a) {
  return {_mm512_abs_ps(a.v)};
}
SDAN_INLINE Vec sqrt(Vec a) {
  return {_mm512_sqrt_ps(a.v)};
}
SDAN_INLINE float hsum(Vec a) {
  return _mm512_reduce_add_ps(a.v);
}

// 1/a to about one unit in the last place, for finite normal a.
SDAN_INLINE Vec reciprocal(Vec a) {
  const __m512 r = _mm512_rcp14_ps(a.v);
  return {_mm512_mul_ps(r, _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(2.0f)))};
}

// The last kLanes - S lanes of a, then the first S of `after`.
template <int S>
SDAN_INLINE Vec lanes_from(Vec a, Vec after) {
  return {_mm512_castsi512_ps(
      _mm512_alignr_epi32(_mm512_castps_si512(after.v), _mm512_castps_si512(a.v), S))};
}
// Lanes moved up by one, the last of `before` coming in below.
SDAN_INLINE Vec lanes_right(Vec before, Vec a) {
  return lanes_from<kLanes - 1>(before, a);
}
// Lanes moved down by one, the first of `after` coming in above.
SDAN_INLINE Vec lanes_left(Vec a, Vec after) {
  return lanes_from<1>(a, after);
}

// a < b ? x : y
SDAN_INLINE Vec select_lt(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
// a <= b ? x : y
SDAN_INLINE Vec select_le(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ), y.v, x.v)};
}

// p * 2^n for integral n; exact to the denormals, overflows to inf.
SDAN_INLINE Vec scale_by_pow2(Vec p, Vec n) {
  return {_mm512_scalef_ps(p.v, n.v)};
}

SDAN_INLINE Vec round_to_int(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

SDAN_INLINE Vec from_bf16_bits(__m256i b) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16))};
}

// Where the processor has the instructions (AVX512-BF16) they round, a vector at once instead of in
// eight steps; they take denormal numbers for zero. Written as assembly, so that these units need
// no flag of their own for them.

// Words of one half of a vector and of the other, in turn.
SDAN_INLINE __m512i pair_order() {
  return _mm512_set_epi32(0x001f000f, 0x001e000e, 0x001d000d, 0x001c000c, 0x001b000b, 0x001a000a,
                          0x00190009, 0x00180008, 0x00170007, 0x00160006, 0x00150005, 0x00140004,
                          0x00130003, 0x00120002, 0x00110001, 0x00100000);
}

// The even ones in the lower halves of the lanes, the odd ones above.
SDAN_INLINE Vec make_pairs(Vec even, Vec odd) {
  __m512i both;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(odd.v), "v"(even.v));
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(pair_order(), both))};
}

// The bits that bfloat16 keeps, rounded to nearest even, in each lane's upper half.
SDAN_INLINE __m512i rounded_to_bf16(Vec a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x00400000));
}

SDAN_INLINE __m256i to_bf16_bits(Vec a) {
  if (rounds_bf16) {
    __m256i rounded;
    asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(a.v));
    return rounded;
  }
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_to_bf16(a), 16));
}

SDAN_INLINE Vec load(const bfloat16* p) {
  return from_bf16_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SDAN_INLINE Vec load_n(const bfloat16* p, int n) {
  return from_bf16_bits(_mm256_maskz_loadu_epi16(lane_mask(n), p));
}
SDAN_INLINE Vec load_lanes(const bfloat16* p, LaneBits lanes) {
  return from_bf16_bits(_mm256_maskz_loadu_epi16(lanes, p));
}
SDAN_INLINE void store(bfloat16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16_bits(a));
}
SDAN_INLINE void store_n(bfloat16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, lane_mask(n), to_bf16_bits(a));
}
SDAN_INLINE void load_split(const bfloat16* p, Vec& even, Vec& odd) {
  const __m512i both = _mm512_loadu_si512(p);
  even = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))};
  odd = {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)))};
}
SDAN_INLINE void store_split(bfloat16* p, Vec even, Vec odd) {
  if (rounds_bf16) {
    _mm512_storeu_ps(p, make_pairs(even, odd).v);
    return;
  }
  const __m512i low = _mm512_srli_epi32(rounded_to_bf16(even), 16);
  // The odd ones' high halves over it.
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, low, rounded_to_bf16(odd)));
}
SDAN_INLINE Vec load(const float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
SDAN_INLINE Vec load_n(const float16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lane_mask(n), p))};
}
SDAN_INLINE Vec load_lanes(const float16* p, LaneBits lanes) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p))};
}
SDAN_INLINE void store(float16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SDAN_INLINE void store_n(float16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, lane_mask(n),
                           _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif SDAN_IS_AVX2

constexpr int kLanes = 8;

struct Vec {
  __m256 v;
};

SDAN_INLINE __m256i lane_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

SDAN_INLINE Vec zero() {
  return {_mm256_setzero_ps()};
}
SDAN_INLINE Vec set1(float x) {
  return {_mm256_set1_ps(x)};
}
SDAN_INLINE Vec load(const float* p) {
  return {_mm256_loadu_ps(p)};
}
SDAN_INLINE Vec load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, lane_mask(n))};
}
SDAN_INLINE Vec load_lanes(const float* p, LaneBits lanes) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return {_mm256_maskload_ps(
      p, _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(lanes), bit), bit))};
}
SDAN_INLINE void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.v);
}
SDAN_INLINE void store_n(float* p, Vec a, int n) {
  _mm256_maskstore_ps(p, lane_mask(n), a.v);
}

SDAN_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
SDAN_INLINE Vec fnma(Vec a, Vec b, Vec c) {
  return {_mm256_fnmadd_ps(a.v, b.v, c.v)};
}
SDAN_INLINE Vec operator+(Vec a, Vec b) {
  return {_mm256_add_ps(a.v, b.v)};
}
SDAN_INLINE Vec operator-(Vec a, Vec b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
SDAN_INLINE Vec operator*(Vec a, Vec b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
SDAN_INLINE Vec operator/(Vec a, Vec b) {
  return {_mm256_div_ps(a.v, b.v)};
}
SDAN_INLINE Vec min(Vec a, Vec b) {
  return {_mm256_min_ps(a.v, b.v)};
}
SDAN_INLINE Vec max(Vec a, Vec b) {
  return {_mm256_max_ps(a.v, b.v)};
}
SDAN_INLINE Vec abs(Vec a) {
  return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)};
}
SDAN_INLINE Vec sqrt(Vec a) {
  return {_mm256_sqrt_ps(a.v)};
}
SDAN_INLINE float hsum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

SDAN_INLINE Vec reciprocal(Vec a) {
  return {_mm256_div_ps(_mm256_set1_ps(1.0f), a.v)};
}

// alignr works within halves: the middle is what stands between them.
SDAN_INLINE Vec lanes_right(Vec before, Vec a) {
  const __m256i middle = _mm256_castps_si256(_mm256_permute2f128_ps(before.v, a.v, 0x21));
  return {_mm256_castsi256_ps(_mm256_alignr_epi8(_mm256_castps_si256(a.v), middle, 12))};
}
SDAN_INLINE Vec lanes_left(Vec a, Vec after) {
  const __m256i middle = _mm256_castps_si256(_mm256_permute2f128_ps(a.v, after.v, 0x21));
  return {_mm256_castsi256_ps(_mm256_alignr_epi8(middle, _mm256_castps_si256(a.v), 4))};
}

SDAN_INLINE Vec select_lt(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
SDAN_INLINE Vec select_le(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ))};
}

SDAN_INLINE Vec scale_by_pow2(Vec p, Vec n) {
  // Two factors, since 2^n itself may lie outside the normal range. The clamp keeps both inside it.
  n = min(set1(254.0f), max(set1(-252.0f), n));
  const __m256i i = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(i, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i rest = _mm256_sub_epi32(i, half);
  const __m256 s1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 s2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(p.v, s1), s2)};
}

SDAN_INLINE Vec round_to_int(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

SDAN_INLINE Vec from_bf16_bits(__m128i b) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16))};
}

// The bits that bfloat16 keeps, rounded to nearest even, in each lane's upper half.
SDAN_INLINE __m256i rounded_to_bf16(Vec a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x00400000));
  const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  return _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(r), _mm256_castsi256_ps(quiet), nan));
}

SDAN_INLINE __m128i to_bf16_bits(Vec a) {
  const __m256i h = _mm256_srli_epi32(rounded_to_bf16(a), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}

SDAN_INLINE Vec load(const bfloat16* p) {
  return from_bf16_bits(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SDAN_INLINE void store(bfloat16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16_bits(a));
}
SDAN_INLINE void load_split(const bfloat16* p, Vec& even, Vec& odd) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-65536)))};
}
SDAN_INLINE void store_split(bfloat16* p, Vec even, Vec odd) {
  const __m256i low = _mm256_srli_epi32(rounded_to_bf16(even), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_blend_epi16(low, rounded_to_bf16(odd), 0xaa));
}
SDAN_INLINE Vec load(const float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
SDAN_INLINE void store(float16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else  // portable

constexpr int kLanes = 8;

// Two four-lane vectors: what SSE2 and NEON have, and no more than the plain ABI can pass around.
typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct Vec {
  Float4 lo, hi;
};

SDAN_INLINE Vec zero() {
  return {Float4{0, 0, 0, 0}, Float4{0, 0, 0, 0}};
}
SDAN_INLINE Vec set1(float x) {
  return {Float4{x, x, x, x}, Float4{x, x, x, x}};
}
SDAN_INLINE Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.lo, p, 16);
  std::memcpy(&a.hi, p + 4, 16);
  return a;
}
SDAN_INLINE void store(float* p, Vec a) {
  std::memcpy(p, &a.lo, 16);
  std::memcpy(p + 4, &a.hi, 16);
}
SDAN_INLINE Vec load_n(const float* p, int n) {
  float t[kLanes] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
}
SDAN_INLINE void store_n(float* p, Vec a, int n) {
  float t[kLanes];
  store(t, a);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}

SDAN_INLINE Vec operator+(Vec a, Vec b) {
  return {a.lo + b.lo, a.hi + b.hi};
}
SDAN_INLINE Vec operator-(Vec a, Vec b) {
  return {a.lo - b.lo, a.hi - b.hi};
}
SDAN_INLINE Vec operator*(Vec a, Vec b) {
  return {a.lo * b.lo, a.hi * b.hi};
}
SDAN_INLINE Vec operator/(Vec a, Vec b) {
  return {a.lo / b.lo, a.hi / b.hi};
}
SDAN_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return a * b + c;
}
SDAN_INLINE Vec fnma(Vec a, Vec b, Vec c) {
  return c - a * b;
}
SDAN_INLINE Vec select_lt(Vec a, Vec b, Vec x, Vec y) {
  return {a.lo < b.lo ? x.lo : y.lo, a.hi < b.hi ? x.hi : y.hi};
}
SDAN_INLINE Vec select_le(Vec a, Vec b, Vec x, Vec y) {
  return {a.lo <= b.lo ? x.lo : y.lo, a.hi <= b.hi ? x.hi : y.hi};
}
SDAN_INLINE Vec min(Vec a, Vec b) {
  return select_lt(a, b, a, b);
}
SDAN_INLINE Vec max(Vec a, Vec b) {
  return select_lt(b, a, a, b);
}
SDAN_INLINE Float4 from_int_bits(Int4 i) {
  return reinterpret_cast<Float4>(i);
}
SDAN_INLINE Int4 to_int_bits(Float4 f) {
  return reinterpret_cast<Int4>(f);
}
SDAN_INLINE Vec abs(Vec a) {
  const Int4 m = Int4{} + 0x7fffffff;
  return {from_int_bits(to_int_bits(a.lo) & m), from_int_bits(to_int_bits(a.hi) & m)};
}
SDAN_INLINE Vec sqrt(Vec a) {
  float t[kLanes];
  store(t, a);
  for (int i = 0; i < kLanes; ++i) t[i] = __builtin_sqrtf(t[i]);
  return load(t);
}
SDAN_INLINE float hsum(Vec a) {
  const Float4 s = a.lo + a.hi;
  return (s[0] + s[2]) + (s[1] + s[3]);
}
SDAN_INLINE Vec reciprocal(Vec a) {
  return set1(1.0f) / a;
}
SDAN_INLINE Vec lanes_right(Vec before, Vec a) {
  return {Float4{before.hi[3], a.lo[0], a.lo[1], a.lo[2]},
          Float4{a.lo[3], a.hi[0], a.hi[1], a.hi[2]}};
}
SDAN_INLINE Vec lanes_left(Vec a, Vec after) {
  return {Float4{a.lo[1], a.lo[2], a.lo[3], a.hi[0]},
          Float4{a.hi[1], a.hi[2], a.hi[3], after.lo[0]}};
}

// Round to nearest through the bits of 1.5 * 2^23; exact for |a| < 2^22, all that is asked of it
// here.
SDAN_INLINE Vec round_to_int(Vec a) {
  const Vec magic = set1(12582912.0f);
  return (a + magic) - magic;
}

SDAN_INLINE Float4 pow2_of(Int4 i) {
  return from_int_bits((i + 127) << 23);
}
SDAN_INLINE Float4 scale_half(Float4 p, Float4 n) {
  const Int4 i = __builtin_convertvector(n, Int4);
  const Int4 half = i >> 1;
  return (p * pow2_of(half)) * pow2_of(i - half);
}
SDAN_INLINE Vec scale_by_pow2(Vec p, Vec n) {
  n = min(set1(254.0f), max(set1(-252.0f), n));
  return {scale_half(p.lo, n.lo), scale_half(p.hi, n.hi)};
}

template <typename T>
SDAN_INLINE Vec load_converted(const T* p) {
  float t[kLanes];
  for (int i = 0; i < kLanes; ++i) t[i] = to_float(p[i]);
  return load(t);
}
template <typename T>
SDAN_INLINE void store_converted(T* p, Vec a) {
  float t[kLanes];
  store(t, a);
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(t[i]);
}
SDAN_INLINE Vec load(const bfloat16* p) {
  return load_converted(p);
}
SDAN_INLINE void store(bfloat16* p, Vec a) {
  store_converted(p, a);
}
SDAN_INLINE Vec load(const float16* p) {
  return load_converted(p);
}
SDAN_INLINE void store(float16* p, Vec a) {
  store_converted(p, a);
}

#endif

// 2 kLanes neighbours in two vectors: in order, or those of bfloat16 in even and odd places, each
// then a shift or a mask of what is loaded, where there are integer vectors. What is computed lane
// by lane may take either.
template <typename T>
SDAN_INLINE void load_two(const T* p, Vec& a, Vec& b) {
#if !SDAN_IS_PORTABLE
  if constexpr (std::is_same_v<T, bfloat16>) {
    load_split(p, a, b);
    return;
  }
#endif
  a = load(p);
  b = load(p + kLanes);
}
template <typename T>
SDAN_INLINE void store_two(T* p, Vec a, Vec b) {
#if !SDAN_IS_PORTABLE
  if constexpr (std::is_same_v<T, bfloat16>) {
    store_split(p, a, b);
    return;
  }
#endif
  store(p, a);
  store(p + kLanes, b);
}

#if !SDAN_IS_AVX512
// The 16-bit tails go through a small buffer: AVX2 has no masked 16-bit moves.
template <typename T>
SDAN_INLINE Vec load_n16(const T* p, int n) {
  T t[kLanes] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
}
template <typename T>
SDAN_INLINE void store_n16(T* p, Vec a, int n) {
  T t[kLanes];
  store(t, a);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}
SDAN_INLINE Vec load_n(const bfloat16* p, int n) {
  return load_n16(p, n);
}
SDAN_INLINE void store_n(bfloat16* p, Vec a, int n) {
  store_n16(p, a, n);
}
SDAN_INLINE Vec load_n(const float16* p, int n) {
  return load_n16(p, n);
}
SDAN_INLINE void store_n(float16* p, Vec a, int n) {
  store_n16(p, a, n);
}
template <typename T>
SDAN_INLINE Vec load_lanes(const T* p, LaneBits lanes) {
  T t[kLanes] = {};
  for (int i = 0; i < kLanes; ++i) {
    if ((lanes >> i & 1) != 0) t[i] = p[i];
  }
  return load(t);
}
#endif

// Keeps a loaded vector in its register: GCC else folds the load into each of its uses, and the
// repeated unaligned loads, not the multiply-adds, then bind.
#if SDAN_IS_AVX512
SDAN_INLINE void pin(Vec& a) {
  asm("" : "+v"(a.v));
}
#elif SDAN_IS_AVX2
SDAN_INLINE void pin(Vec& a) {
  asm("" : "+x"(a.v));
}
#else
SDAN_INLINE void pin(Vec&) {}
#endif

// ---- functions
// -----------------------------------------------------------------------------------

// 2^f for f in [-0.5, 0.5], relative error 2e-9 before rounding.
SDAN_INLINE Vec exp2_fraction(Vec f) {
  Vec p = set1(1.5345812425948679e-4f);
  p = fma(p, f, set1(1.3399930903688073e-3f));
  p = fma(p, f, set1(9.6184890717267990e-3f));
  p = fma(p, f, set1(5.5503286421298981e-2f));
  p = fma(p, f, set1(2.4022646248340607e-1f));
  p = fma(p, f, set1(6.9314718246459961e-1f));
  return fma(p, f, set1(1.0f));
}

// 2^x over all of float32, NaN excepted: 0 below, inf above.
SDAN_INLINE Vec exp2(Vec x) {
  x = min(set1(300.0f), max(set1(-300.0f), x));
  const Vec n = round_to_int(x);
  return scale_by_pow2(exp2_fraction(x - n), n);
}

// e^x over all of float32, NaN excepted; relative error about 1e-7 where the result is normal.
SDAN_INLINE Vec exp(Vec x) {
  x = min(set1(200.0f), max(set1(-200.0f), x));
  const Vec n = round_to_int(x * set1(1.44269504088896341f));
  // x - n ln 2 in two steps: the first product is exact, the high part having few bits.
  Vec r = fnma(n, set1(0.693359375f), x);
  r = fnma(n, set1(-2.12194440054690583e-4f), r);
  return scale_by_pow2(exp2_fraction(r * set1(1.44269504088896341f)), n);
}

// One step of Horner's scheme for V vectors at once.
template <int V>
SDAN_INLINE void horner(Vec (&p)[V], const Vec (&x)[V], float coefficient) {
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) p[v] = fma(p[v], x[v], set1(coefficient));
}

template <int V>
SDAN_INLINE void fill(Vec (&p)[V], float value) {
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) p[v] = set1(value);
}

SDAN_INLINE Vec relu(Vec x) {
  return max(zero(), x);
}
SDAN_INLINE Vec relu6(Vec x) {
  return min(set1(6.0f), max(zero(), x));
}

// x / (1 + e^-x); the addend keeps NaN.
SDAN_INLINE Vec silu(Vec x) {
  return x / (set1(1.0f) + exp(zero() - x));
}

template <Activation A>
SDAN_INLINE Vec activate(Vec x) {
  if constexpr (A == Activation::kRelu6) return relu6(x);
  if constexpr (A == Activation::kRelu) return relu(x);
  if constexpr (A == Activation::kSilu) return silu(x);
  return x;
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
