// Launches of conv_column, vertical strips of contiguous tensors.
#include "strip_launch.h"

namespace sdan_fast::cuda {

void launch_column(const StripPass& s, const StripPlan& plan) {
  launch_columns<false>(s, plan);
}

}  // namespace sdan_fast::cuda
