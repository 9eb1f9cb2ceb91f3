// The entry point of the star's backward kernel: with s = activation(a) and g' = grad outer'(s b),
// grad_a = g' b activation'(a) and grad_b = g' s, over dense memory.
#pragma once

#include "../dispatch.h"

namespace sdan_fast {

struct StarBackwardArgs {
  const void* grad;
  const void* a;
  const void* b;
  void* grad_a;  // nullptr if it is not wanted
  void* grad_b;  // nullptr if it is not wanted
  DType dtype;
  Activation activation;
  Activation outer;
};

}  // namespace sdan_fast

// Elements [begin, end) of the buffers, which share one memory order.
SDAN_DECLARE_KERNEL(star_backward_run, const ::sdan_fast::StarBackwardArgs& args, int64_t begin,
                    int64_t end)
