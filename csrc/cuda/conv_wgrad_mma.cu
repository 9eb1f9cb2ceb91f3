// Launches of wgrad_mma.
#include "conv_wgrad_mma.cuh"

#include "wgrad_launch.h"

namespace sdan_fast::cuda {
namespace {

template <typename T, size_t At = 0>
void launch_pairs(const WgradArguments& a, const MmaPlan& plan) {
  if constexpr (At < std::size(kMmaPairs)) {
    constexpr int kPairs = kMmaPairs[At];
    if (plan.pairs != kPairs) return launch_pairs<T, At + 1>(a, plan);
    launch("wgrad_mma", wgrad_mma_kernel<T, mma_units(kPairs), kPairs>, plan.config,
           static_cast<const T*>(a.grad), static_cast<const T*>(a.x), a.partial, plan.p);
  }
}

}  // namespace

void launch_wgrad_mma(DType dtype, const WgradArguments& a, const MmaPlan& plan) {
  if (dtype == DType::kBFloat16)
    launch_pairs<bfloat16>(a, plan);
  else
    launch_pairs<float16>(a, plan);
}

}  // namespace sdan_fast::cuda
