// Every activation together with its derivative.
//
// At the kinks, and where an input is infinite or NaN, the derivatives are PyTorch's: zero at 0 of
// ReLU and at both bounds of ReLU6, one where the input of these is NaN; NaN at the infinities of
// GELU and SiLU.
#pragma once

#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

// x = GELU(x) = x Phi(x), d = GELU'(x) = Phi(x) + x phi(x). With u = |x| and Q = 1 - Phi:
// GELU'(-u) = Q(u) - u phi(u) = exp(-u^2/2) (r(u) - u / sqrt(2 pi)), r(u) = Q(u) exp(u^2/2), which
// keeps its relative error in the tail, and GELU'(u) = 1 - GELU'(-u).
template <int V>
SDAN_INLINE void gelu_with_derivative(Vec (&x)[V], Vec (&d)[V]) {
  Vec u[V], e[V], n[V], num[V], rden[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    d[v] = abs(x[v]);
    // exp(-u^2/2) underflows there, and at the stand-in too.
    u[v] = select_lt(d[v], set1(14.5f), d[v], set1(30.0f));
  }
  normal_tail_parts(u, e, n, num, rden);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    e[v] = scale_by_pow2(e[v], n[v]);
    // Q is zero from 8.25 on: normal_tail says why. u phi(u) is not, and reaches to the denormals.
    const Vec r = select_lt(u[v], set1(8.25f), num[v] * rden[v], zero());
    const Vec q = e[v] * r;
    // Of the magnitude itself, so that zero times infinity makes NaN.
    const Vec below = e[v] * fnma(d[v], set1(0.39894228040143268f), r);
    d[v] = select_lt(x[v], zero(), below, set1(1.0f) - below);
    x[v] = x[v] * select_lt(x[v], zero(), q, set1(1.0f) - q);
  }
}

// x = A(x), d = A'(x), V vectors step by step together.
template <Activation A, int V>
SDAN_INLINE void activate_with_derivative(Vec (&x)[V], Vec (&d)[V]) {
  const Vec one = set1(1.0f);
  if constexpr (A == Activation::kGelu) {
    gelu_with_derivative(x, d);
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
