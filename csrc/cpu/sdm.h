// Checks and set-up of a whole SDM, shared by sdm.cpu, rsdam.cpu and sdan.cpu.
#pragma once

#include "star_chain.h"

namespace sdan_fast {

constexpr size_t kStarTensors =
    6;  // norm.weight, norm.bias, pw1.weight, dw.weight, dw.bias, pw2.weight

// Fills the levels and fuse of `chain` for input like x with `channels` channels. distill: weight
// and bias of every level but the last; star: kStarTensors of every level; fuse: weight and bias.
inline void make_sdm(StarChain& chain, FloatArena& arena, const Tensor& x, int64_t channels,
                     const std::vector<Tensor>& distill, const std::vector<Tensor>& star,
                     const std::vector<Tensor>& fuse, double eps, const char* op) {
  const size_t levels = star.size() / kStarTensors;
  STD_TORCH_CHECK(levels >= 1 && levels <= kMaxLevels && star.size() % kStarTensors == 0, op,
                  ": star must hold six tensors for each of 1 to ", kMaxLevels, " levels, got ",
                  star.size());
  STD_TORCH_CHECK(distill.size() == 2 * (levels - 1), op,
                  ": distill must hold a weight and a bias for every level but the last, ",
                  2 * (levels - 1), " tensors, got ", distill.size());
  STD_TORCH_CHECK(fuse.size() == 2, op, ": fuse must hold a weight and a bias, got ", fuse.size(),
                  " tensors");
  chain.channels = static_cast<int>(channels);
  chain.level_count = static_cast<int>(levels);
  int64_t ci = channels, gathered = 0;
  std::vector<int64_t> fused;
  for (size_t i = 0; i < levels; ++i) {
    const Tensor* s = &star[i * kStarTensors];
    StarLevel& level = chain.levels[i];
    level =
        make_level(arena, x, {s[0], s[1], s[2], s[3], s[4], s[5]}, ci, Activation::kGelu, eps, op);
    if (i + 1 < levels) {
      check_pointwise(distill[2 * i], x, -1, ci, op, "each weight of distill");
      check_vector(distill[2 * i + 1], x, distill[2 * i].size(0), op, "each bias of distill");
      level.distill = pack(arena, distill[2 * i], distill[2 * i + 1]);
      gathered += level.distill.co;
      fused.push_back(level.distill.co);
    }
    ci = level.pw1.co;
  }
  check_pointwise(fuse[0], x, -1, gathered + ci, op, "the weight of fuse");
  check_vector(fuse[1], x, fuse[0].size(0), op, "the bias of fuse");
  fused.push_back(ci);
  chain.fuse = pack(arena, fuse[0], fuse[1], fused);
}

}  // namespace sdan_fast
