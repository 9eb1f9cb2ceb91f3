// The entry points of layer_norm2d's backward kernel. With z = (x - mean) rstd at each pixel:
// grad_x = rstd (w g - mean_c(w g) - z mean_c(w g z)), and over all pixels grad_weight = sum g z,
// grad_bias = sum g.
#pragma once

#include "../dispatch.h"

namespace sdan_fast {

struct LayerNormBackwardArgs {
  const void* grad;
  const void* x;
  const void* weight;
  void* grad_x;       // nullptr if it is not wanted
  float* partial;     // [part][2][c]: sums of g z and of g; nullptr if neither is wanted
  void* grad_weight;  // nullptr if it is not wanted
  void* grad_bias;    // nullptr if it is not wanted
  DType dtype;
  bool channels_last;
  int64_t c;
  int64_t pixels;  // of one image for NCHW, of the batch for channels_last
  int64_t tile;    // pixels of a tile
  int64_t tiles;   // of one image (NCHW) or of the batch (channels_last)
  int64_t all_tiles;
  int64_t part;  // tiles of a part, whose sums are added up in float32
  int64_t parts;
  float eps;
};

}  // namespace sdan_fast

// Parts [begin, end): grad_x of their pixels, and their sums.
SDAN_DECLARE_KERNEL(layer_norm2d_backward_run, const ::sdan_fast::LayerNormBackwardArgs& args,
                    int64_t begin, int64_t end)
// grad_weight and grad_bias from the sums of all parts.
SDAN_DECLARE_KERNEL(layer_norm2d_backward_sum, const ::sdan_fast::LayerNormBackwardArgs& args)
