// The entry point of the arithmetic yardstick: nothing but multiply-adds on registers.
#pragma once

#include "../dispatch.h"

// Runs `rounds` rounds and writes something that depends on all of them to *sink. A round is
// sdan_fast::kFmaRoundFlops floating-point operations on every instruction set.
SDAN_DECLARE_KERNEL(fma_loop, int64_t rounds, float* sink)

namespace sdan_fast {

constexpr int kFmaRoundFlops = 2 * 16 * 12 * 4;

}  // namespace sdan_fast
