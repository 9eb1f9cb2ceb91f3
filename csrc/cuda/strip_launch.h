// What the strip_conv_chain_*.cu files share: one file per kernel family, so that they compile at
// the same time.
#pragma once

#include "conv_launch.h"
#include "strip_plan.h"

namespace sdan_fast::cuda {

void launch_row(const StripPass& s, const StripPlan& plan);
void launch_column(const StripPass& s, const StripPlan& plan);
void launch_column_last(const StripPass& s, const StripPlan& plan);

// Calls f with the taps that have a kernel of their own, or 0, as a std::integral_constant.
template <typename F>
void with_strip_taps(int taps, F&& f) {
  with_taps<3, 5, 7, 9, 11, 13, 17, 19, 21, 23, 31, 35, 0>(taps, f);
}

// Both families of conv_column, of which each has a file.
template <bool Last>
void launch_columns(const StripPass& s, const StripPlan& plan) {
  const Strip &a = s.strip[0], &b = s.strip[1];
  with_strip_taps(plan.taps, [&](auto k) {
    launch("conv_column", conv_column_kernel<decltype(k)::value, Last>, plan.config, s.x, a.weight,
           a.bias, b.weight, b.bias, s.edge.bias, s.edge.weight, s.gate, s.y, plan.p);
  });
}

}  // namespace sdan_fast::cuda
