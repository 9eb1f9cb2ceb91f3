// sdan_fast::mm_lka_backward.cpu: the branches again, then the gate's gradients, and these back
// through the branches.
#include "branches_backward.h"
#include "gate_backward.h"
#include "lka.h"

namespace sdan_fast {
namespace {

std::vector<Tensor> mm_lka_backward(const Tensor& grad_output, const Tensor& x,
                                    std::vector<Tensor> weights, std::vector<Tensor> biases,
                                    const Tensor& proj_weight, std::optional<Tensor> proj_bias,
                                    std::vector<bool> bias_mask, std::vector<int64_t> dilations,
                                    std::vector<int64_t> lengths, std::vector<bool> output_mask) {
  constexpr const char* op = "mm_lka_backward";
  const DType dtype = check_image(x, op);
  const int64_t channels = x.size(1);
  FloatArena arena(DType::kFloat32);  // 16-bit images are computed on in float32
  const Branches branches =
      make_branches(arena, x, channels, weights, biases, bias_mask, dilations, lengths, op);
  check_pointwise(proj_weight, x, channels, channels, op, "proj_weight");
  check_optional_vector(proj_bias, x, channels, op, "proj_bias");
  check_same(grad_output, x, op, "grad_output");
  const size_t slots = 1 + weights.size() + biases.size();  // x's and the branches'
  check_mask(output_mask, slots + 2, op);
  const bool need_x = output_mask[0], need_weight = output_mask[slots],
             need_bias = output_mask[slots + 1];
  STD_TORCH_CHECK(proj_bias.has_value() || !need_bias, op,
                  ": output_mask asks for the gradient of a proj_bias that is not there");
  const std::vector<bool> branch_mask(output_mask.begin(),
                                      output_mask.begin() + static_cast<ptrdiff_t>(slots));
  const bool need_t = std::find(branch_mask.begin(), branch_mask.end(), true) != branch_mask.end();

  // t, the branches' output, and the gradients of both sides of the gate: planes of float32, which
  // is what the branches work on.
  const auto planes = [&] { return empty_planes(x, x.sizes(), DType::kFloat32); };
  const Tensor x_planes = in_planes(x, dtype);
  Tensor t = x_planes;
  if (need_x || need_weight) {
    t = planes();
    BranchPlan plan{x.size(2),
                    x.size(3),
                    branches.branches.data(),
                    branches.convs.data(),
                    view_of(x_planes, dtype),
                    view_of(t, DType::kFloat32)};
    run_branches(plan, branches.branches, x.numel() == 0 ? 0 : x.size(0));
  }
  GateBackward gate{grad_output,  x,           t,        proj_weight, proj_bias, std::nullopt,
                    std::nullopt, need_weight, need_bias};
  if (need_x) gate.gu = planes();
  if (need_t) gate.gx = need_x || need_weight ? t : planes();  // in place of t, tile by tile
  const GateParameters found = run_gate_backward(gate, op);

  std::vector<Tensor> grads;
  if (need_t) {
    grads = branches_backward({op, x_planes, *gate.gx, weights, biases, bias_mask, dilations,
                               lengths, branch_mask, output_format(x), gate.gu});
  }
  for (const auto& g : {found.weight, found.bias}) {
    if (g.has_value()) grads.push_back(*g);
  }
  return grads;
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  if (sdan_fast::rounds_products_once()) {
    m.impl("mm_lka_backward.cpu", TORCH_BOX(&sdan_fast::mm_lka_backward));
  }
}
