// What the depthwise_conv2d_*.cu files share: one file per kernel family, so that they compile at
// the same time.
#pragma once

#include <type_traits>

#include "conv_plan.h"
#include "square_plan.h"

namespace sdan_fast::cuda {

struct ConvArguments {
  const void *x, *weight, *bias;
  void* y;
};

// Calls f with std::integral_constant<int, K> for the K of the list that equals `taps`, else for
// the last of the list.
template <int First, int... Rest, typename F>
void with_taps(int taps, F&& f) {
  if constexpr (sizeof...(Rest) == 0) {
    f(std::integral_constant<int, First>{});
  } else {
    if (taps == First) return f(std::integral_constant<int, First>{});
    with_taps<Rest...>(taps, f);
  }
}

void launch_conv_square(const ConvArguments& a, const SquarePlan& plan);
void launch_conv_last(DType dtype, const ConvArguments& a, const ConvShape& shape, bool flip,
                      Stream stream);

}  // namespace sdan_fast::cuda
