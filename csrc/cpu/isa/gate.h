// A row of the gate as the first step of another sweep.
#pragma once

#include "band.h"

namespace sdan_fast {
namespace SDAN_ISA {

// Columns that gate_row asks for ahead of those that it works on: enough for the memory to answer,
// few enough to be still in the second-level cache. The caller asks for the first ones of a row.
constexpr int64_t kGateAhead = 2 * kBlock;

// Asks for what pixels [x, x + n) of row y read and write.
void gate_prefetch(const GatePlan& plan, int64_t image, int64_t y, int64_t x, int64_t n,
                   PrefetchQueue* queue);

// Row y of a plan that projects, written to `row` as well: its channels `stride` floats apart,
// whole vectors. `scratch` as for gate_run.
void gate_row(const GatePlan& plan, int64_t image, int64_t y, void* scratch, float* row,
              ptrdiff_t stride);

}  // namespace SDAN_ISA
}  // namespace sdan_fast
