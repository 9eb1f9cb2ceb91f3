// The gradients of the star in one pass over dense memory.
#include "star_backward.h"

#include <type_traits>

#include "star_gradients.h"
#include "star_types.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

template <typename T, Activation A, bool kOuter>
void run(const StarBackwardArgs& args, int64_t begin, int64_t end) {
  const T* grad = static_cast<const T*>(args.grad);
  const T* a = static_cast<const T*>(args.a);
  const T* b = static_cast<const T*>(args.b);
  T* grad_a = static_cast<T*>(args.grad_a);
  T* grad_b = static_cast<T*>(args.grad_b);
  constexpr bool kShort = !std::is_same_v<T, float>;
  int64_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    Vec x[2], y[2], g[2];
    load_two(a + i, x[0], x[1]);
    load_two(b + i, y[0], y[1]);
    load_two(grad + i, g[0], g[1]);
    star_gradients<A, kOuter, kShort>(x, y, g, args.outer);
    if (grad_a != nullptr) store_two(grad_a + i, x[0], x[1]);
    if (grad_b != nullptr) store_two(grad_b + i, g[0], g[1]);
  }
  for (; i < end; i += kLanes) {
    const int n = end - i < kLanes ? static_cast<int>(end - i) : kLanes;
    Vec x[1] = {load_n(a + i, n)};
    const Vec y[1] = {load_n(b + i, n)};
    Vec g[1] = {load_n(grad + i, n)};
    star_gradients<A, kOuter, kShort>(x, y, g, args.outer);
    if (grad_a != nullptr) store_n(grad_a + i, x[0], n);
    if (grad_b != nullptr) store_n(grad_b + i, g[0], n);
  }
}

}  // namespace

void star_backward_run(const StarBackwardArgs& args, int64_t begin, int64_t end) {
  by_star_types(args, [&](auto t, auto activation, auto outer) {
    run<decltype(t), decltype(activation)::value, decltype(outer)::value>(args, begin, end);
  });
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
