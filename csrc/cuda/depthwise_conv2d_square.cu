// Launches of conv_square, contiguous tensors and every kernel size.
#include "conv_launch.h"

namespace sdan_fast::cuda {

void launch_conv_square(const ConvArguments& a, const ConvPlan& plan) {
  with_taps<3, 5, 7, 9, 1>(plan.p.kh, [&](auto k) {
    launch("conv_square", conv_square_kernel<decltype(k)::value>, plan.config, a.x, a.weight,
           a.bias, a.y, plan.p);
  });
}

}  // namespace sdan_fast::cuda
