// The entry points of pointwise_gate's kernel: y = u * (1x1 convolution of x).
#pragma once

#include "../dispatch.h"

namespace sdan_fast {

struct PointwiseGateArgs {
  const void* u;
  const void* x;
  const void* weight;  // (Co, Ci)
  const void* bias;    // nullptr if there is none
  void* y;
  float* packed;  // weights and bias as the kernel reads them, written by pointwise_gate_pack
  DType dtype;
  bool channels_last;
  bool pairs;  // multiply pairs of bfloat16 (isa/pairs.h): of channels_last images with an even ci
  int64_t ci, co;
  int64_t pixels;  // of one image for NCHW, of the batch for channels_last
  int64_t tile;    // pixels of a task
  int64_t tiles;   // tasks of one image (NCHW) or of the batch (channels_last)
};

// Floats of PointwiseGateArgs::packed that are enough for every instruction set.
inline int64_t pointwise_gate_packed_floats(int64_t ci, int64_t co) {
  return (co + 16) * (ci + 2) + 64;
}

}  // namespace sdan_fast

SDAN_DECLARE_KERNEL(pointwise_gate_pack, const ::sdan_fast::PointwiseGateArgs& args)
// Tasks [begin, end): tiles of consecutive pixels.
SDAN_DECLARE_KERNEL(pointwise_gate_run, const ::sdan_fast::PointwiseGateArgs& args, int64_t begin,
                    int64_t end)
