// Launches of conv_mma_last, 16-bit squares of channels_last tensors on tensor cores.
#include "conv_launch.h"

namespace sdan_fast::cuda {

void launch_conv_mma_last(DType dtype, const ConvArguments& a, const LastProductPlan& plan) {
  const auto run = [&](auto element, auto tile) {
    using T = decltype(element);
    using Tile = decltype(tile);
    if (plan.k != Tile::K || plan.d != Tile::D || plan.r != Tile::R || plan.j != Tile::J) return;
    launch("conv_mma_last", conv_mma_last_kernel<T, Tile::K, Tile::D, Tile::R, Tile::J>,
           plan.config, static_cast<const T*>(a.x), static_cast<const T*>(a.weight),
           static_cast<const T*>(a.bias), static_cast<T*>(a.y), plan.p);
  };
  const auto instances = [&](auto element) {
    with_bands([&](auto band) {
      using B = decltype(band);
      if constexpr (B::kTaps > 3) with_last_tiles<B>([&](auto tile) { run(element, tile); });
    });
  };
  if (dtype == DType::kBFloat16)
    instances(bfloat16{});
  else
    instances(float16{});
}

}  // namespace sdan_fast::cuda
