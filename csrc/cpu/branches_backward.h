// The backward of depth-wise branches, chains of depth-wise convolutions that each have channels of
// their own: mm_lka's, and as the case of one branch depthwise_conv2d and strip_conv_chain.
#pragma once

#include <optional>
#include <vector>

#include "tensor_util.h"

namespace sdan_fast {

// One call, with the lists of mm_lka's schema.
struct BranchesBackward {
  const char* op;  // for messages
  Tensor x;        // N x C x H x W, any strides
  Tensor grad;     // of the branches' concatenated output: x's shape, x's dtype or float32
  std::vector<Tensor> weights;  // (channels of its branch, 1, kh, kw), kh and kw odd
  std::vector<Tensor> biases;   // those that bias_mask announces
  std::vector<bool> bias_mask;
  std::vector<int64_t> dilations;  // two for each weight
  std::vector<int64_t> lengths;    // convolutions of each branch, any number
  std::vector<bool> output_mask;   // x, every weight, every bias there is
  Format format;                   // of x's gradient: the op's rule for x
  // Added to x's gradient before that is rounded: what else x is for. x's shape, x's dtype or
  // float32.
  std::optional<Tensor> addend;
};

// The gradients that output_mask asks for, in its order: x's in `format`, those of weights and
// biases in the formats of these, all in x's dtype. The same bits for any number of threads.
std::vector<Tensor> branches_backward(const BranchesBackward& call);

// Whether an op should have this as its backward. A product that is rounded before it is added
// costs the portable kernels of x86-64 the error bound in long chains that end in few sums, against
// a PyTorch that rounds once: there the formula on PyTorch's convolutions stays.
inline bool rounds_products_once() {
#if defined(__x86_64__)
  return picked_isa() != Isa::kPortable;
#else
  return true;
#endif
}

}  // namespace sdan_fast
