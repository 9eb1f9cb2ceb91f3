// Checks, set-up and the three sweeps of one RSDAM, shared by rsdam.cpu and sdan.cpu.
#pragma once

#include "lka.h"
#include "sdm.h"

namespace sdan_fast {

inline void check_pair(const std::vector<Tensor>& pair, const char* op, const char* name) {
  STD_TORCH_CHECK(pair.size() == 2, op, ": ", name, " must hold a weight and a bias, got ",
                  pair.size(), " tensors");
}

// The tensors of one block, each list in state-dict order.
struct RsdamTensors {
  std::vector<Tensor> distill, star, fuse, weights, biases, attn_proj, proj, norm;
};

// One block's parameters, packed; heights, widths and views are filled in, in copies, when it runs.
struct Rsdam {
  StarChain chain{};
  Branches branches;
  GatePlan gate{};
};

inline Rsdam make_rsdam(FloatArena& arena, const Tensor& x, int64_t channels, const RsdamTensors& t,
                        const std::vector<bool>& bias_mask, const std::vector<int64_t>& dilations,
                        const std::vector<int64_t>& lengths, double eps, const char* op) {
  Rsdam block;
  make_sdm(block.chain, arena, x, channels, t.distill, t.star, t.fuse, eps, op);
  STD_TORCH_CHECK(block.chain.fuse.co == channels, op, ": the weight of fuse must have ", channels,
                  " output channels, got shape ", shape_of(t.fuse[0]));
  block.branches =
      make_branches(arena, x, channels, t.weights, t.biases, bias_mask, dilations, lengths, op);
  check_pair(t.attn_proj, op, "attn_proj");
  check_pair(t.proj, op, "proj");
  check_pair(t.norm, op, "norm");
  check_pointwise(t.attn_proj[0], x, channels, channels, op, "the weight of attn_proj");
  check_vector(t.attn_proj[1], x, channels, op, "the bias of attn_proj");
  check_pointwise(t.proj[0], x, channels, channels, op, "the weight of proj");
  check_vector(t.proj[1], x, channels, op, "the bias of proj");
  check_vector(t.norm[0], x, channels, op, "the weight of norm");
  check_vector(t.norm[1], x, channels, op, "the bias of norm");
  block.gate.gate = pack(arena, t.attn_proj[0], t.attn_proj[1]);
  block.gate.project = pack(arena, t.proj[0], t.proj[1]);
  block.gate.norm_weight = arena.values(t.norm[0]);
  block.gate.norm_bias = arena.values(t.norm[1]);
  block.gate.eps = static_cast<float>(eps);
  return block;
}

// The images that a block reads and writes. t and u are scratch images, planes; u may be `out`
// itself, if that is such.
struct RsdamImages {
  ImageView x, t, u, out, collected;
};

inline GatePlan gate_of(const Rsdam& block, int64_t height, int64_t width, const RsdamImages& at) {
  GatePlan gate = block.gate;
  gate.height = height;
  gate.width = width;
  gate.u = at.u;
  gate.x = at.t;
  gate.residual = at.x;
  gate.out = at.out;
  gate.collected = at.collected;
  return gate;
}

// The block of x but for its gate, which is left to the caller. `before` is null, or the gate of
// the block before, which is still to be run and then leaves x.
inline void run_rsdam_to_gate(const Rsdam& block, int64_t images, int64_t height, int64_t width,
                              const RsdamImages& at, const GatePlan* before) {
  StarChain chain = block.chain;
  chain.height = height;
  chain.width = width;
  chain.x = at.x;
  chain.out = at.t;
  chain.before = before;
  run_star_chain(chain, images);
  const BranchPlan plan{height, width, block.branches.branches.data(), block.branches.convs.data(),
                        at.t,   at.u};
  run_branches(plan, block.branches.branches, images);
}

}  // namespace sdan_fast
