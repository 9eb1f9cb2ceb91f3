// What the strip_conv_chain_*.cu files share: one file per kernel family, so that they compile at
// the same time.
#pragma once

#include "conv_launch.h"
#include "strip_plan.h"

namespace sdan_fast::cuda {

void launch_row(const StripPass& s, const StripPlan& plan);
void launch_column(const StripPass& s, const StripPlan& plan);
void launch_column_last(const StripPass& s, const StripPlan& plan);

}  // namespace sdan_fast::cuda
