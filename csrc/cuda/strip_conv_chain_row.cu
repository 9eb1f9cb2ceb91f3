// Launches of conv_row, horizontal strips of contiguous tensors.
#include "strip_launch.h"

namespace sdan_fast::cuda {

void launch_row(const StripPass& s, const StripPlan& plan) {
  const Strip &a = s.strip[0], &b = s.strip[1];
  with_strip_taps(plan.taps, [&](auto k) {
    launch("conv_row", conv_row_kernel<decltype(k)::value>, plan.config, s.x, a.weight, a.bias,
           b.weight, b.bias, s.y, plan.p);
  });
}

}  // namespace sdan_fast::cuda
