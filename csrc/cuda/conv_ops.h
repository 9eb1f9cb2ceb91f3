// Depth-wise convolutions on torch's tensors: what the torch sides of depthwise_conv2d and of
// strip_conv_chain share. Defined in depthwise_conv2d.cpp.
#pragma once

#include "torch_side.h"

namespace sdan_fast::cuda {

// One convolution, in the layout that suits, into a tensor of the format `result`. `flip` makes it
// the input gradient.
Tensor convolve(const Tensor& x, const Tensor& weight, const Optional& bias,
                const std::vector<int64_t>& dilation, bool flip, MemoryFormat result,
                const char* op);

// Sums that are left to the end, so that those of several gradients are one launch.
struct PendingSums {
  std::vector<SumJob> jobs;
  std::vector<Tensor> parts;  // what they read

  // All of them, on the device and stream of x.
  void finish(const Tensor& x) const {
    if (!jobs.empty()) sum_parts_together(jobs, OnDevice(x).stream());
  }
};

// The gradients of weight and bias that `mask` asks for, in this order, contiguous; they are there
// once `pending` is finished.
std::vector<Tensor> weight_gradients(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                     const Optional& bias, const std::vector<int64_t>& dilation,
                                     std::array<bool, 2> mask, const char* op,
                                     PendingSums& pending);

}  // namespace sdan_fast::cuda
