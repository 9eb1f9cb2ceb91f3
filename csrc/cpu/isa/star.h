// The entry point of the star's kernel: y = outer(activation(a) * b) over dense memory.
#pragma once

#include "../dispatch.h"

namespace sdan_fast {

struct StarArgs {
  const void* a;
  const void* b;
  void* y;
  DType dtype;
  Activation activation;
  Activation outer;
};

}  // namespace sdan_fast

// Elements [begin, end) of the three buffers, which share one memory order.
SDAN_DECLARE_KERNEL(star_run, const ::sdan_fast::StarArgs& args, int64_t begin, int64_t end)
