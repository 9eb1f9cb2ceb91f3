// The entry point of strip_conv_chain's kernel.
#pragma once

#include "../dispatch.h"
#include "depthwise_conv2d.h"

namespace sdan_fast {

// One 1-D convolution of the chain, cut to the taps that can touch the image.
struct StripArgs {
  const void* weight;  // (C, k)
  const void* bias;    // (C) or nullptr
  int64_t k;
  int64_t first, used;  // taps [first, first + used) of k
  int64_t d;
};

struct StripChainArgs {
  const void* x;
  const void* gate;  // multiplies the result, or nullptr; laid out as x and y are
  void* y;
  DType dtype;
  bool channels_last;
  bool any_bias;
  int64_t n, c, h, w;
  int64_t stages;
  const StripArgs* horizontal;  // one per stage
  const StripArgs* vertical;
  int64_t halo_h, halo_w;  // both sides together, of all stages
  int64_t lanes;
  int64_t band;  // output rows computed at a time
  TileGrid grid;
};

// Rows of the window that a vertical strip reads, when it and the later ones have this halo: moving
// the halo back to the window's start is due once in two bands.
inline int64_t strip_level_rows(int64_t band, int64_t halo) {
  return halo + 3 * band;
}

}  // namespace sdan_fast

// Tasks as in depthwise_conv2d_run.
SDAN_DECLARE_KERNEL(strip_conv_chain_run, const ::sdan_fast::StripChainArgs& args, int64_t begin,
                    int64_t end)
