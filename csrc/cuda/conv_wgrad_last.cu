// Launches of wgrad_last.
#include "conv_wgrad.cuh"

#include "wgrad_launch.h"

namespace sdan_fast::cuda {

void launch_wgrad_last(DType dtype, const WgradArguments& a, const WgradLastPlan& plan) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kPair = is_16bit<T> ? 2 : 1;
    const auto run = [&](auto kernel) {
      launch("wgrad_last", kernel, plan.config, static_cast<const T*>(a.grad),
             static_cast<const T*>(a.x), a.partial, plan.p);
    };
    if (plan.taps_outer == 3) return run(wgrad_last_kernel<T, kPair, 3, 3>);
    if (plan.taps_outer == 5 && plan.taps == 5) return run(wgrad_last_kernel<T, kPair, 5, 5>);
    if (plan.taps_outer == 7) return run(wgrad_last_kernel<T, kPair, 7, 7>);
    if (plan.taps_outer == 5) return run(wgrad_last_kernel<T, kPair, 9, 5>);
    const bool more = plan.taps == kMoreGradTaps;
    if constexpr (is_16bit<T>)
      if (plan.vector == 4)
        return more ? run(wgrad_last_kernel<T, 4, kMoreGradTaps, 1>)
                    : run(wgrad_last_kernel<T, 4, kGradTaps, 1>);
    if (plan.vector == kPair)
      more ? run(wgrad_last_kernel<T, kPair, kMoreGradTaps, 1>)
           : run(wgrad_last_kernel<T, kPair, kGradTaps, 1>);
    else
      more ? run(wgrad_last_kernel<T, 1, kMoreGradTaps, 1>)
           : run(wgrad_last_kernel<T, 1, kGradTaps, 1>);
  });
}

}  // namespace sdan_fast::cuda
