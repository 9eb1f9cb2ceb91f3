// Checks and set-up of StarConv levels, shared by star_conv.cpu, sdm.cpu and rsdam.cpu.
#pragma once

#include "gate.h"

namespace sdan_fast {

// Refuses what is no N x C x H x W image that the fused kernels read.
inline DType check_image(const Tensor& x, const char* op) {
  check_cpu(x, op, "x");
  const DType dtype = kernel_dtype(x, op, "x");
  STD_TORCH_CHECK(x.dim() == 4, op, ": x must have 4 dimensions (N, C, H, W), got shape ",
                  shape_of(x));
  STD_TORCH_CHECK(x.size(1) >= 1 && x.size(1) <= (1 << 20), op,
                  ": x must have between 1 and 2^20 channels, got ", x.size(1));
  return dtype;
}

// A 1x1 convolution's weight: (co, ci, 1, 1), any co if `co` is negative.
inline void check_pointwise(const Tensor& w, const Tensor& x, int64_t co, int64_t ci,
                            const char* op, const char* name) {
  check_like(w, x, 4, op, name);
  STD_TORCH_CHECK(w.size(1) == ci && w.size(2) == 1 && w.size(3) == 1 &&
                      (co < 0 || w.size(0) == co) && w.size(0) >= 1,
                  op, ": ", name, " must have shape (",
                  co < 0 ? std::string("Co") : std::to_string(co), ", ", ci, ", 1, 1), got shape ",
                  shape_of(w));
}

inline void check_optional_vector(const std::optional<Tensor>& t, const Tensor& x, int64_t channels,
                                  const char* op, const char* name) {
  if (t.has_value()) check_vector(*t, x, channels, op, name);
}

constexpr int64_t kLargestStarKernel = 255;

// The six parameters of one StarConv.
struct StarParameters {
  Tensor norm_weight;
  std::optional<Tensor> norm_bias;
  Tensor pw1_weight, dw_weight;
  std::optional<Tensor> dw_bias;
  Tensor pw2_weight;
};

inline StarLevel make_level(FloatArena& arena, const Tensor& x, const StarParameters& p, int64_t ci,
                            Activation outer, double eps, const char* op) {
  check_vector(p.norm_weight, x, ci, op, "norm_weight");
  check_optional_vector(p.norm_bias, x, ci, op, "norm_bias");
  check_pointwise(p.pw1_weight, x, -1, ci, op, "pw1_weight");
  const int64_t co = p.pw1_weight.size(0);
  check_pointwise(p.pw2_weight, x, co, ci, op, "pw2_weight");
  check_like(p.dw_weight, x, 4, op, "dw_weight");
  const int64_t kh = p.dw_weight.size(2), kw = p.dw_weight.size(3);
  STD_TORCH_CHECK(p.dw_weight.size(0) == co && p.dw_weight.size(1) == 1 && kh % 2 == 1 &&
                      kw % 2 == 1 && kh <= kLargestStarKernel && kw <= kLargestStarKernel,
                  op, ": dw_weight must have shape (", co, ", 1, kh, kw) with odd kh and kw up to ",
                  kLargestStarKernel, ", got shape ", shape_of(p.dw_weight));
  check_optional_vector(p.dw_bias, x, co, op, "dw_bias");

  const float* norm_weight = arena.values(p.norm_weight);
  const float* norm_bias = arena.values_or(p.norm_bias, ci, 0.0f);
  StarLevel level{};
  level.pw1 = pack_after_norm(arena, p.pw1_weight, norm_weight, norm_bias);
  level.pw2 = pack_after_norm(arena, p.pw2_weight, norm_weight, norm_bias);
  level.dw = arena.values(p.dw_weight);
  level.dw_bias = arena.values_or(p.dw_bias, co, 0.0f);
  level.kh = static_cast<int>(kh);
  level.kw = static_cast<int>(kw);
  level.outer = outer;
  level.eps = static_cast<float>(eps);
  return level;
}

// Runs the chain over every image: bands of rows, and tiles of columns where a whole row of all
// levels' rings would not stay in cache.
inline void run_star_chain(StarChain chain, int64_t images) {
  static const auto scratch_kernel = SDAN_PICK_KERNEL(star_chain_scratch);
  static const auto run_kernel = SDAN_PICK_KERNEL(star_chain_run);
  if (images == 0 || chain.height == 0 || chain.width == 0) return;
  int64_t halo_x = 0, work = multiply_adds(chain.fuse);
  for (int i = 0; i < chain.level_count; ++i) {
    const StarLevel& level = chain.levels[i];
    halo_x += level.kw / 2;
    work += multiply_adds(level.pw1) + multiply_adds(level.pw2) + multiply_adds(level.distill) +
            static_cast<int64_t>(level.kh) * level.kw * level.pw1.co;
  }
  RegionGrid grid{images, chain.height, chain.width, 1, 1};
  // Columns: the fewest tiles that about fit the cache, but none so narrow that its halo outweighs
  // it.
  const int64_t most_tiles =
      part_count(chain.width, chain.width, std::max<int64_t>(64, 16 * halo_x));
  int64_t bytes = 0;
  for (;; ++grid.tiles) {
    scratch_kernel(&chain, (chain.width + grid.tiles - 1) / grid.tiles, &bytes);
    if (bytes <= 2 * cache_bytes() || grid.tiles >= most_tiles) break;
  }
  const int64_t threads = threads_for(images * chain.height * chain.width * work);
  const int64_t parts = images * grid.tiles;
  // Rows: two threads share a band and meet in it, wherever they then are, so that neither waits
  // for the other. Neighbouring bands both compute the halo between them: no more bands than give
  // every thread an end of one to begin at, the last of them half as high if one thread is left.
  const int64_t shares =
      std::clamp<int64_t>((threads + parts - 1) / parts, 1, std::max<int64_t>(1, chain.height / 4));
  const int64_t bands = (shares + 1) / 2;
  if (chain.before != nullptr && (threads == 1 || grid.tiles > 1 || bands > 1)) {
    // Two threads gain by one join less; one thread works faster in two sweeps. And the rows of a
    // halo would pass the gate twice, which replaces what it reads.
    run_gate(*chain.before, images);
    chain.before = nullptr;
  }
  if (threads == 1) {
    for (int64_t i = 0; i < parts; ++i) {
      const Region region = grid.at(i);
      run_kernel(&chain, &region, false, nullptr, thread_scratch(static_cast<size_t>(bytes)));
    }
    return;
  }
  std::vector<ChainMeeting> meetings(static_cast<size_t>(parts * bands));
  // First the upper ends of all, then the lower ends of those that are not done yet.
  run_tasks(threads, 2 * parts * bands, [&](int64_t i) {
    const bool upwards = i >= parts * bands;
    const int64_t at = upwards ? i - parts * bands : i;
    const int64_t band = at / parts;
    Region region = grid.at(at % parts);
    region.y0 = chain.height * (2 * band) / shares;
    region.y1 = chain.height * std::min(2 * band + 2, shares) / shares;
    run_kernel(&chain, &region, upwards, &meetings[static_cast<size_t>(at)],
               thread_scratch(static_cast<size_t>(bytes)));
  });
}

}  // namespace sdan_fast
