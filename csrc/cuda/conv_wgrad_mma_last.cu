// Launches of wgrad_mma_last.
#include "conv_wgrad_mma_last.cuh"

#include "wgrad_launch.h"

namespace sdan_fast::cuda {

void launch_wgrad_mma_last(DType dtype, const WgradArguments& a, const GradProductPlan& plan) {
  const auto instances = [&](auto element) {
    using T = decltype(element);
    with_bands([&](auto band) {
      constexpr int K = decltype(band)::kTaps, D = decltype(band)::kDilation;
      if constexpr (K > 3) {
        if (plan.k != K || plan.d != D) return;
        launch("wgrad_mma_last", wgrad_mma_last_kernel<T, K, D>, plan.config,
               static_cast<const T*>(a.grad), static_cast<const T*>(a.x), a.partial, plan.p);
      }
    });
  };
  if (dtype == DType::kBFloat16)
    instances(bfloat16{});
  else
    instances(float16{});
}

}  // namespace sdan_fast::cuda
