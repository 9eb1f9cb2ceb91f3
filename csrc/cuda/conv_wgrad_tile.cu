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
      // SDAN's dilations are compiled in.
      const auto square = [&](auto k, auto d) {
        constexpr int K = decltype(k)::value, D = decltype(d)::value;
        plan.p.dw == D&& plan.p.dh == D ? run(wgrad_tile_kernel<T, true, K, K, D>)
                                        : run(wgrad_tile_kernel<T, true, K, K>);
      };
      constexpr std::integral_constant<int, 1> one;
      if (plan.outer == 3) return square(std::integral_constant<int, 3>{}, one);
      const auto squares = [&](auto k) {
        constexpr std::integral_constant<int, (decltype(k)::value + 1) / 2> dilation;
        plan.p.dw == 1 ? square(k, one) : square(k, dilation);
      };
      if (plan.outer == 5) return squares(std::integral_constant<int, 5>{});
      if (plan.outer == 7) return squares(std::integral_constant<int, 7>{});
      if (plan.outer == 9) return squares(std::integral_constant<int, 9>{});
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
