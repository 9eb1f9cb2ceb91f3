// How a weight gradient is cut into blocks: tiles, shared memory, grid. Plain arithmetic, the same
// for GPU and host.
#pragma once

#include "conv_plan.h"
#include "conv_wgrad.cuh"

namespace sdan_fast::cuda {

// The weight gradient of 1 x K: 8 rows, the whole width if it is not too wide.
inline void plan_row_tile(ConvParams& p) {
  const int unit = kGradOutputs * p.dw, halo = (p.kw - 1) / 2 * p.dw;
  p.tile_w = static_cast<int32_t>(round_up64(p.width, unit));
  if (p.tile_w > 512) {
    const int aligned_unit = std::lcm(unit, 8);
    p.tile_w = aligned_unit * std::max(1, 448 / aligned_unit);
  }
  p.tile_h = kGradRows;
  p.rows = kGradRows + (p.kh - 1) * p.dh;
  p.pitch = static_cast<int32_t>(round_up64(p.tile_w + 2 * halo + 7 + 7, 32) +
                                 4);  // 4 modulo 32, for the banks
}

// The weight gradient of all but 1 x K: narrow tiles with their halo, as tall as fits beside the
// gradient's tiles without one.
inline void plan_column_tile(ConvParams& p) {
  const int64_t unit = int64_t{kColumnOutputs} * p.dh, halo = (p.kh - 1) / 2 * p.dh,
                halo_x = (p.kw - 1) / 2 * p.dw;
  for (int64_t w = std::min<int64_t>(32, round_up64(p.width, 4)); w >= 4;
       w = round_up64(w / 2, 4)) {
    p.tile_w = static_cast<int32_t>(w);
    p.pitch = static_cast<int32_t>(round_up64(w + 2 * halo_x + (halo_x || w % 8 ? 7 : 0), 8));
    const int64_t room = kSharedGoal / 4 / p.pitch;  // rows
    const int64_t most = (room - 2 * halo) / 2 / unit * unit;
    p.tile_h = static_cast<int32_t>(unit);
    if (most >= unit) {
      p.tile_h =
          static_cast<int32_t>(round_up64(ceil_div(p.height, ceil_div(p.height, most)), unit));
      break;
    }
    if (w == 4) break;
  }
  p.rows = static_cast<int32_t>(p.tile_h + 2 * halo);
}

struct GradPlan : ConvPlan {
  int warps_per_unit = 1;
  int64_t partials = 0;  // rows of the partial sums
};

// Only 1 x K strips take the row-wise tile.
inline GradPlan plan_weight_gradient(const ConvShape& s) {
  GradPlan plan;
  if (too_long(s)) return plan;
  ConvParams& p = plan.p = conv_params(s);
  const int64_t length = p.vertical ? p.height : p.width, other = p.vertical ? p.width : p.height;
  if (s.channels_last) {
    const int64_t inner = p.vertical ? p.kh : p.kw, outer = p.vertical ? p.kw : p.kh;
    const int64_t d = p.vertical ? p.dh : p.dw, units = outer * ceil_div(inner, kGradTaps);
    const int64_t across = ceil_div(p.channels, 128), bx = ceil_div(p.channels, across),
                  by = std::max<int64_t>(1, 256 / bx);
    const int64_t groups = ceil_div(length, kLastOutputs * d) * d * other;
    const int64_t blocks =
        std::clamp<int64_t>(ceil_div(kManyBlocks, across * units), 1, ceil_div(groups, by));
    plan.fits = across <= 65535 && units <= 65535;
    plan.config.block = dim3(static_cast<unsigned>(bx), static_cast<unsigned>(by));
    plan.config.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(across),
                            static_cast<unsigned>(units));
    plan.config.shared_bytes = static_cast<size_t>(bx * by * (kGradTaps + 1) * 4);
    plan.partials = blocks * p.channels;
    return plan;
  }
  const bool vertical = p.kh > 1 || p.kw == 1;
  const int64_t inner = vertical ? p.kh : p.kw, outer = vertical ? p.kw : p.kh;
  const int64_t units = outer * ceil_div(inner, kGradTaps);
  p.vertical = vertical;
  if (vertical)
    plan_column_tile(p);
  else
    plan_row_tile(p);
  finish_tiles(p);
  const int64_t at_once = std::min<int64_t>(units, 8);
  plan.warps_per_unit = static_cast<int>(8 / at_once);
  const int64_t warps = at_once * plan.warps_per_unit, tiles = int64_t{p.tiles_y} * p.tiles_x;
  p.splits = static_cast<int32_t>(std::clamp<int64_t>(ceil_div(kManyBlocks, p.planes), 1, tiles));
  const int64_t bytes = ((int64_t{p.rows} + p.tile_h) * p.pitch + warps * (kGradTaps + 1)) * 4;
  plan.fits = bytes <= kSharedMost && p.planes * p.splits <= kMostBlocks &&
              ceil_div(units, at_once) <= 65535;
  plan.config.block = dim3(static_cast<unsigned>(warps * 32));
  plan.config.grid = dim3(static_cast<unsigned>(p.planes * p.splits),
                          static_cast<unsigned>(ceil_div(units, at_once)));
  plan.config.shared_bytes = static_cast<size_t>(bytes);
  plan.partials = p.planes * p.splits;
  return plan;
}

}  // namespace sdan_fast::cuda
