// sdan_fast::mm_lka.cpu: x * proj(concat of the depth-wise branches).
#include "lka.h"

namespace sdan_fast {
namespace {

Tensor mm_lka(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases,
              const Tensor& proj_weight, std::optional<Tensor> proj_bias,
              std::vector<bool> bias_mask, std::vector<int64_t> dilations,
              std::vector<int64_t> lengths) {
  const DType dtype = check_image(x, "mm_lka");
  const int64_t channels = x.size(1);
  FloatArena arena(dtype);
  const Branches branches =
      make_branches(arena, x, channels, weights, biases, bias_mask, dilations, lengths, "mm_lka");
  check_pointwise(proj_weight, x, channels, channels, "mm_lka", "proj_weight");
  check_optional_vector(proj_bias, x, channels, "mm_lka", "proj_bias");

  Tensor out = empty_in_format(x.sizes(), x, output_format(x));
  if (x.numel() == 0) return out;
  const Tensor planes = in_planes(x, dtype);  // which the branches work on
  // Where the output is planes of what their result is stored as, it lies there until the gate
  // replaces it, block by block.
  const DType between = between_dtype(arena);
  const bool in_place = dtype == between && planar(out);
  const Tensor gathered = in_place ? out : empty_planes(x, x.sizes(), between);

  BranchPlan branch_plan{x.size(2),
                         x.size(3),
                         branches.branches.data(),
                         branches.convs.data(),
                         view_of(planes, dtype),
                         view_of(gathered, between)};
  run_branches(branch_plan, branches.branches, x.size(0));
  GatePlan gate{};
  gate.height = x.size(2);
  gate.width = x.size(3);
  gate.gate = pack(arena, proj_weight, proj_bias);
  gate.u = view_of(gathered, between);
  gate.x = view_of(planes, dtype);
  gate.out = view_of(out, dtype);
  run_gate(gate, x.size(0));
  return out;
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  m.impl("mm_lka.cpu", TORCH_BOX(&sdan_fast::mm_lka));
}
