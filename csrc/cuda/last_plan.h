// How a square, or any other kernel that is no strip, is cut into tiles of channels_last tensors.
// Plain arithmetic, the same for GPU and host.
#pragma once

#include "conv_last.cuh"
#include "conv_plan.h"

namespace sdan_fast::cuda {

struct LastPlan {
  bool fits = false;
  LastParams p{};
  Config config;
  int k = 1;  // which instance of the kernel
};

// V channels of a thread; the tile of least cost, as plan_square's.
template <int V>
inline LastPlan choose_last(DType dtype, const ConvShape& s) {
  constexpr int v = V;
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  LastPlan plan;
  if (too_long(s)) return plan;
  LastParams p{};
  p.images = s.n, p.channels = static_cast<int32_t>(s.c);
  p.height = static_cast<int32_t>(s.h), p.width = static_cast<int32_t>(s.w);
  p.kh = s.kh, p.kw = s.kw;
  p.dh = s.kh == 1 ? 1 : s.dh, p.dw = s.kw == 1 ? 1 : s.dw;
  if (v > 1)
    for (const int k : {3, 5, 7, 9})
      if (s.kh == k) plan.k = k;
  const int64_t taps = int64_t{p.kh} * p.kw, vectors = ceil_div(p.channels, v),
                most = std::min<int64_t>(64, kSharedGoal / 4 / v / taps);
  if (most < 1) return plan;
  const int64_t splits = ceil_div(vectors, most), bx = ceil_div(vectors, splits),
                by = std::max<int64_t>(1, kLastThreads / bx);
  const int64_t unit = last_rows(plan.k), rows = ceil_div(p.height, p.dh),
                halo_x = int64_t{p.kw - 1} * p.dw;
  int64_t least = 0;
  for (int64_t w = 1; w <= 64; ++w) {
    const int64_t across = ceil_div(p.width, w);
    if (w > 1 && across == ceil_div(p.width, w - 1)) continue;
    for (int64_t g = 1; g * w <= 4 * by && g <= ceil_div(rows, unit); ++g) {
      const int64_t down = ceil_div(rows, g * unit), tiles = p.images * p.dh * across * down;
      const int64_t rounds = ceil_div(g * w, by), warps = ceil_div(by * bx, 32);
      const int64_t block = warps * 32 * (rounds * unit * v * (taps * 3 / 2 + 4) + 100);
      const int64_t read = std::min((g * unit + p.kh - 1) * across * down,
                                    (rows + (down - 1) * (p.kh - 1)) * across) *
                           std::min<int64_t>(w + halo_x, p.width);
      const int64_t bytes = p.images * p.dh * p.channels * (read + rows * p.width) * size;
      const int64_t cost = ceil_div(tiles * splits, kSms) * block / 128 + bytes / 13 / kSms;
      if (tiles > kMostBlocks || (plan.fits && cost >= least)) continue;
      least = cost, plan.fits = true;
      p.tile_g = static_cast<int32_t>(g), p.tile_w = static_cast<int32_t>(w);
      p.tiles_y = static_cast<int32_t>(down), p.tiles_x = static_cast<int32_t>(across);
    }
  }
  plan.fits = plan.fits && splits <= 65535;
  if (!plan.fits) return plan;
  plan.p = p;
  plan.config.block =
      dim3(static_cast<unsigned>(bx),
           static_cast<unsigned>(std::min<int64_t>(by, int64_t{p.tile_g} * p.tile_w)));
  plan.config.grid = dim3(static_cast<unsigned>(p.images * p.dh * p.tiles_y * p.tiles_x),
                          static_cast<unsigned>(splits));
  plan.config.shared_bytes = static_cast<size_t>(taps * bx * v * 4);
  return plan;
}

template <int V>
const LastPlan& plan_last(DType dtype, const ConvShape& s) {
  struct Plan : LastPlan {};  // of this V
  return remembered<Plan>(dtype, s, [&] { return Plan{choose_last<V>(dtype, s)}; });
}

}  // namespace sdan_fast::cuda
