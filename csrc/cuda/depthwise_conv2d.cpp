// The depth-wise convolution's torch side: checks, layouts, registration.
#include "conv_ops.h"

namespace sdan_fast::cuda {
namespace {

void check_weight(const Tensor& x, const Tensor& weight, const Optional& bias,
                  const std::vector<int64_t>& dilation, const char* op) {
  check_image(x, op, "x");
  check_kind(weight, x, op, "weight", "x");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 &&
                      weight.size(2) % 2 == 1 && weight.size(3) % 2 == 1,
                  op, ": weight must be C x 1 x kh x kw with odd kh and kw and the C of x, got ",
                  shape_of(weight));
  if (bias) {
    check_kind(*bias, x, op, "bias", "x");
    check_shape(*bias, {x.size(1)}, op, "bias");
  }
  STD_TORCH_CHECK(dilation.size() == 2 && dilation[0] >= 1 && dilation[1] >= 1, op,
                  ": dilation must be two positive integers");
}

ConvShape shape_for(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& dilation,
                    MemoryFormat format) {
  constexpr int64_t kMost = 1 << 24;  // what does not fit an int does not fit the kernels either
  return ConvShape{x.size(0),
                   x.size(1),
                   x.size(2),
                   x.size(3),
                   static_cast<int>(std::min(weight.size(2), kMost)),
                   static_cast<int>(std::min(weight.size(3), kMost)),
                   static_cast<int>(std::min(dilation[0], kMost)),
                   static_cast<int>(std::min(dilation[1], kMost)),
                   format == MemoryFormat::ChannelsLast};
}

// The layout to compute in: that of x, or channels_last if only that one fits.
MemoryFormat computing_format(const Tensor& x, const Tensor& weight,
                              const std::vector<int64_t>& dilation, bool weight_gradient,
                              const char* op) {
  const MemoryFormat format = format_of(x);
  const DType dtype = dtype_of(x, op, "x");
  for (const MemoryFormat f : {format, MemoryFormat::ChannelsLast}) {
    const ConvShape shape = shape_for(x, weight, dilation, f);
    if (weight_gradient ? conv_wgrad_fits(dtype, shape) : conv_fits(dtype, shape)) return f;
  }
  STD_TORCH_CHECK(false, op, ": the CUDA C++ kernel has no room for a kernel of ", weight.size(2),
                  " x ", weight.size(3), " taps with dilation (", dilation[0], ", ", dilation[1],
                  ") on an image of ", x.size(2), " x ", x.size(3));
  return format;
}

}  // namespace

Tensor convolve(const Tensor& x, const Tensor& weight, const Optional& bias,
                const std::vector<int64_t>& dilation, bool flip, MemoryFormat result,
                const char* op) {
  const DType dtype = dtype_of(x, op, "x");
  if (x.numel() == 0) return empty_like_in(x, result);
  const OnDevice on(x);
  const MemoryFormat format = computing_format(x, weight, dilation, false, op);
  const Tensor dense = in_format(x, format), taps = in_format(weight, MemoryFormat::Contiguous);
  Tensor y = empty_like_in(x, format);
  Optional b;
  if (bias) b = in_format(*bias, MemoryFormat::Contiguous);
  conv_forward(dtype, dense.data_ptr(), taps.data_ptr(), b ? b->data_ptr() : nullptr, y.data_ptr(),
               shape_for(x, weight, dilation, format), flip, on.stream());
  return in_format(y, result);
}

std::vector<Tensor> weight_gradients(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                     const Optional& bias, const std::vector<int64_t>& dilation,
                                     std::array<bool, 2> mask, const char* op,
                                     PendingSums& pending) {
  std::vector<Tensor> grads;
  if (!mask[0] && !mask[1]) return grads;
  const OnDevice on(x);
  Tensor grad_weight, grad_bias;
  if (mask[0]) grad_weight = empty_like_in(weight, MemoryFormat::Contiguous);
  if (mask[1]) grad_bias = empty_like_in(*bias, MemoryFormat::Contiguous);
  if (x.numel() == 0) {
    if (mask[0]) torch::stable::zero_(grad_weight);
    if (mask[1]) torch::stable::zero_(grad_bias);
  } else {
    const MemoryFormat format = computing_format(x, weight, dilation, true, op);
    const ConvShape shape = shape_for(x, weight, dilation, format);
    const Tensor g = in_format(grad, format), dense = in_format(x, format);
    const DType dtype = dtype_of(x, op, "x");
    const int64_t floats[1] = {conv_partial_floats(dtype, shape)};
    Tensor partial = empty_in(x, {floats, 1}, MemoryFormat::Contiguous, ScalarType::Float);
    pending.jobs.push_back(conv_weight_gradient(
        dtype, g.data_ptr(), dense.data_ptr(), static_cast<float*>(partial.data_ptr()),
        mask[0] ? grad_weight.data_ptr() : nullptr, mask[1] ? grad_bias.data_ptr() : nullptr, shape,
        on.stream()));
    pending.parts.push_back(partial);
  }
  if (mask[0]) grads.push_back(grad_weight);
  if (mask[1]) grads.push_back(grad_bias);
  return grads;
}

namespace {

Tensor depthwise_conv2d_op(Tensor x, Tensor weight, Optional bias, std::vector<int64_t> dilation) {
  const char* op = "depthwise_conv2d";
  check_weight(x, weight, bias, dilation, op);
  return convolve(x, weight, bias, dilation, false, format_of(x), op);
}

std::vector<Tensor> depthwise_conv2d_backward_op(Tensor grad_output, Tensor x, Tensor weight,
                                                 Optional bias, std::vector<int64_t> dilation,
                                                 std::vector<bool> output_mask) {
  const char* op = "depthwise_conv2d_backward";
  dtype_of(x, op, "x");
  check_weight(x, weight, bias, dilation, op);
  check_like(grad_output, x, op, "grad_output", "x");
  check_mask(output_mask, 3, op);
  STD_TORCH_CHECK(bias || !output_mask[2], op,
                  ": output_mask asks for the gradient of a bias that is not there");
  std::vector<Tensor> grads;
  if (output_mask[0]) {
    // The kernels like the layout of the gradient best when it is that of x, which the result must
    // have.
    const MemoryFormat format = format_of(x);
    grads.push_back(
        convolve(in_format(grad_output, format), weight, std::nullopt, dilation, true, format, op));
  }
  PendingSums pending;
  const auto sums = weight_gradients(grad_output, x, weight, bias, dilation,
                                     {output_mask[1], output_mask[2]}, op, pending);
  pending.finish(x);
  for (const Tensor& g : sums) grads.push_back(g.dim() == 4 ? in_format(g, format_of(weight)) : g);
  return grads;
}

}  // namespace

SDAN_LIBRARY_IMPL(m) {
  m.impl(SDAN_OVERLOAD("depthwise_conv2d"), TORCH_BOX(&depthwise_conv2d_op));
  m.impl(SDAN_OVERLOAD("depthwise_conv2d_backward"), TORCH_BOX(&depthwise_conv2d_backward_op));
}

}  // namespace sdan_fast::cuda
