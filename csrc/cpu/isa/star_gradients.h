// The gradients of the star for vectors in registers.
#pragma once

#include "activation_backward.h"

namespace sdan_fast {
namespace SDAN_ISA {

// g = g A'(x).
template <Activation A, bool kShort, int V>
SDAN_INLINE void chain(Vec (&g)[V], Vec (&x)[V]) {
  Vec d[V];
  activate_with_derivative<A, kShort>(x, d);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) g[v] = times_derivative<A>(g[v], d[v]);
}

template <bool kShort, int V>
SDAN_INLINE void chain_switch(Activation a, Vec (&g)[V], Vec (&x)[V]) {
  switch (a) {
    case Activation::kGelu:
      return chain<Activation::kGelu, kShort>(g, x);
    case Activation::kRelu6:
      return chain<Activation::kRelu6, kShort>(g, x);
    case Activation::kRelu:
      return chain<Activation::kRelu, kShort>(g, x);
    case Activation::kSilu:
      return chain<Activation::kSilu, kShort>(g, x);
    default:
      return;
  }
}

// From a, b and grad to grad_a in `a` and grad_b in `g`. The activation is a template parameter;
// the outer one, rare, is a well-predicted branch.
template <Activation A, bool kOuter, bool kShort, int V>
SDAN_INLINE void star_gradients(Vec (&a)[V], const Vec (&b)[V], Vec (&g)[V], Activation outer) {
  Vec d[V];
  activate_with_derivative<A, kShort>(a, d);
  if constexpr (kOuter) {
    Vec product[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) product[v] = a[v] * b[v];
    chain_switch<kShort>(outer, g, product);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const Vec s = a[v];
    a[v] = times_derivative<A>(g[v] * b[v], d[v]);
    g[v] = g[v] * s;
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
