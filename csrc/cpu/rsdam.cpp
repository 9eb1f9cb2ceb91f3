// sdan_fast::rsdam.cpu: a whole block, x + LN(proj(MMLKA(SDM(x)))), in three sweeps over the image.
//
//   rsdam(Tensor x, Tensor[] distill, Tensor[] star, Tensor[] fuse, Tensor[] weights, Tensor[] biases,
//         Tensor[] attn_proj, Tensor[] proj, Tensor[] norm, *, bool[] bias_mask, int[] dilations,
//         int[] lengths, float eps=1e-5) -> Tensor
//
// distill, star, fuse as in sdm; weights, biases, bias_mask, dilations, lengths as in mm_lka; attn_proj, proj
// and norm are a weight and a bias each. MM-LKA spans tens of rows, so SDM's result t has to be a tensor of
// its own, in float32 whatever x is; everything else lives in the output or in scratch of a few rows.
#include "lka.h"
#include "sdm.h"

namespace sdan_fast {
namespace {

void check_pair(const std::vector<Tensor>& pair, const char* op, const char* name) {
  STD_TORCH_CHECK(pair.size() == 2, op, ": ", name, " must hold a weight and a bias, got ", pair.size(), " tensors");
}

Tensor rsdam(const Tensor& x, std::vector<Tensor> distill, std::vector<Tensor> star, std::vector<Tensor> fuse,
             std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<Tensor> attn_proj,
             std::vector<Tensor> proj, std::vector<Tensor> norm, std::vector<bool> bias_mask,
             std::vector<int64_t> dilations, std::vector<int64_t> lengths, double eps) {
  const char* op = "rsdam";
  const DType dtype = check_image(x, op);
  const int64_t channels = x.size(1);
  FloatArena arena;
  StarChain chain{};
  make_sdm(chain, arena, x, channels, distill, star, fuse, eps, op);
  STD_TORCH_CHECK(chain.fuse.co == channels, op, ": the weight of fuse must have x's ", channels,
                  " output channels, got shape ", shape_of(fuse[0]));
  const Branches branches = make_branches(arena, x, channels, weights, biases, bias_mask, dilations, lengths, op);
  check_pair(attn_proj, op, "attn_proj");
  check_pair(proj, op, "proj");
  check_pair(norm, op, "norm");
  check_pointwise(attn_proj[0], x, channels, channels, op, "the weight of attn_proj");
  check_vector(attn_proj[1], x, channels, op, "the bias of attn_proj");
  check_pointwise(proj[0], x, channels, channels, op, "the weight of proj");
  check_vector(proj[1], x, channels, op, "the bias of proj");
  check_vector(norm[0], x, channels, op, "the weight of norm");
  check_vector(norm[1], x, channels, op, "the bias of norm");

  Tensor out = empty_in_format(x.sizes(), x, output_format(x));
  if (x.numel() == 0) return out;
  const int64_t images = x.size(0), height = x.size(2), width = x.size(3);
  const Tensor t = empty_planar_float(x);
  const ImageView t_view = view_of(t, DType::kFloat32);
  chain.height = height;
  chain.width = width;
  chain.x = view_of(x, dtype);
  chain.out = t_view;
  run_star_chain(chain, images);

  const bool in_place = dtype == DType::kFloat32 && planar(out);
  const Tensor gathered = in_place ? out : empty_planar_float(x);
  const ImageView u_view = view_of(gathered, DType::kFloat32);
  const BranchPlan branch_plan{height, width, branches.branches.data(), branches.convs.data(), t_view, u_view};
  run_branches(branch_plan, branches.branches, images);

  GatePlan gate{};
  gate.height = height;
  gate.width = width;
  gate.gate = pack(arena, attn_proj[0], attn_proj[1]);
  gate.project = pack(arena, proj[0], proj[1]);
  gate.norm_weight = arena.values(norm[0]);
  gate.norm_bias = arena.values(norm[1]);
  gate.eps = static_cast<float>(eps);
  gate.u = u_view;
  gate.x = t_view;
  gate.residual = chain.x;
  gate.out = view_of(out, dtype);
  run_gate(gate, images);
  return out;
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) { m.impl("rsdam.cpu", TORCH_BOX(&sdan_fast::rsdam)); }
