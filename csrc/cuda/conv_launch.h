// What the depthwise_conv2d_*.cu files share: one file per kernel family, so that they compile at
// the same time.
#pragma once

#include <type_traits>

#include "conv_plan.h"
#include "last_plan.h"
#include "product_plan.h"
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

// Whether every row of every tensor begins at a multiple of `elements`, and these at one of bytes.
inline bool aligned_rows(DType dtype, const ConvShape& s, const void* a, const void* b,
                         int64_t elements) {
  const size_t bytes = static_cast<size_t>(elements) * (dtype == DType::kFloat32 ? 4 : 2);
  return s.w % elements == 0 && aligned(a, bytes) && aligned(b, bytes);
}

// Wide accesses: every row of every tensor begins at a multiple of 16 bytes.
inline bool wide_rows(DType dtype, const ConvShape& s, const void* a, const void* b) {
  return aligned_rows(dtype, s, a, b, dtype == DType::kFloat32 ? 4 : 8);
}

void launch_conv_mma(DType dtype, const ConvArguments& a, const ProductPlan& plan);
void launch_conv_mma_last(DType dtype, const ConvArguments& a, const LastProductPlan& plan);
void launch_conv_square(const ConvArguments& a, const SquarePlan& plan);
void launch_conv_last(DType dtype, const ConvArguments& a, const ConvShape& shape, bool flip,
                      Stream stream);

}  // namespace sdan_fast::cuda
