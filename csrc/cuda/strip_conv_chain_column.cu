// Launches of conv_column, vertical strips of contiguous tensors.
#include "strip_launch.h"

namespace sdan_fast::cuda {

void launch_column(const StripPass& s, const StripPlan& plan) {
  with_taps<3, 5, 7, 9, 11, 13, 17, 19, 21, 23, 31, 35, 0>(plan.taps, [&](auto k) {
    launch("conv_column", conv_column_kernel<decltype(k)::value, false>, plan.config, s.x, s.y,
           plan.p);
  });
}

}  // namespace sdan_fast::cuda
