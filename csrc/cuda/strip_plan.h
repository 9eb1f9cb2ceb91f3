// How a pass of one or two strips is cut into blocks. Plain arithmetic, the same for GPU and host.
#pragma once

#include <initializer_list>

#include "conv_plan.h"
#include "strip_conv_chain.cuh"

namespace sdan_fast::cuda {

struct StripPlan {
  bool fits = false;
  int taps = 0;  // of every convolution; 0 if they differ
  StripParams p{};
  Config config;
};

inline void set_grid(StripPlan& plan, int64_t blocks) {
  plan.fits = blocks <= kMostBlocks;
  plan.config.grid = dim3(static_cast<unsigned>(std::min(blocks, kMostBlocks)));
}

inline StripParams strip_params(DType dtype, const StripPass& s) {
  StripParams p{};
  p.dtype = dtype, p.steps = s.steps, p.flip = s.flip;
  p.channels = static_cast<int32_t>(s.c);
  p.edge_taps = s.edge.taps, p.edge_dilation = s.edge.dilation;
  const int64_t axis = s.vertical ? s.h : s.w;
  for (int i = 0; i < s.steps; ++i) {
    const Strip& from = s.strip[i];
    StripStep& to = p.step[i];
    to.weight_taps = from.taps;
    // Taps further out than the image is long multiply zeros.
    to.taps =
        static_cast<int32_t>(std::min<int64_t>(from.taps, 2 * ((axis - 1) / from.dilation) + 1));
    to.dilation = to.taps == 1 ? 1 : from.dilation;
    to.halo = (to.taps - 1) / 2 * to.dilation;
    to.outputs = kFewOutputs;
    to.inverse = to.dilation > 1 ? static_cast<uint32_t>((int64_t{1} << 32) / to.dilation + 1) : 0;
  }
  return p;
}

// Whether all rows of tensors of rows of `row` elements begin at a multiple of 4 of them.
inline bool strip_aligned(DType dtype, const StripPass& s, int64_t row) {
  const size_t bytes = dtype == DType::kFloat32 ? 16 : 8;
  return row % 4 == 0 && aligned(s.x, bytes) && aligned(s.y, bytes) && aligned(s.gate, bytes);
}

// Groups of a thread's outputs of a convolution at n positions, with those out of range.
inline int64_t strip_groups(const StripStep& s, int64_t n) {
  return ceil_div(n, int64_t{s.outputs} * s.dilation) * s.dilation;
}

// Whether a pass has a kernel for its number of taps, which then may choose a thread's outputs.
inline bool strip_chooses(const StripParams& p, bool last) {
  return strip_chooses(p.step[0].taps, last) && (p.steps == 1 || p.step[0].taps == p.step[1].taps);
}

// A thread's outputs at n positions: many where that saves a tenth of the multiply-adds of all
// warps, 32 / quads groups abreast, and of what every group costs besides, about those of a
// quarter.
inline int32_t choose_outputs(StripStep s, int64_t n, int64_t quads) {
  const auto cost = [&](int32_t outputs) {
    const int64_t period = int64_t{outputs} * s.dilation;
    const int64_t groups = n / period * s.dilation + std::min<int64_t>(s.dilation, n % period);
    return ceil_div(groups * quads, 32) * (4 * outputs * s.taps + 2 * (outputs + s.taps) + 40);
  };
  return 10 * cost(kManyOutputs) < 9 * cost(kFewOutputs) ? kManyOutputs : kFewOutputs;
}

// Sets what follows from the outputs of a block along the axis; returns the bytes of shared memory.
inline int64_t set_segment(StripParams& p, int64_t segment, int64_t quads, bool row, bool last) {
  const int two = p.steps - 1;
  const int64_t h1 = p.step[1].halo, n = std::min<int64_t>(p.length, segment + 2 * h1);
  for (int i = 0; i < p.steps; ++i)
    p.step[i].outputs = last                     ? kManyOutputs
                        : strip_chooses(p, last) ? choose_outputs(p.step[i], i ? segment : n, quads)
                                                 : kFewOutputs;
  const auto reached = [&](int i, int64_t count) {
    return p.step[i].outputs * strip_groups(p.step[i], count) + 2 * p.step[i].halo;
  };
  int64_t staged = reached(0, n);
  if (row) {  // from where a sector begins: before the image, or before a segment in it
    const auto lead = [](int64_t halo) { return (kRowAlign - halo % kRowAlign) % kRowAlign; };
    const int64_t h0 = p.step[0].halo;
    staged = round_up64(staged + std::max(lead(h0), segment < p.length ? lead(h0 + h1) : 0), 4);
  }
  const int64_t second = two                ? reached(1, segment)
                         : row || p.restage ? segment  // the outputs
                                            : 0;
  const auto taps = [&](int i) {
    return last ? p.step[i].taps * 4 * (quads | 1) : round_up64(p.step[i].taps, 4);
  };
  p.segment = static_cast<int32_t>(segment);
  p.segments = static_cast<int32_t>(ceil_div(p.length, segment));
  p.positions[0] = static_cast<int32_t>(staged), p.positions[1] = static_cast<int32_t>(second);
  const int64_t taps1 = taps(0), offsets = taps1 + (two ? taps(1) : 0),
                tile = offsets + (row ? 0 : p.steps * 4 * quads), next = tile + staged * 4 * quads;
  p.taps1 = static_cast<int32_t>(taps1), p.offsets = static_cast<int32_t>(offsets);
  p.tile[0] = static_cast<int32_t>(tile), p.tile[1] = static_cast<int32_t>(next);
  return 4 * (next + second * 4 * quads);
}

// Blocks of `quads` quads of lines and of as long segments as there is room for; of shorter ones if
// the GPU would be idle otherwise and their halos are no more than 15 % of them.
inline StripPlan plan_tiles(StripParams p, int64_t quads, bool row, bool last) {
  StripPlan plan;
  const int64_t length = p.length, unit = kRowAlign;
  const auto cut = [&](int64_t segments) {
    return segments == 1 ? length : round_up64(ceil_div(length, segments), unit);
  };
  const int64_t most = ceil_div(length, unit), halos = 2 * (p.step[0].halo + p.step[1].halo);
  int64_t segments = 0;
  for (const int64_t limit : {kSharedGoal, kSharedMost}) {
    if (set_segment(p, cut(most), quads, row, last) > limit) {
      segments = most + 1;
      continue;
    }
    for (segments = 1; set_segment(p, cut(segments), quads, row, last) > limit;) ++segments;
    // Halos of more than a half of a segment cost more than the occupancy.
    if (segments == 1 || cut(segments) >= 2 * halos) break;
  }
  if (segments > most) return plan;
  p.stripes = static_cast<int32_t>(ceil_div(p.width, 4 * quads));
  segments = std::max(segments, std::min(ceil_div(2 * kSms, p.planes * p.stripes),
                                         length / std::max<int64_t>(1, 7 * halos)));
  plan.config.shared_bytes = static_cast<size_t>(set_segment(p, cut(segments), quads, row, last));
  // About two groups of outputs a thread, of few outputs where there is a choice: what it takes to
  // get there is an eighth of all then.
  const auto items_of = [&](StripStep s, int64_t n) {
    if (!last) s.outputs = kFewOutputs;
    return quads * strip_groups(s, n);
  };
  const int64_t items =
      std::max(items_of(p.step[0], std::min<int64_t>(length, p.segment + 2 * p.step[1].halo)),
               items_of(p.step[p.steps - 1], p.segment));
  const int64_t threads = std::clamp<int64_t>((items + 32) / 64 * 32, 32, strip_threads(last));
  plan.config.block = dim3(static_cast<unsigned>(quads), static_cast<unsigned>(threads / quads));
  set_grid(plan, p.planes * p.segments * p.stripes);
  plan.p = p;
  return plan;
}

// What the SM of a large GPU with the most blocks has to do, in outputs of a quad; a thread's way
// there counts as two of them.
inline int64_t strip_cost(const StripPlan& plan) {
  const int64_t quads = plan.config.block.x, threads = quads * plan.config.block.y;
  return ceil_div(plan.config.grid.x, kSms) * (plan.p.segment * quads + 2 * threads);
}

// The plan of least cost among stripes of these numbers of quads; of equal ones the first.
inline StripPlan best_tiles(const StripParams& p, std::initializer_list<int64_t> quads, bool row,
                            bool last) {
  StripPlan best;
  for (const int64_t some : quads) {
    const StripPlan plan = plan_tiles(p, some, row, last);
    if (plan.fits && (!best.fits || strip_cost(plan) < strip_cost(best))) best = plan;
  }
  return best;
}

// conv_row: 8, 16 or 32 rows, the whole width if there is room.
inline StripPlan plan_row(DType dtype, const StripPass& s) {
  StripParams p = strip_params(dtype, s);
  p.planes = s.n * s.c;
  p.length = static_cast<int32_t>(s.w), p.width = static_cast<int32_t>(s.h);
  p.wide = strip_aligned(dtype, s, s.w);
  return best_tiles(p, {8, 4, 2}, true, false);
}

// conv_column: stripes of 32 or 16 columns, of 8 where there is no room for more, and of all where
// they are few: a pixel's channels are no whole sectors, but a row of pixels is.
inline StripPlan plan_column(DType dtype, const StripPass& s) {
  StripParams p = strip_params(dtype, s);
  const bool last = s.channels_last;
  p.planes = !last ? s.n * s.c : s.vertical ? s.n : s.n * s.h;
  const int64_t length = s.vertical ? s.h : s.w, width = !last ? s.w : s.vertical ? s.w * s.c : s.c;
  if (width > kMostBlocks) return StripPlan{};
  p.length = static_cast<int32_t>(length), p.width = static_cast<int32_t>(width);
  p.wide = strip_aligned(dtype, s, width);
  // Threads with neighbouring lines write whole sectors, unless the lines are few and the next
  // thread's are nine pixels away.
  p.restage = last && !s.vertical && p.step[p.steps - 1].dilation == 1;
  StripPlan plan;
  const int64_t all = last ? ceil_div(width, 4) : round_up64(ceil_div(width, 4), 2);
  if (all <= 16) plan = plan_tiles(p, all, false, last);
  if (plan.fits && (all < 8 || (last && !s.vertical))) return plan;
  plan = best_tiles(p, {8, 4}, false, last);
  return plan.fits ? plan : plan_tiles(p, 2, false, last);
}

inline StripPlan plan_strips(DType dtype, const StripPass& s) {
  StripPlan plan;
  for (int i = 0; i < s.steps; ++i)
    if (s.strip[i].taps > (1 << 20) || s.strip[i].dilation > (1 << 24)) return plan;
  if (s.h * s.w > kMostBlocks || s.c > kMostBlocks) return plan;
  plan = s.channels_last || s.vertical ? plan_column(dtype, s) : plan_row(dtype, s);
  const int taps = plan.p.step[0].taps;
  plan.taps = s.steps == 1 || taps == plan.p.step[1].taps ? taps : 0;
  return plan;
}

}  // namespace sdan_fast::cuda
