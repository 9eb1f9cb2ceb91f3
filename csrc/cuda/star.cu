// Launches of the star's kernels.
#include "star.cuh"

#include <algorithm>

#include "launch.h"

namespace sdan_fast::cuda {
namespace {

// Enough blocks that no thread loops, up to a cap that keeps the index arithmetic of huge tensors
// in the loop.
Config configure(int64_t n, int per_thread, Stream stream) {
  Config c;
  c.block = dim3(kStarThreads);
  c.grid = dim3(static_cast<unsigned>(
      std::clamp<int64_t>(ceil_div(n, int64_t{kStarThreads} * per_thread), 1, int64_t{1} << 20)));
  c.stream = stream;
  return c;
}

}  // namespace

void star_forward(DType dtype, const void* a, const void* b, void* y, int64_t n, int activation,
                  int outer, Stream stream) {
  if (n == 0) return;
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = 16 / sizeof(T);
    const auto *ta = static_cast<const T*>(a), *tb = static_cast<const T*>(b);
    auto* ty = static_cast<T*>(y);
    if (aligned(a, 16) && aligned(b, 16) && aligned(y, 16))
      launch("star_forward", star_forward_kernel<T, kWide>, configure(n, kWide, stream), ta, tb, ty,
             n, activation, outer);
    else
      launch("star_forward", star_forward_kernel<T, 1>, configure(n, 1, stream), ta, tb, ty, n,
             activation, outer);
  });
}

void star_backward(DType dtype, const void* grad, const void* a, const void* b, void* grad_a,
                   void* grad_b, int64_t n, int activation, int outer, Stream stream) {
  if (n == 0 || (!grad_a && !grad_b)) return;
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = 16 / sizeof(T);
    const auto *tg = static_cast<const T*>(grad), *ta = static_cast<const T*>(a),
               *tb = static_cast<const T*>(b);
    auto *ga = static_cast<T*>(grad_a), *gb = static_cast<T*>(grad_b);
    if (aligned(grad, 16) && aligned(a, 16) && aligned(b, 16) && aligned(grad_a, 16) &&
        aligned(grad_b, 16))
      launch("star_backward", star_backward_kernel<T, kWide>, configure(n, kWide, stream), tg, ta,
             tb, ga, gb, n, activation, outer);
    else
      launch("star_backward", star_backward_kernel<T, 1>, configure(n, 1, stream), tg, ta, tb, ga,
             gb, n, activation, outer);
  });
}

}  // namespace sdan_fast::cuda
