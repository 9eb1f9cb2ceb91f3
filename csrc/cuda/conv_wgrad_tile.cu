// Launches of wgrad_tile.
#include "conv_wgrad.cuh"

#include "wgrad_launch.h"

namespace sdan_fast::cuda {

void launch_wgrad_tile(DType dtype, const WgradArguments& a, const TilePlan& plan) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto kernel) {
      launch("wgrad_tile", kernel, plan.config, static_cast<const T*>(a.grad),
             static_cast<const T*>(a.x), a.partial, plan.p);
    };
    const bool more = plan.inner == kMoreGradTaps;
    if constexpr (!is_16bit<T>) {
      if (plan.outer == 3) return run(wgrad_tile_kernel<T, true, 3, 3>);
      if (plan.outer == 5) return run(wgrad_tile_kernel<T, true, 5, 5>);
      if (plan.outer == 7) return run(wgrad_tile_kernel<T, true, 7, 7>);
      if (plan.outer == 9) return run(wgrad_tile_kernel<T, true, 9, 9>);
    }
    if (plan.vertical)
      more ? run(wgrad_tile_kernel<T, true, kMoreGradTaps, 1>)
           : run(wgrad_tile_kernel<T, true, kGradTaps, 1>);
    else
      more ? run(wgrad_tile_kernel<T, false, kMoreGradTaps, 1>)
           : run(wgrad_tile_kernel<T, false, kGradTaps, 1>);
  });
}

}  // namespace sdan_fast::cuda
