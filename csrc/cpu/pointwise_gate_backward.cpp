// sdan_fast::pointwise_gate_backward.cpu: the gradients of u * (1x1 convolution of x).
#include "gate_backward.h"

namespace sdan_fast {
namespace {

std::vector<Tensor> pointwise_gate_backward(const Tensor& grad_output, const Tensor& u,
                                            const Tensor& x, const Tensor& weight,
                                            std::optional<Tensor> bias,
                                            std::vector<bool> output_mask) {
  constexpr const char* op = "pointwise_gate_backward";
  check_cpu(u, op, "u");
  check_like(u, u, 4, op, "u");
  check_like(x, u, 4, op, "x");
  check_like(weight, u, 4, op, "weight");
  check_same(grad_output, u, op, "grad_output");
  const int64_t co = u.size(1), ci = x.size(1);
  STD_TORCH_CHECK(x.size(0) == u.size(0) && x.size(2) == u.size(2) && x.size(3) == u.size(3), op,
                  ": x must have the batch, height and width of u, ", shape_of(u), ", got ",
                  shape_of(x));
  STD_TORCH_CHECK(
      weight.size(0) == co && weight.size(1) == ci && weight.size(2) == 1 && weight.size(3) == 1,
      op, ": weight must have shape (", co, ", ", ci, ", 1, 1), got ", shape_of(weight));
  STD_TORCH_CHECK(co >= 1 && co < (1 << 24) && ci >= 1 && ci < (1 << 24), op,
                  ": u and x must have between 1 and 2^24 - 1 channels, got ", co, " and ", ci);
  if (bias.has_value()) check_vector(*bias, u, co, op, "bias");
  check_mask(output_mask, 4, op);
  STD_TORCH_CHECK(bias.has_value() || !output_mask[3], op,
                  ": output_mask asks for the gradient of a bias that is not there");

  GateBackward call{grad_output,   u, x, weight, bias, std::nullopt, std::nullopt, output_mask[2],
                    output_mask[3]};
  if (output_mask[0]) call.gu = empty_in_format(u.sizes(), u, output_format(u));
  if (output_mask[1]) call.gx = empty_in_format(x.sizes(), x, output_format(x));
  const GateParameters found = run_gate_backward(call, op);
  std::vector<Tensor> grads;
  for (const auto& g : {call.gu, call.gx, found.weight, found.bias}) {
    if (g.has_value()) grads.push_back(*g);
  }
  return grads;
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  m.impl("pointwise_gate_backward.cpu", TORCH_BOX(&sdan_fast::pointwise_gate_backward));
}
