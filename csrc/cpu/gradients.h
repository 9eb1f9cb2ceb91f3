// Ops and gradients that other ops of this backend are made of, as functions on tensors.
//
// The gradients take what their op `<name>_backward` takes, and return what it returns: those that
// output_mask asks for, in the order of the op's tensors, each with the dtype and memory format of
// its own tensor.
//
// For baseline sources only (never from a source compiled per instruction set).
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "tensor_util.h"

namespace sdan_fast {

// LayerNorm over the channels at each pixel: x is N x C x H x W, weight and bias C.
Tensor layer_norm2d(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, double eps);

// Of x, weight and bias.
std::vector<Tensor> layer_norm2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                          std::optional<Tensor> bias, double eps,
                                          std::vector<bool> output_mask);

// Of a and b in outer(activation(a) * b).
std::vector<Tensor> star_backward(const Tensor& grad, const Tensor& a, const Tensor& b,
                                  std::string activation, std::string outer,
                                  std::vector<bool> output_mask);

}  // namespace sdan_fast
