// Scheduling the point-wise half of MM-LKA with what follows it, shared by mm_lka.cpu, rsdam.cpu
// and sdan.cpu.
#pragma once

#include "fused_host.h"

namespace sdan_fast {

inline void run_gate(const GatePlan& plan, int64_t images) {
  static const auto scratch_kernel = SDAN_PICK_KERNEL(gate_scratch);
  static const auto run_kernel = SDAN_PICK_KERNEL(gate_run);
  if (images == 0 || plan.height == 0 || plan.width == 0) return;
  int64_t bytes = 0;
  scratch_kernel(&plan, &bytes);
  const int64_t threads = threads_for(
      images * plan.height * plan.width *
      (multiply_adds(plan.gate) + multiply_adds(plan.project) + multiply_adds(plan.collect)));
  RegionGrid grid{images, plan.height, plan.width, 1, 1};
  if (images * plan.height < threads) grid.tiles = part_count(plan.width, threads, 64);
  const int64_t least = std::max<int64_t>(1, 640 / plan.width);
  run_rows(threads, grid.count(), plan.height, least, [&](int64_t part, int64_t y0, int64_t y1) {
    Region region = grid.at(part);
    region.y0 = y0;
    region.y1 = y1;
    run_kernel(&plan, &region, thread_scratch(static_cast<size_t>(bytes)));
  });
}

}  // namespace sdan_fast
