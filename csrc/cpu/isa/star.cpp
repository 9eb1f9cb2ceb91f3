// The star, outer(activation(a) * b), vectorized over dense memory.
#include "star.h"

#include "by_dtype.h"
#include "gelu_short.h"
#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

// GELU in place, V vectors step by step together.
template <int V>
SDAN_INLINE void gelu_all(Vec (&x)[V]) {
  Vec low[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) low[v] = min(x[v], zero());
  gelu_short<5>(x);
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

// outer(activation(v) * b) in place. The activation is a template parameter; the outer one, rare,
// is a well-predicted branch.
template <Activation A, bool kOuter, int V>
SDAN_INLINE void star_all(Vec (&v)[V], const Vec (&b)[V], Activation outer) {
  activate_all<A>(v);
#pragma GCC unroll 4
  for (int k = 0; k < V; ++k) v[k] = v[k] * b[k];
  if constexpr (kOuter) activate_switch(outer, v);
}

template <typename T, Activation A, bool kOuter>
void run(const StarArgs& args, int64_t begin, int64_t end) {
  const T* a = static_cast<const T*>(args.a);
  const T* b = static_cast<const T*>(args.b);
  T* y = static_cast<T*>(args.y);
  constexpr int V = A == Activation::kGelu && SDAN_IS_AVX512 ? 4 : 2;
  int64_t i = begin;
  for (; i + V * kLanes <= end; i += V * kLanes) {
    Vec v[V], w[V];
#pragma GCC unroll 2
    for (int k = 0; k < V; k += 2) {
      load_two(a + i + k * kLanes, v[k], v[k + 1]);
      load_two(b + i + k * kLanes, w[k], w[k + 1]);
    }
    star_all<A, kOuter>(v, w, args.outer);
#pragma GCC unroll 2
    for (int k = 0; k < V; k += 2) store_two(y + i + k * kLanes, v[k], v[k + 1]);
  }
  for (; i < end; i += kLanes) {
    const int n = end - i < kLanes ? static_cast<int>(end - i) : kLanes;
    Vec v[1] = {load_n(a + i, n)};
    const Vec w[1] = {load_n(b + i, n)};
    star_all<A, kOuter>(v, w, args.outer);
    store_n(y + i, v[0], n);
  }
}

template <typename T, Activation A>
void run_outer(const StarArgs& args, int64_t begin, int64_t end) {
  if (args.outer == Activation::kNone) {
    run<T, A, false>(args, begin, end);
  } else {
    run<T, A, true>(args, begin, end);
  }
}

template <typename T>
void run_activation(const StarArgs& args, int64_t begin, int64_t end) {
  switch (args.activation) {
    case Activation::kGelu:
      return run_outer<T, Activation::kGelu>(args, begin, end);
    case Activation::kRelu6:
      return run_outer<T, Activation::kRelu6>(args, begin, end);
    case Activation::kRelu:
      return run_outer<T, Activation::kRelu>(args, begin, end);
    case Activation::kSilu:
      return run_outer<T, Activation::kSilu>(args, begin, end);
    default:
      return run_outer<T, Activation::kNone>(args, begin, end);
  }
}

}  // namespace

void star_run(const StarArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto t) { run_activation<decltype(t)>(args, begin, end); });
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
