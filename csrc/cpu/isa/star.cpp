// The star, outer(activation(a) * b), vectorized over dense memory.
#include "star.h"

#include "activate.h"
#include "star_types.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

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

}  // namespace

void star_run(const StarArgs& args, int64_t begin, int64_t end) {
  by_star_types(args, [&](auto t, auto activation, auto outer) {
    run<decltype(t), decltype(activation)::value, decltype(outer)::value>(args, begin, end);
  });
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
