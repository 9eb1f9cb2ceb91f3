// Depth-wise convolutions of channels_last images that are read where they lie, and the gradients
// of such: which, and on how many threads.
#pragma once

#include "isa/flat.h"

namespace sdan_fast {

// Whether the kernels read rows of this type in place: 16-bit numbers where vectors of them are
// loaded without a detour.
bool loads_flat(DType dtype);

// Whether a channels_last image is read in place: at least a vector's channels, unless the weights,
// expanded to vectors, would not stay in a first-level cache with what the taps see.
bool reads_flat(const DepthwiseArgs& args);

// Runs such a convolution; `grid` is chosen here.
void run_flat(DepthwiseArgs args);

// Sums of the gradients of weights, images x channels x taps, and of biases, images x channels,
// each unless null; at most kMostFlatTaps taps. Of `args` the images, the sizes and the taps are
// read.
void run_flat_sums(FlatSums args, int64_t images, double* weight_sums, double* bias_sums);

}  // namespace sdan_fast
