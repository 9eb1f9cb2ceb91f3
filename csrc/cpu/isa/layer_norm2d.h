// The entry point of layer_norm2d's kernel: LayerNorm over the channels at each pixel.
#pragma once

#include "../dispatch.h"

namespace sdan_fast {

struct LayerNormArgs {
  const void* x;
  const void* weight;
  const void* bias;  // nullptr if there is none
  void* y;
  DType dtype;
  bool channels_last;
  int64_t c;
  int64_t pixels;  // of one image for NCHW, of the batch for channels_last
  int64_t tile;    // pixels of a task
  int64_t tiles;   // tasks of one image (NCHW) or of the batch (channels_last)
  float eps;
};

}  // namespace sdan_fast

// Tasks [begin, end): tiles of consecutive pixels.
SDAN_DECLARE_KERNEL(layer_norm2d_run, const ::sdan_fast::LayerNormArgs& args, int64_t begin,
                    int64_t end)
