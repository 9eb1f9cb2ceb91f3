// Launches of conv_mma, 16-bit squares on tensor cores.
#include "conv_launch.h"

namespace sdan_fast::cuda {

void launch_conv_mma(DType dtype, const ConvArguments& a, const ProductPlan& plan) {
  const auto run = [&](auto element, auto band, auto r) {
    using T = decltype(element);
    using B = decltype(band);
    if (plan.k != B::kTaps || plan.d != B::kDilation || plan.r != decltype(r)::value) return;
    launch("conv_mma", conv_mma_kernel<T, B::kTaps, B::kDilation, decltype(r)::value>, plan.config,
           static_cast<const T*>(a.x), static_cast<const T*>(a.weight),
           static_cast<const T*>(a.bias), static_cast<T*>(a.y), plan.p);
  };
  const auto instances = [&](auto element) {
    with_bands([&](auto band) {
      run(element, band, std::integral_constant<int, 1>{});
      run(element, band, std::integral_constant<int, 3>{});
    });
  };
  if (dtype == DType::kBFloat16)
    instances(bfloat16{});
  else
    instances(float16{});
}

}  // namespace sdan_fast::cuda
