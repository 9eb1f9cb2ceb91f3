// The LayerNorm's torch side: checks, layouts, registration.
#include "torch_side.h"

namespace sdan_fast::cuda {
namespace {

void check_norm(const Tensor& x, const Tensor& weight, const Optional& bias, const char* op) {
  check_image(x, op, "x");
  STD_TORCH_CHECK(x.size(1) <= 4096, op, ": the CUDA C++ kernel takes at most 4096 channels, got ",
                  x.size(1));
  check_kind(weight, x, op, "weight", "x");
  check_shape(weight, {x.size(1)}, op, "weight");
  if (bias) {
    check_kind(*bias, x, op, "bias", "x");
    check_shape(*bias, {x.size(1)}, op, "bias");
  }
}

NormShape shape_for(const Tensor& x, MemoryFormat format) {
  return NormShape{x.size(0), x.size(2) * x.size(3), static_cast<int>(x.size(1)),
                   format == MemoryFormat::ChannelsLast};
}

Tensor layer_norm2d_op(Tensor x, Tensor weight, Optional bias, double eps) {
  const char* op = "layer_norm2d";
  const DType dtype = dtype_of(x, op, "x");
  check_norm(x, weight, bias, op);
  const MemoryFormat format = format_of(x);
  Tensor y = empty_like_in(x, format);
  if (x.numel() == 0) return y;
  const OnDevice on(x);
  x = in_format(x, format);
  weight = in_format(weight, MemoryFormat::Contiguous);
  if (bias) bias = in_format(*bias, MemoryFormat::Contiguous);
  norm_forward(dtype, x.data_ptr(), weight.data_ptr(), bias ? bias->data_ptr() : nullptr,
               y.data_ptr(), shape_for(x, format), static_cast<float>(eps), on.stream());
  return y;
}

// In the layout of x, unless that is channels_last with too many channels: then on copies.
std::vector<Tensor> layer_norm2d_backward_op(Tensor grad_output, Tensor x, Tensor weight,
                                             Optional bias, double eps,
                                             std::vector<bool> output_mask) {
  const char* op = "layer_norm2d_backward";
  const DType dtype = dtype_of(x, op, "x");
  check_norm(x, weight, bias, op);
  check_like(grad_output, x, op, "grad_output", "x");
  check_mask(output_mask, 3, op);
  STD_TORCH_CHECK(bias || !output_mask[2], op,
                  ": output_mask asks for the gradient of a bias that is not there");
  const MemoryFormat format = format_of(x), contiguous = MemoryFormat::Contiguous;
  const MemoryFormat computed = norm_backward_fits(shape_for(x, format)) ? format : contiguous;
  std::vector<Tensor> grads;
  void* target[3] = {nullptr, nullptr, nullptr};
  for (size_t i = 0; i < 3; ++i) {
    if (!output_mask[i]) continue;
    grads.push_back(i == 0 ? empty_like_in(x, computed)
                           : empty_like_in(i == 1 ? weight : *bias, contiguous));
    if (x.numel() == 0 && i > 0) torch::stable::zero_(grads.back());
    target[i] = grads.back().data_ptr();
  }
  if (x.numel() > 0 && !grads.empty()) {
    const OnDevice on(x);
    grad_output = in_format(grad_output, computed);
    x = in_format(x, computed);
    weight = in_format(weight, contiguous);
    const NormShape shape = shape_for(x, computed);
    Optional partial;
    if (output_mask[1] || output_mask[2]) {
      const int64_t floats[1] = {norm_partial_floats(shape)};
      partial = empty_in(x, {floats, 1}, contiguous, ScalarType::Float);
    }
    norm_backward(dtype, grad_output.data_ptr(), x.data_ptr(), weight.data_ptr(), target[0],
                  partial ? static_cast<float*>(partial->data_ptr()) : nullptr, target[1],
                  target[2], shape, static_cast<float>(eps), on.stream());
  }
  if (output_mask[0]) grads[0] = in_format(grads[0], format);
  return grads;
}

}  // namespace

SDAN_LIBRARY_IMPL(m) {
  m.impl(SDAN_OVERLOAD("layer_norm2d"), TORCH_BOX(&layer_norm2d_op));
  m.impl(SDAN_OVERLOAD("layer_norm2d_backward"), TORCH_BOX(&layer_norm2d_backward_op));
}

}  // namespace sdan_fast::cuda
