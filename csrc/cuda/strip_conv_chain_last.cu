// Launches of conv_column, horizontal and vertical strips of channels_last tensors.
#include "strip_launch.h"

namespace sdan_fast::cuda {

void launch_column_last(const StripPass& s, const StripPlan& plan) {
  launch_columns<true>(s, plan);
}

}  // namespace sdan_fast::cuda
