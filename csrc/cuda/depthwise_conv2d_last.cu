// Launches of conv_last, the channels_last tensors.
#include "conv_launch.h"

namespace sdan_fast::cuda {

void launch_conv_last(DType dtype, const ConvArguments& a, const ConvShape& shape, bool flip,
                      Stream stream) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto v, auto k, LastPlan plan) {
      plan.p.flip = flip;
      plan.config.stream = stream;
      launch("conv_last", conv_last_kernel<T, decltype(k)::value, decltype(v)::value>, plan.config,
             static_cast<const T*>(a.x), static_cast<const T*>(a.weight),
             static_cast<const T*>(a.bias), static_cast<T*>(a.y), plan.p);
    };
    const LastPlan& plan = plan_last<4>(dtype, shape);
    const size_t bytes = 4 * sizeof(T);
    if (plan.fits && shape.c % 4 == 0 && aligned(a.x, bytes) && aligned(a.y, bytes))
      with_taps<3, 5, 7, 9, 1>(plan.k,
                               [&](auto k) { run(std::integral_constant<int, 4>{}, k, plan); });
    else
      run(std::integral_constant<int, 1>{}, std::integral_constant<int, 1>{},
          plan_last<1>(dtype, shape));
  });
}

}  // namespace sdan_fast::cuda
