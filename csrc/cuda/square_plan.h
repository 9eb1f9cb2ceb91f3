// How a square, or any other kernel that is no strip, is cut into tiles of contiguous planes. Plain
// arithmetic, the same for GPU and host.
#pragma once

#include "conv_plan.h"
#include "conv_square.cuh"

namespace sdan_fast::cuda {

struct SquarePlan {
  bool fits = false;
  SquareParams p{};
  Config config;
  int k = 1, d = 0;  // which instance of the kernel
};

// The dilation of the instance that takes it: those of SDAN's squares have one of their own.
inline int square_dilation(const ConvShape& s) {
  if (s.kh != s.kw || s.dh != s.dw) return 0;
  const bool own = s.dh == 1 ? s.kh == 3 || s.kh == 5 || s.kh == 7 || s.kh == 9
                             : s.dh == (s.kh + 1) / 2 && (s.kh == 5 || s.kh == 7 || s.kh == 9);
  return own ? s.dh : 0;
}

// The tile of least cost: clocks that the SMs of a large GPU compute for, as long as the one with
// the most blocks, and those that all bytes take to come and go.
inline SquarePlan choose_square(DType dtype, const ConvShape& s) {
  SquarePlan plan;
  if (too_long(s)) return plan;
  SquareParams p{};
  p.dtype = dtype, p.planes = s.n * s.c;
  p.channels = static_cast<int32_t>(s.c), p.height = static_cast<int32_t>(s.h),
  p.width = static_cast<int32_t>(s.w);
  p.kh = s.kh, p.kw = s.kw;
  p.dh = s.kh == 1 ? 1 : s.dh, p.dw = s.kw == 1 ? 1 : s.dw;
  plan.d = square_dilation(s);
  for (const int k : {3, 5, 7, 9})
    if (s.kh == k) plan.k = k;
  const int64_t unit = square_rows(plan.k, plan.d), each = plan.d ? 4 : 1,  // columns of a thread
      rows = ceil_div(p.height, p.dh), margin = ceil_div(int64_t{p.kw - 1} / 2 * p.dw, 4),
                halo = p.kh - 1;
  const int64_t taps = round_up64(square_taps_pitch(p.kh) * (plan.d ? p.kh : p.kw), 4);
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2, sector = 32 / size;
  // Instructions of a thread: for its outputs, for a quad that it stages, beside them.
  const int64_t outputs = unit * each * (p.kh * p.kw + 3) + 60, quad = 13, beside = 100;
  constexpr int64_t kClockBytes = 13;  // of DRAM, per SM
  int64_t least = 0;
  for (const int64_t limit : {kSharedGoal, kSharedMost}) {
    for (int64_t parts = 1; parts <= std::min<int64_t>(8, ceil_div(p.width, sector)); ++parts) {
      const int64_t w = round_up64(ceil_div(p.width, parts), parts > 1 ? sector : 4),
                    across = ceil_div(p.width, w), pitch = w / 4 + 2 * margin;
      for (int64_t h = unit; h < rows + unit; h += unit) {
        if ((taps + (h + halo) * pitch * 4) * 4 > limit) break;
        const int64_t down = ceil_div(rows, h), blocks = p.planes * p.dh * across * down;
        const int64_t warps = ceil_div(h / unit * w / each, 32), block = warps * 32 * outputs +
                                                                         (h + halo) * pitch * quad +
                                                                         kSquareThreads * beside;
        const int64_t read = (rows + (down - 1) * halo) *
                             (p.width + 2 * (across - 1) * round_up64(4 * margin, sector));
        const int64_t cost = ceil_div(blocks, kSms) * block / 128 +
                             p.planes * p.dh * (read + rows * p.width) * size / kClockBytes / kSms;
        if (blocks > kMostBlocks || (plan.fits && cost >= least)) continue;
        least = cost, plan.fits = true;
        p.tile_h = static_cast<int32_t>(h), p.tile_w = static_cast<int32_t>(w);
        p.tiles_y = static_cast<int32_t>(down), p.tiles_x = static_cast<int32_t>(across);
        p.pitch = static_cast<int32_t>(pitch);
      }
    }
    if (plan.fits) break;
  }
  if (!plan.fits) return plan;
  p.margin = static_cast<int32_t>(margin), p.tile = static_cast<int32_t>(taps);
  plan.p = p;
  plan.config.shared_bytes =
      static_cast<size_t>(4 * (taps + int64_t{p.tile_h + p.kh - 1} * p.pitch * 4));
  const int64_t items = p.tile_h / unit * (plan.d ? p.tile_w / 4 : p.tile_w),
                bx = std::min<int64_t>(p.pitch, kSquareThreads),
                by = std::clamp<int64_t>(ceil_div(items, bx), 1, kSquareThreads / bx);
  plan.config.block = dim3(static_cast<unsigned>(bx), static_cast<unsigned>(by));
  plan.config.grid = dim3(static_cast<unsigned>(p.planes * p.dh * p.tiles_y * p.tiles_x));
  return plan;
}

inline const SquarePlan& plan_square(DType dtype, const ConvShape& s) {
  return remembered<SquarePlan>(dtype, s, [&] { return choose_square(dtype, s); });
}

}  // namespace sdan_fast::cuda
