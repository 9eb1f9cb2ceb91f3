// How a depth-wise convolution is cut into blocks: tiles, shared memory, grid. Plain arithmetic,
// the same for GPU and host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "depthwise_conv2d.cuh"
#include "launch.h"

namespace sdan_fast::cuda {

// Enough for four blocks on an SM of 228 KiB; the most that every architecture from sm_75 on has.
constexpr int64_t kSharedGoal = 48 * 1024, kSharedMost = 64 * 1024;
constexpr int64_t kManyBlocks = 1056;  // 8 for each SM of a large GPU
constexpr int64_t kMostBlocks = 0x7fffffff;

struct ConvPlan {
  bool fits = false;
  ConvParams p{};
  Config config;
};

inline int64_t round_up64(int64_t x, int64_t n) {
  return (x + n - 1) / n * n;
}

inline unsigned whole_warps(int64_t threads, int64_t most) {
  return static_cast<unsigned>(std::clamp<int64_t>(round_up64(threads, 32), 32, most));
}

// Squares: the tile that stages the fewest elements over the whole plane.
inline void plan_square_tile(ConvParams& p) {
  const int64_t unit = int64_t{kColumnOutputs} * p.dh, hy = int64_t{p.kh - 1} * p.dh,
                hx = int64_t{p.kw - 1} * p.dw;
  const int64_t taps = round_up64(int64_t{taps_pitch(p.kh)} * p.kw + 1, 4);
  int64_t best = -1;
  for (const int64_t limit : {kSharedGoal, kSharedMost}) {
    for (int64_t w = 32; w <= 256 && (w == 32 || w < p.width + 32); w += 32) {
      const int64_t pitch = round_up64(w + hx + 7, 8);
      for (int64_t h = unit; h <= 256 && (h == unit || h < p.height + unit); h += unit) {
        if ((taps + (h + hy) * pitch) * 4 > limit) break;
        const int64_t cost = ceil_div(p.height, h) * ceil_div(p.width, w) * (h + hy) * pitch;
        if (best >= 0 && cost >= best) continue;
        best = cost;
        p.tile_h = static_cast<int32_t>(h), p.tile_w = static_cast<int32_t>(w);
      }
    }
    if (best >= 0) break;
  }
  if (best < 0) p.tile_h = static_cast<int32_t>(unit), p.tile_w = 32;
  p.rows = static_cast<int32_t>(p.tile_h + hy);
  p.pitch = static_cast<int32_t>(round_up64(p.tile_w + hx + 7, 8));
}

inline ConvParams conv_params(const ConvShape& s) {
  ConvParams p{};
  p.planes = s.channels_last ? s.n : s.n * s.c;
  p.channels = static_cast<int32_t>(s.c), p.height = static_cast<int32_t>(s.h),
  p.width = static_cast<int32_t>(s.w);
  p.kh = s.kh, p.kw = s.kw, p.dh = s.dh, p.dw = s.dw;
  if (p.kh == 1)
    p.dh =
        1;  // a dilation along an axis with one tap means nothing, and would only widen the tiles
  if (p.kw == 1) p.dw = 1;
  p.splits = 1;
  p.vertical = p.kh > 1;
  return p;
}

inline void finish_tiles(ConvParams& p) {
  p.tiles_y = static_cast<int32_t>(ceil_div(p.height, p.tile_h));
  p.tiles_x = static_cast<int32_t>(ceil_div(p.width, p.tile_w));
}

inline bool too_long(const ConvShape& s) {  // indices within an image and halos are 32 bits wide
  return s.h * s.w > kMostBlocks || s.c > kMostBlocks || int64_t{s.kh} * s.dh > (1 << 24) ||
         int64_t{s.kw} * s.dw > (1 << 24) || int64_t{s.kh} * s.kw > (1 << 20);
}

inline ConvPlan plan_square(const ConvShape& s) {
  ConvPlan plan;
  if (too_long(s)) return plan;
  ConvParams& p = plan.p = conv_params(s);
  plan_square_tile(p);
  finish_tiles(p);
  const int64_t items = int64_t{p.tile_h} / kColumnOutputs * p.tile_w;
  const int64_t bytes =
      (round_up64(int64_t{taps_pitch(p.kh)} * p.kw + 1, 4) + int64_t{p.rows} * p.pitch) * 4;
  plan.fits = bytes <= kSharedMost;
  plan.config.shared_bytes = static_cast<size_t>(bytes);
  // As few rounds as possible, and no larger a block than that takes.
  const int64_t most = conv_threads(1);
  plan.config.block = dim3(whole_warps(ceil_div(items, ceil_div(items, most)), most));
  plan.config.grid =
      dim3(static_cast<unsigned>(std::min(p.planes * p.tiles_y * p.tiles_x, kMostBlocks)));
  return plan;
}

// Channels go to lanes in `v`s, as many as there are up to 128; pixel groups fill the block up to
// 256 threads.
inline ConvPlan plan_last(const ConvShape& s, int v) {
  ConvPlan plan;
  if (too_long(s)) return plan;
  ConvParams& p = plan.p = conv_params(s);
  const int64_t taps = int64_t{p.kh} * p.kw, lanes = ceil_div(p.channels, v);
  const int64_t most = std::min<int64_t>(128, kSharedGoal / 4 / v / taps);
  if (most < 1) return plan;
  const int64_t across = ceil_div(lanes, most), bx = ceil_div(lanes, across),
                by = std::max<int64_t>(1, 256 / bx);
  const int64_t length = p.vertical ? p.height : p.width, other = p.vertical ? p.width : p.height;
  const int64_t d = p.vertical ? p.dh : p.dw;
  const int64_t groups = ceil_div(length, kLastOutputs * d) * d * other;
  const int64_t images = std::min<int64_t>(p.planes, 65535);
  // A thread takes several groups, to read its taps once for them, unless that leaves the GPU idle.
  const int64_t blocks =
      std::max(ceil_div(groups, by * 8),
               std::min(ceil_div(groups, by), ceil_div(kManyBlocks, images * across)));
  plan.fits = across <= 65535;
  plan.config.block = dim3(static_cast<unsigned>(bx), static_cast<unsigned>(by));
  plan.config.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(across),
                          static_cast<unsigned>(images));
  plan.config.shared_bytes = static_cast<size_t>(taps * bx * v * 4);
  return plan;
}

}  // namespace sdan_fast::cuda
