// Launches of conv_mma_last, 16-bit squares of channels_last tensors on tensor cores.
#include "conv_launch.h"

namespace sdan_fast::cuda {

void launch_conv_mma_last(DType dtype, const ConvArguments& a, const LastProductPlan& plan) {
  const auto run = [&](auto element, auto band, auto j) {
    using T = decltype(element);
    using B = decltype(band);
    if (plan.k != B::kTaps || plan.d != B::kDilation || plan.j != decltype(j)::value) return;
    launch("conv_mma_last", conv_mma_last_kernel<T, B::kTaps, B::kDilation, decltype(j)::value>,
           plan.config, static_cast<const T*>(a.x), static_cast<const T*>(a.weight),
           static_cast<const T*>(a.bias), static_cast<T*>(a.y), plan.p);
  };
  const auto instances = [&](auto element) {
    with_bands([&](auto band) {
      if constexpr (decltype(band)::kTaps > 3) {
        run(element, band, std::integral_constant<int, 2>{});
        run(element, band, std::integral_constant<int, 4>{});
      }
    });
  };
  if (dtype == DType::kBFloat16)
    instances(bfloat16{});
  else
    instances(float16{});
}

}  // namespace sdan_fast::cuda
