// The gated 1x1 convolution's torch side: the product by PyTorch, then one kernel.
#include "gemm.h"

namespace sdan_fast::cuda {
namespace {

struct GateCall {
  DType dtype;
  MemoryFormat format;
  Pixels pixels;
  GateShape shape;
  int64_t ci, co;
};

GateCall check_gate(const Tensor& u, const Tensor& x, const Tensor& weight, const Optional& bias,
                    const char* op) {
  const DType dtype = dtype_of(u, op, "u");
  check_image(u, op, "u");
  check_image(x, op, "x");
  check_kind(x, u, op, "x", "u");
  STD_TORCH_CHECK(x.size(0) == u.size(0) && x.size(2) == u.size(2) && x.size(3) == u.size(3), op,
                  ": x must have the batch, height and width of u, ", shape_of(u), ", got ",
                  shape_of(x));
  const int64_t co = u.size(1), ci = x.size(1);
  STD_TORCH_CHECK(co < (1 << 24) && ci < (1 << 24), op, ": too many channels");
  check_kind(weight, u, op, "weight", "u");
  check_shape(weight, {co, ci, 1, 1}, op, "weight");
  if (bias) {
    check_kind(*bias, u, op, "bias", "u");
    check_shape(*bias, {co}, op, "bias");
  }
  const MemoryFormat format = format_of(u);
  const bool last = format == MemoryFormat::ChannelsLast;
  const int64_t pixels = u.size(2) * u.size(3);
  return GateCall{dtype,
                  format,
                  Pixels{u.size(0), pixels, last},
                  GateShape{u.size(0), pixels, static_cast<int>(co), last},
                  ci,
                  co};
}

Tensor pointwise_gate_op(Tensor u, Tensor x, Tensor weight, Optional bias) {
  const GateCall c = check_gate(u, x, weight, bias, "pointwise_gate");
  Tensor y = empty_like_in(u, c.format);
  if (u.numel() == 0) return y;
  const OnDevice on(u);
  u = in_format(u, c.format);
  x = in_format(x, c.format);
  weight = in_format(weight, MemoryFormat::Contiguous);
  if (bias) bias = in_format(*bias, MemoryFormat::Contiguous);
  Tensor t = empty_like_in(u, c.format);
  c.pixels.convolve(viewed(weight, {c.co, c.ci}), c.pixels.matrix(x, c.ci),
                    c.pixels.matrix(t, c.co));
  gate(c.dtype, u.data_ptr(), t.data_ptr(), nullptr, bias ? bias->data_ptr() : nullptr,
       y.data_ptr(), nullptr, nullptr, nullptr, c.shape, on.stream());
  return y;
}

std::vector<Tensor> pointwise_gate_backward_op(Tensor grad_output, Tensor u, Tensor x,
                                               Tensor weight, Optional bias,
                                               std::vector<bool> output_mask) {
  const char* op = "pointwise_gate_backward";
  const GateCall c = check_gate(u, x, weight, bias, op);
  check_like(grad_output, u, op, "grad_output", "u");
  check_mask(output_mask, 4, op);
  STD_TORCH_CHECK(bias || !output_mask[3], op,
                  ": output_mask asks for the gradient of a bias that is not there");
  const MemoryFormat contiguous = MemoryFormat::Contiguous, format_of_x = format_of(x);
  const bool need_u = output_mask[0], need_x = output_mask[1], need_w = output_mask[2],
             need_b = output_mask[3];
  Tensor gu, gx, gw, gb;
  if (need_u) gu = empty_like_in(u, c.format);
  if (need_x) gx = empty_like_in(x, c.format);
  if (need_w) gw = empty_like_in(weight, contiguous);
  if (need_b) gb = empty_like_in(*bias, contiguous);
  if (u.numel() == 0 || x.numel() == 0) {
    if (need_x) torch::stable::zero_(gx);
    if (need_w) torch::stable::zero_(gw);
    if (need_b) torch::stable::zero_(gb);
  }
  if (u.numel() > 0 && (need_u || need_x || need_w || need_b)) {
    const OnDevice on(u);
    const Tensor g = in_format(grad_output, c.format), dense_u = in_format(u, c.format),
                 dense_x = in_format(x, c.format),
                 w = viewed(in_format(weight, contiguous), {c.co, c.ci});
    Optional dense_bias;
    if (bias) dense_bias = in_format(*bias, contiguous);
    const Tensor x_matrix = c.pixels.matrix(dense_x, c.ci);
    Tensor t, h, partial;
    const void* t_at = nullptr;
    if (need_u) {
      t = empty_like_in(u, c.format);
      c.pixels.convolve(w, x_matrix, c.pixels.matrix(t, c.co));
      t_at = t.data_ptr();
    }
    const bool need_t = need_x || need_w;  // the gradient of the product
    if (need_t) h = empty_like_in(u, c.format);
    if (need_b) partial = empty_matrix(u, {gate_partial_floats(c.shape)}, ScalarType::Float);
    gate(c.dtype, g.data_ptr(), t_at, need_t || need_b ? dense_u.data_ptr() : nullptr,
         dense_bias ? dense_bias->data_ptr() : nullptr, need_u ? gu.data_ptr() : nullptr,
         need_t ? h.data_ptr() : nullptr,
         need_b ? static_cast<float*>(partial.data_ptr()) : nullptr,
         need_b ? gb.data_ptr() : nullptr, c.shape, on.stream());
    if (need_t && x.numel() > 0) {
      const Tensor h_matrix = c.pixels.matrix(h, c.co);
      if (need_x) c.pixels.convolve_transposed(w, h_matrix, c.pixels.matrix(gx, c.ci));
      if (need_w) {
        const Tensor parts = c.pixels.weight_parts(h_matrix, x_matrix, c.co, c.ci);
        sum_parts(static_cast<const float*>(parts.data_ptr()),
                  flat_sums(c.dtype, {gw.data_ptr()}, c.co * c.ci, c.pixels.parts(), 1, c.co * c.ci,
                            1, 0),
                  on.stream());
      }
    }
  }
  std::vector<Tensor> grads;
  if (need_u) grads.push_back(gu);
  if (need_x) grads.push_back(in_format(gx, format_of_x));
  if (need_w) grads.push_back(in_format(gw, format_of(weight)));
  if (need_b) grads.push_back(gb);
  return grads;
}

}  // namespace

SDAN_LIBRARY_IMPL(m) {
  m.impl(SDAN_OVERLOAD("pointwise_gate"), TORCH_BOX(&pointwise_gate_op));
  m.impl(SDAN_OVERLOAD("pointwise_gate_backward"), TORCH_BOX(&pointwise_gate_backward_op));
}

}  // namespace sdan_fast::cuda
