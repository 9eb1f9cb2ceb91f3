// Launches of conv_column, the K x 1 strips of contiguous tensors.
#include "conv_launch.h"

namespace sdan_fast::cuda {

void launch_conv_column(const ConvArguments& a, const ConvPlan& plan) {
  with_taps<3, 5, 7, 9, 11, 13, 17, 19, 21, 23, 31, 35>(plan.p.kh, [&](auto k) {
    launch("conv_column", conv_column_kernel<decltype(k)::value>, plan.config, a.x, a.weight,
           a.bias, a.y, plan.p);
  });
}

}  // namespace sdan_fast::cuda
