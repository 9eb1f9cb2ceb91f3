// The star, outer(activation(a) * b), vectorized over dense memory.
#include "star.h"

#include "by_dtype.h"
#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

SDAN_INLINE Vec activate_switch(Activation a, Vec x) {
  switch (a) {
    case Activation::kGelu:
      return gelu(x);
    case Activation::kRelu6:
      return relu6(x);
    case Activation::kRelu:
      return relu(x);
    case Activation::kSilu:
      return silu(x);
    default:
      return x;
  }
}

// The activation is a template parameter; the outer one, rare, is a well-predicted branch per
// vector.
template <typename T, Activation A, bool kOuter>
void run(const StarArgs& args, int64_t begin, int64_t end) {
  const T* a = static_cast<const T*>(args.a);
  const T* b = static_cast<const T*>(args.b);
  T* y = static_cast<T*>(args.y);
  int64_t i = begin;
  if constexpr (A == Activation::kGelu) {
    constexpr int V = SDAN_IS_AVX512 ? 4 : 2;
    for (; i + V * kLanes <= end; i += V * kLanes) {
      Vec v[V];
#pragma GCC unroll 4
      for (int k = 0; k < V; ++k) v[k] = load(a + i + k * kLanes);
      gelu(v);
#pragma GCC unroll 4
      for (int k = 0; k < V; ++k) v[k] = v[k] * load(b + i + k * kLanes);
      if constexpr (kOuter) {
        if (args.outer == Activation::kGelu) {
          gelu(v);
        } else {
#pragma GCC unroll 4
          for (int k = 0; k < V; ++k) v[k] = activate_switch(args.outer, v[k]);
        }
      }
#pragma GCC unroll 4
      for (int k = 0; k < V; ++k) store(y + i + k * kLanes, v[k]);
    }
  }
  for (; i + kLanes <= end; i += kLanes) {
    Vec v = activate<A>(load(a + i)) * load(b + i);
    if constexpr (kOuter) v = activate_switch(args.outer, v);
    store(y + i, v);
  }
  if (i < end) {
    const int n = static_cast<int>(end - i);
    Vec v = activate<A>(load_n(a + i, n)) * load_n(b + i, n);
    if constexpr (kOuter) v = activate_switch(args.outer, v);
    store_n(y + i, v, n);
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
