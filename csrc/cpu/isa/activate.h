// Activations in place, several vectors step by step together.
#pragma once

#include "gelu.h"
#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

template <int V>
SDAN_INLINE void gelu_all(Vec (&x)[V]) {
  Vec low[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) low[v] = min(x[v], zero());
  gelu<5>(x);
  // Of minus infinity it is NaN in PyTorch.
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) x[v] = fma(low[v], zero(), x[v]);
}

template <Activation A, int V>
SDAN_INLINE void activate_all(Vec (&x)[V]) {
  if constexpr (A == Activation::kGelu) {
    gelu_all(x);
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = activate<A>(x[v]);
  }
}

template <int V>
SDAN_INLINE void activate_switch(Activation a, Vec (&x)[V]) {
  switch (a) {
    case Activation::kGelu:
      return activate_all<Activation::kGelu>(x);
    case Activation::kRelu6:
      return activate_all<Activation::kRelu6>(x);
    case Activation::kRelu:
      return activate_all<Activation::kRelu>(x);
    case Activation::kSilu:
      return activate_all<Activation::kSilu>(x);
    default:
      return;
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
