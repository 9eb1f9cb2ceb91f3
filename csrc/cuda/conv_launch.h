// What the depthwise_conv2d_*.cu files share: one file per kernel family, so that they compile at
// the same time.
#pragma once

#include <type_traits>

#include "conv_plan.h"

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

// Wide accesses: every row of every tensor begins at a multiple of 16 bytes.
inline bool wide_rows(DType dtype, const ConvShape& s, const void* a, const void* b) {
  const int64_t per = dtype == DType::kFloat32 ? 4 : 8;
  return s.w % per == 0 && aligned(a, 16) && aligned(b, 16);
}

void launch_conv_square(const ConvArguments& a, const ConvPlan& plan);
void launch_conv_last(DType dtype, const ConvArguments& a, const ConvShape& shape, bool flip,
                      Stream stream);

}  // namespace sdan_fast::cuda
