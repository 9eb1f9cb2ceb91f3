// sdan_fast::rsdam.cpu: a whole block, x + LN(proj(MMLKA(SDM(x)))), in three sweeps over the image.
//
//   rsdam(Tensor x, Tensor[] distill, Tensor[] star, Tensor[] fuse, Tensor[] weights, Tensor[]
//   biases,
//         Tensor[] attn_proj, Tensor[] proj, Tensor[] norm, *, bool[] bias_mask, int[] dilations,
//         int[] lengths, float eps=1e-5) -> Tensor
//
// distill, star, fuse as in sdm; weights, biases, bias_mask, dilations, lengths as in mm_lka;
// attn_proj, proj and norm are a weight and a bias each. MM-LKA spans tens of rows, so SDM's result
// t has to be a tensor of its own, in float32, or in bfloat16 if the products are; everything else
// lives in the output or in scratch of a few rows.
#include "rsdam.h"

namespace sdan_fast {
namespace {

Tensor rsdam(const Tensor& x, std::vector<Tensor> distill, std::vector<Tensor> star,
             std::vector<Tensor> fuse, std::vector<Tensor> weights, std::vector<Tensor> biases,
             std::vector<Tensor> attn_proj, std::vector<Tensor> proj, std::vector<Tensor> norm,
             std::vector<bool> bias_mask, std::vector<int64_t> dilations,
             std::vector<int64_t> lengths, double eps) {
  const DType dtype = check_image(x, "rsdam");
  FloatArena arena(dtype);
  const Rsdam block =
      make_rsdam(arena, x, x.size(1), {distill, star, fuse, weights, biases, attn_proj, proj, norm},
                 bias_mask, dilations, lengths, eps, "rsdam");
  Tensor out = empty_in_format(x.sizes(), x, output_format(x));
  if (x.numel() == 0) return out;
  const DType between = between_dtype(arena);
  const Tensor t = empty_planes(x, x.sizes(), between);
  const bool in_place = dtype == between && planar(out);
  const Tensor u = in_place ? out : empty_planes(x, x.sizes(), between);
  const RsdamImages at{
      view_of(x, dtype), view_of(t, between), view_of(u, between), view_of(out, dtype), {}};
  run_rsdam_to_gate(block, x.size(0), x.size(2), x.size(3), at, nullptr);
  run_gate(gate_of(block, x.size(2), x.size(3), at), x.size(0));
  return out;
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  m.impl("rsdam.cpu", TORCH_BOX(&sdan_fast::rsdam));
}
