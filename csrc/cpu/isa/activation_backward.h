// Every activation together with its derivative.
//
// At the kinks, and where an input is infinite or NaN, the derivatives are PyTorch's: zero at 0 of
// ReLU and at both bounds of ReLU6, one where the input of these is NaN; NaN at the infinities of
// GELU and SiLU.
#pragma once

#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

// The parts of P(X > u) = (e num rden) 2^n of the standard normal, 0 <= u <= 30: e 2^n is
// exp(-u^2/2), num rden a rational form of the scaled complementary error function (relative error
// 5e-9 on [0, 13]). V vectors step by step together: one alone is a chain of some forty dependent
// instructions, longer than a processor's scheduler overlaps.
template <int V>
SDAN_INLINE void normal_tail_parts(const Vec (&u)[V], Vec (&e)[V], Vec (&n)[V], Vec (&num)[V],
                                   Vec (&rden)[V]) {
  Vec f[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const Vec w = u[v] * u[v];
    const Vec scale = set1(-0.72134752044448170f);  // -log2(e) / 2
    n[v] = round_to_int(w * scale);
    f[v] = fma(w, scale, zero() - n[v]);
  }
  fill(e, 1.5345812425948679e-4f);
  horner(e, f, 1.3399930903688073e-3f);
  horner(e, f, 9.6184890717267990e-3f);
  horner(e, f, 5.5503286421298981e-2f);
  horner(e, f, 2.4022646248340607e-1f);
  horner(e, f, 6.9314718246459961e-1f);
  horner(e, f, 1.0f);
  fill(num, 3.9943475276231766e-3f);
  horner(num, u, 3.9808746427297592e-2f);
  horner(num, u, 1.8078389763832092e-1f);
  horner(num, u, 4.3497607111930847e-1f);
  horner(num, u, 0.5f);
  fill(rden, 1.0012194514274597e-2f);
  horner(rden, u, 9.9793381989002228e-2f);
  horner(rden, u, 4.6300050616264343e-1f);
  horner(rden, u, 1.1923052072525024f);
  horner(rden, u, 1.6678370237350464f);
  horner(rden, u, 1.0f);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) rden[v] = reciprocal(rden[v]);
}

// For u >= 0: e = exp(-u^2/2), r = Q(u) exp(u^2/2), with Q the normal distribution's upper tail. r
// is zero from 8.25 on, where Q counts as zero, about as the definition's own 1 + erf(-u / sqrt 2)
// is zero in float64. u phi(u) does not: e reaches to the denormals.
template <int V>
SDAN_INLINE void gaussian_and_tail(const Vec (&u)[V], Vec (&e)[V], Vec (&r)[V]) {
  Vec t[V], n[V], num[V], rden[V];
  // At the stand-in e underflows, and before.
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) t[v] = select_lt(u[v], set1(14.5f), u[v], set1(30.0f));
  normal_tail_parts(t, e, n, num, rden);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    e[v] = scale_by_pow2(e[v], n[v]);
    r[v] = select_lt(t[v], set1(8.25f), num[v] * rden[v], zero());
  }
}

// p * 2^-n, n in the lowest bits of t = n + 1.5 * 2^23; for normal results.
SDAN_INLINE Vec scale_down(Vec p, Vec t) {
#if SDAN_IS_AVX512
  return {_mm512_castsi512_ps(
      _mm512_sub_epi32(_mm512_castps_si512(p.v), _mm512_slli_epi32(_mm512_castps_si512(t.v), 23)))};
#elif SDAN_IS_AVX2
  return {_mm256_castsi256_ps(
      _mm256_sub_epi32(_mm256_castps_si256(p.v), _mm256_slli_epi32(_mm256_castps_si256(t.v), 23)))};
#else
  return {from_int_bits(to_int_bits(p.lo) - (to_int_bits(t.lo) << 23)),
          from_int_bits(to_int_bits(p.hi) - (to_int_bits(t.hi) << 23))};
#endif
}

// The same for results that end up in 16 bits: relative errors 3e-6 and 1.3e-5, and e zero from
// 13.1 on, where it is below 6e-38.
template <int V>
SDAN_INLINE void gaussian_and_tail_short(const Vec (&u)[V], Vec (&e)[V], Vec (&r)[V]) {
  Vec t[V], f[V], n[V], num[V], den[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    t[v] = min(set1(13.1f), u[v]);
    const Vec w = t[v] * t[v];
    const Vec scale = set1(0.72134752044448170f);  // log2(e) / 2
    // Adding 1.5 * 2^23 leaves the integer in the lowest bits.
    n[v] = fma(w, scale, set1(12582912.0f));
    f[v] = fnma(w, scale, n[v] - set1(12582912.0f));
  }
  fill(e, 9.57013e-3f);
  horner(e, f, 5.591793e-2f);
  horner(e, f, 2.4024745e-1f);
  horner(e, f, 6.931218e-1f);
  horner(e, f, 9.9999926e-1f);
  fill(num, 5.704901040e-2f);
  horner(num, t, 2.648119601e-1f);
  horner(num, t, 5.000062264e-1f);
  fill(den, 1.426583080e-1f);
  horner(den, t, 6.713635723e-1f);
  horner(den, t, 1.327928007f);
  horner(den, t, 1.0f);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    e[v] = select_lt(u[v], set1(13.1f), scale_down(e[v], n[v]), zero());
    r[v] = select_lt(u[v], set1(8.25f), num[v] * reciprocal(den[v]), zero());
  }
}

// x = GELU(x) = x Phi(x), d = GELU'(x) = Phi(x) + x phi(x). With u = |x|: Phi(-u) = Q(u) = e r, and
// GELU'(-u) = Q(u) - u phi(u) = e (r - u / sqrt(2 pi)), which keeps its relative error in the tail;
// GELU'(u) = 1 - GELU'(-u).
template <bool kShort, int V>
SDAN_INLINE void gelu_with_derivative(Vec (&x)[V], Vec (&d)[V]) {
  Vec e[V], r[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) d[v] = abs(x[v]);
  if constexpr (kShort) {
    gaussian_and_tail_short(d, e, r);
  } else {
    gaussian_and_tail(d, e, r);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const Vec q = e[v] * r[v];
    // Zero times infinity makes NaN, as it does in PyTorch.
    const Vec below = e[v] * fnma(d[v], set1(0.39894228040143268f), r[v]);
    d[v] = select_lt(x[v], zero(), below, set1(1.0f) - below);
    x[v] = x[v] * select_lt(x[v], zero(), q, set1(1.0f) - q);
  }
}

// x = A(x), d = A'(x), V vectors step by step together; kShort is for what ends up in 16 bits.
template <Activation A, bool kShort, int V>
SDAN_INLINE void activate_with_derivative(Vec (&x)[V], Vec (&d)[V]) {
  const Vec one = set1(1.0f);
  if constexpr (A == Activation::kGelu) {
    gelu_with_derivative<kShort>(x, d);
    return;
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    if constexpr (A == Activation::kRelu6) {
      d[v] = select_le(x[v], zero(), zero(), select_le(set1(6.0f), x[v], zero(), one));
      x[v] = relu6(x[v]);
    } else if constexpr (A == Activation::kRelu) {
      d[v] = select_le(x[v], zero(), zero(), one);
      x[v] = relu(x[v]);
    } else if constexpr (A == Activation::kSilu) {
      const Vec s = one / (one + exp(zero() - x[v]));
      d[v] = s * fma(x[v], one - s, one);
      x[v] = x[v] * s;
    } else {
      d[v] = one;
    }
  }
}

// g A'(x), given d = A'(x). A kink's derivative selects: g may be infinite where it is zero.
template <Activation A>
SDAN_INLINE Vec times_derivative(Vec g, Vec d) {
  if constexpr (A == Activation::kNone) return g;
  if constexpr (A == Activation::kRelu6 || A == Activation::kRelu) {
    return select_le(d, zero(), zero(), g);
  }
  return g * d;
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
