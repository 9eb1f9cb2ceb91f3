// How a weight gradient is cut into blocks: tiles, shared memory, grid. Plain arithmetic, the same
// for GPU and host.
#pragma once

#include <numeric>
#include <tuple>

#include "conv_plan.h"
#include "conv_wgrad.cuh"
#include "conv_wgrad_mma.cuh"

namespace sdan_fast::cuda {

// Regions of a plane: small enough for float32 sums, then such that what several of them read is an
// eighth of all reading at most, then the least to copy for the SM of a large GPU that has most of
// them. They are multiples of `grain` columns wide.
inline void plan_regions(RegionParams& p, const ConvShape& s, int64_t most_pixels, int64_t grain) {
  constexpr int kCounts[] = {1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64};
  constexpr int64_t kFixed = 2000;  // what a block does besides, in pixels
  constexpr int S = 16;             // pixels: a sector of 16 bits, and a side of a product
  const ConvParams c = conv_params(s);
  p.channels = c.channels, p.height = c.height, p.width = c.width;
  p.kh = c.kh, p.kw = c.kw, p.dh = c.dh, p.dw = c.dw;
  const int64_t planes = s.n * s.c, halo_y = int64_t{p.kh - 1} / 2 * p.dh,
                halo_x = int64_t{p.kw - 1} / 2 * p.dw;
  const int64_t high = ceil_div(p.height, S), wide = ceil_div(p.width, grain);
  const int64_t sectors = ceil_div(halo_x, S) * S, once = int64_t{p.height} * p.width;
  using Cost = std::tuple<bool, bool, int64_t>;
  Cost least{};
  for (const int ny : kCounts) {
    for (const int nx : kCounts) {
      if (ny > high || nx > wide) break;
      const int64_t h = ceil_div(high, ny) * S, w = ceil_div(wide, nx) * grain;
      const int64_t down = ceil_div(p.height, h), across = ceil_div(p.width, w);
      // Of the tensor with the halo; the sum of both is at most an eighth more than once each.
      const int64_t read = p.height * p.width + 2 * halo_y * (down - 1) * p.width +
                           2 * sectors * (across - 1) * p.height;
      const int64_t each = 2 * h * w + 2 * halo_y * w + 2 * sectors * h + kFixed;
      const Cost cost{h * w > most_pixels, read - once > once / 4,
                      ceil_div(down * across * planes, kSms) * each};
      if (p.region_h && !(cost < least)) continue;
      least = cost;
      p.region_h = static_cast<int32_t>(h), p.region_w = static_cast<int32_t>(w);
    }
  }
  p.regions_y = static_cast<int32_t>(ceil_div(p.height, p.region_h));
  p.regions_x = static_cast<int32_t>(ceil_div(p.width, p.region_w));
}

// ---- tensor cores

// Pairs of 8 columns that the kernel is compiled for, and how many vertical taps of so many fit in
// a warp's registers.
constexpr int kMmaPairs[] = {1, 2, 3, 4, 6, 8, 12};
constexpr int mma_units(int pairs) {
  return pairs == 1 ? 6 : pairs == 2 ? 4 : pairs == 3 ? 3 : pairs == 4 ? 2 : 1;
}

struct MmaPlan {
  bool fits = false;
  MmaParams p{};
  Config config;
  int pairs = 1;
  int64_t partials = 0;  // rows of the partial sums: images * channels * regions
};

// The tile of a region that stages least, of those of which two fit.
inline void plan_tile(MmaParams& p, int64_t halo_y, int pairs) {
  constexpr int S = kMmaSide;
  const auto bytes = [&](int64_t h, int64_t w) {
    return (h * (w + S * (pairs - 1) + 8) + (h + 2 * halo_y) * (w + 8)) * 2;
  };
  p.tile_h = p.tile_w = S;
  int64_t least = 0;
  for (int64_t w = S; w <= p.region_w && bytes(S, w) <= kSharedGoal / 2; w += S) {
    for (int64_t h = S; h <= p.region_h && bytes(h, w) <= kSharedGoal / 2; h += S) {
      const int64_t staged = ceil_div(p.region_h, h) * ceil_div(p.region_w, w) * bytes(h, w);
      if (least && staged >= least) continue;
      least = staged;
      p.tile_h = static_cast<int32_t>(h), p.tile_w = static_cast<int32_t>(w);
    }
  }
  p.rows = static_cast<int32_t>(p.tile_h + 2 * halo_y);
  p.columns = p.tile_w + S * (pairs - 1);
}

inline MmaPlan plan_wgrad_mma(const ConvShape& s) {
  MmaPlan plan;
  if (too_long(s)) return plan;
  MmaParams& p = plan.p;
  plan_regions(p, s, 1 << 16, kMmaSide);
  const int64_t planes = s.n * s.c, halo_y = int64_t{p.kh - 1} / 2 * p.dh,
                halo_x = int64_t{p.kw - 1} / 2 * p.dw;
  p.lead = static_cast<int32_t>(round_up64(halo_x, 8));
  const int64_t needed = ceil_div(p.lead + kMmaSide + halo_x, kMmaSide);
  const auto* pairs =
      std::find_if(std::begin(kMmaPairs), std::end(kMmaPairs), [&](int n) { return n >= needed; });
  if (pairs == std::end(kMmaPairs)) return plan;
  plan.pairs = *pairs;
  plan_tile(p, halo_y, plan.pairs);
  p.groups = static_cast<int32_t>(ceil_div(p.kh, mma_units(plan.pairs)));
  p.units = static_cast<int32_t>(ceil_div(p.kh, p.groups));
  p.groups = static_cast<int32_t>(ceil_div(p.kh, p.units));
  plan.partials = planes * p.regions_y * p.regions_x;
  // Large blocks where there are few of them.
  const int64_t section = (kMmaSide * product_pitch(plan.pairs) + kMmaSide) * 4;
  const int64_t most = std::min<int64_t>(plan.partials < 264 ? kMmaThreads / 32 : kMmaThreads / 64,
                                         kSharedGoal / section);
  const int64_t here = std::min<int64_t>(p.groups, most);
  p.splits = static_cast<int32_t>(most / here);
  const int64_t warps = here * p.splits,
                tiles = ceil_div(p.region_h, p.tile_h) * ceil_div(p.region_w, p.tile_w);
  const int64_t stage =
      (int64_t{p.tile_h} * (p.columns + 8) + int64_t{p.rows} * (p.tile_w + 8)) * 2;
  const int64_t bytes = std::max(stage * (tiles > 1 ? 2 : 1), warps * section);
  plan.fits =
      bytes <= kSharedMost && plan.partials <= kMostBlocks && ceil_div(p.groups, here) <= 65535;
  plan.config.block = dim3(static_cast<unsigned>(warps * 32));
  plan.config.grid =
      dim3(static_cast<unsigned>(plan.partials), static_cast<unsigned>(ceil_div(p.groups, here)));
  plan.config.shared_bytes = static_cast<size_t>(bytes);
  return plan;
}

// ---- float32, and what is too wide for tensor cores

struct TilePlan {
  bool fits = false, vertical = false;
  TileParams p{};
  Config config;
  int inner = kGradTaps, outer = 1;  // taps of a thread
  int64_t partials = 0;
};

// Squares in float32 have all of their taps in registers, the others up to 12 at a time.
inline TilePlan plan_wgrad_tile(DType dtype, const ConvShape& s) {
  TilePlan plan;
  if (too_long(s)) return plan;
  TileParams& p = plan.p;
  plan_regions(p, s, 1 << 15, 32);
  // Only 1 x K strips take the row-wise tile.
  const bool vertical = plan.vertical = p.kh > 1 || p.kw == 1;
  const int inner = vertical ? p.kh : p.kw, outer = vertical ? p.kw : p.kh;
  const bool square = dtype == DType::kFloat32 && inner == outer &&
                      (inner == 3 || inner == 5 || inner == 7 || inner == 9);
  if (square)
    plan.inner = plan.outer = inner;
  else if (ceil_div(inner, kMoreGradTaps) < ceil_div(inner, kGradTaps))
    plan.inner = kMoreGradTaps;
  const int64_t units = square ? 1 : outer * ceil_div(inner, plan.inner);
  const int64_t halo_y = int64_t{p.kh - 1} / 2 * p.dh, halo_x = int64_t{p.kw - 1} / 2 * p.dw;
  const int64_t at_once = std::min<int64_t>(units, 8);
  p.warps_per_unit = static_cast<int32_t>(8 / at_once);
  const int64_t warps = at_once * p.warps_per_unit;
  p.lead = static_cast<int32_t>(round_up64(halo_x, kGroup));
  const int64_t most_shared = capability() >= 8 ? kSharedLarge : kSharedMost;
  int64_t least = 0, bytes = 0;
  const auto consider = [&](int64_t h, int64_t w) {
    // Pitches: an odd number of 16 bytes, and of the row-wise tile 4 modulo 32, for the banks.
    const int64_t columns = round_up64(p.lead + w + halo_x, kGroup);
    const int64_t pitch = vertical ? columns + 4 : round_up64(columns, 32) + 4;
    const int64_t pitch_g = vertical ? round_up64(w, kGroup) + 4 : round_up64(w, 32) + 4;
    const int64_t stage = ((h + 2 * halo_y) * pitch + h * pitch_g) * 4;
    const int64_t tiles = ceil_div(p.region_h, h) * ceil_div(p.region_w, w);
    const int64_t needed =
        std::max(stage * (tiles > 1 ? 2 : 1), warps * (int64_t{plan.inner} * plan.outer + 1) * 4);
    if (needed > most_shared || (least && tiles * (stage + 16 * h * w) >= least)) return;
    least = tiles * (stage + 16 * h * w), bytes = needed;  // copies, and arithmetic
    p.tile_h = static_cast<int32_t>(h), p.tile_w = static_cast<int32_t>(w);
    p.rows = static_cast<int32_t>(h + 2 * halo_y), p.columns = static_cast<int32_t>(columns);
    p.pitch = static_cast<int32_t>(pitch), p.pitch_g = static_cast<int32_t>(pitch_g);
  };
  const int64_t unit = int64_t{vertical ? kColumnOutputs : kGradOutputs} * (vertical ? p.dh : p.dw);
  const auto consider_all = [&](std::initializer_list<int> widths) {
    if (vertical) {
      for (const int64_t w : widths)
        for (int64_t h = unit; w <= p.region_w && h < p.region_h + unit && h <= 32 * unit;
             h += unit)
          consider(h, w);
    } else {
      // Whole groups of outputs; tiles beside one another begin with an access.
      const int64_t both = std::lcm(unit, kGroup);
      consider(kGradRows, round_up64(p.region_w, unit));
      for (int64_t w = both; w < p.region_w && w <= 8 * both; w += both) consider(kGradRows, w);
    }
  };
  consider_all({32, 64, 96, 128});  // narrow tiles have bank conflicts
  if (!least) consider_all({8, 16});
  plan.partials = int64_t{s.n} * s.c * p.regions_y * p.regions_x;
  plan.fits = least && plan.partials <= kMostBlocks && ceil_div(units, at_once) <= 65535;
  plan.config.block = dim3(static_cast<unsigned>(warps * 32));
  plan.config.grid =
      dim3(static_cast<unsigned>(plan.partials), static_cast<unsigned>(ceil_div(units, at_once)));
  plan.config.shared_bytes = static_cast<size_t>(bytes);
  return plan;
}

// ---- channels_last

struct WgradLastPlan : ConvPlan {
  int vector = 1;                        // channels of a thread
  int taps = kGradTaps, taps_outer = 1;  // of a thread
  int64_t partials = 0;                  // rows of the partial sums
};

// A thread has two channels in 16 bits, of strips four (one where they are odd), and the taps of
// plan_wgrad_tile; of 9 x 9 half of them. together: how many channels may be read at once.
inline WgradLastPlan plan_wgrad_last(DType dtype, const ConvShape& s, int together) {
  WgradLastPlan plan;
  if (too_long(s)) return plan;
  ConvParams& p = plan.p = conv_params(s);
  const int64_t length = p.vertical ? p.height : p.width, other = p.vertical ? p.width : p.height;
  const int inner = p.vertical ? p.kh : p.kw, outer = p.vertical ? p.kw : p.kh;
  const bool half = dtype != DType::kFloat32, single = half && together == 1;
  plan.vector = half ? std::min(together, outer == 1 ? 4 : 2) : 1;
  if (inner == outer && !single && (inner == 3 || inner == 5 || inner == 7 || inner == 9))
    plan.taps = inner, plan.taps_outer = std::min(inner, inner == 9 ? 5 : 7);
  else if (ceil_div(inner, kMoreGradTaps) < ceil_div(inner, kGradTaps))
    plan.taps = kMoreGradTaps;
  const int64_t d = p.vertical ? p.dh : p.dw,
                units = ceil_div(outer, plan.taps_outer) * ceil_div(inner, plan.taps);
  const int64_t lanes = ceil_div(p.channels, plan.vector), across = ceil_div(lanes, 128),
                bx = ceil_div(lanes, across), most = std::max<int64_t>(1, 256 / bx);
  // Strips down the columns: few columns at a time, whole sectors of them, as rows are read again
  // where a block ends. Others read their neighbours' columns as well.
  const int64_t bytes = p.channels * (dtype == DType::kFloat32 ? 4 : 2), each = kLastOutputs * d,
                groups = ceil_div(length, each), whole = 32 / std::gcd(bytes, int64_t{32});
  const int64_t down = p.vertical && outer == 1 ? std::clamp<int64_t>(most / whole, 1, groups) : 1;
  p.abreast = static_cast<int32_t>(std::max<int64_t>(1, most / down));
  if (down > 1) p.abreast = static_cast<int32_t>(p.abreast / whole * whole);
  const int64_t by = p.vertical ? p.abreast * down : most;
  const int64_t turns =
      p.planes * (p.vertical ? ceil_div(other, p.abreast) * d * ceil_div(groups, down)
                             : ceil_div(groups * d * other, by));
  // A block for each SM of a large GPU, or as many as leave a thread sums of 128 pixels.
  const int64_t blocks = std::clamp<int64_t>(
      std::max(ceil_div(kSms, across * units), ceil_div(turns, 128 / kLastOutputs)), 1,
      std::max<int64_t>(1, turns));
  plan.fits = across <= 65535 && units <= 65535 && blocks <= kMostBlocks;
  plan.config.block = dim3(static_cast<unsigned>(bx), static_cast<unsigned>(by));
  plan.config.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(across),
                          static_cast<unsigned>(units));
  plan.config.shared_bytes =
      static_cast<size_t>(last_pitch(static_cast<int>(bx), static_cast<int>(by))) * plan.vector *
      (plan.taps + 1) * 4;
  plan.partials = blocks * p.channels;
  return plan;
}

}  // namespace sdan_fast::cuda
