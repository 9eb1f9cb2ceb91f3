// The entry points of the kernels that read channels_last rows where they lie: at least a vector's
// channels. Sums are of float32.
#pragma once

#include "depthwise_conv2d.h"
#include "strip_conv_chain.h"

namespace sdan_fast {

constexpr int kMostFlatTaps = 12;  // of a filter's gradient: they have registers for their sums

// The sums of a depth-wise filter's and its bias's gradients, a strip of rows at a time.
struct FlatSums {
  const float* x;     // N x H x W x C
  const float* grad;  // of the output
  int64_t h, w, c;
  int64_t kh, kw, dh, dw;      // the taps that can touch the image
  int64_t strip_rows, strips;  // of an image
  bool weights, bias;          // which are wanted
  double* sums;                // of each strip (kh x kw + 1) x c, the bias's last
};

}  // namespace sdan_fast

// Tasks [begin, end) of n * tiles_h * tiles_w, for convolutions whole rows.
SDAN_DECLARE_KERNEL(flat_conv_run, const ::sdan_fast::DepthwiseArgs& args, int64_t begin,
                    int64_t end)
SDAN_DECLARE_KERNEL(flat_chain_run, const ::sdan_fast::StripChainArgs& args, int64_t begin,
                    int64_t end)
// Strips [begin, end) of n * strips.
SDAN_DECLARE_KERNEL(flat_sums_run, const ::sdan_fast::FlatSums& args, int64_t begin, int64_t end)
