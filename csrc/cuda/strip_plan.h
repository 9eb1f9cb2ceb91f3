// How a pass of one or two strips is cut into blocks. Plain arithmetic, the same for GPU and host.
#pragma once

#include <numeric>

#include "conv_plan.h"
#include "strip_conv_chain.cuh"

namespace sdan_fast::cuda {

constexpr int64_t kManyThreads = 67584;  // 512 for each SM of a large GPU

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
  }
  return p;
}

// Whether all rows of a tensor of rows of `row` elements begin at a multiple of `elements`.
inline bool strip_aligned(DType dtype, const StripPass& s, int64_t row, int elements) {
  const size_t bytes = (dtype == DType::kFloat32 ? 4u : 2u) * static_cast<size_t>(elements);
  return row % elements == 0 && aligned(s.x, bytes) && aligned(s.y, bytes) &&
         aligned(s.gate, bytes);
}

// conv_row: 8 rows, the whole width if there is room.
inline StripPlan plan_row(DType dtype, const StripPass& s) {
  StripPlan plan;
  StripParams& p = plan.p = strip_params(dtype, s);
  p.planes = s.n * s.c;
  p.length = static_cast<int32_t>(s.w), p.width = static_cast<int32_t>(s.h);
  p.wide = strip_aligned(dtype, s, s.w, 4) ? 4 : 0;
  const StripStep &first = p.step[0], &last = p.step[s.steps - 1];
  const int64_t unit = int64_t{kRowOutputs} * last.dilation, h0 = (first.taps - 1) / 2,
                h1 = s.steps == 2 ? (last.taps - 1) / 2 * last.dilation : 0;
  const auto shared_bytes = [&](int64_t tile) {
    const int64_t region =
        s.steps == 2 ? round_up64(tile + 2 * h1, int64_t{kRowOutputs} * first.dilation) : tile;
    // The first column is rounded down to a multiple of kRowAlign.
    const int64_t staged = region + 2 * h0 * first.dilation + kRowAlign - 1;
    const int64_t pitch = round_up64(staged, kRowAlign) + 4;  // 4 modulo 16, for the banks
    int64_t taps = 0;
    for (int i = 0; i < s.steps; ++i) taps += round_up64(p.step[i].taps, 4);
    p.tile = static_cast<int32_t>(tile), p.rows = static_cast<int32_t>(region);
    p.pitch = static_cast<int32_t>(pitch);
    return 4 * taps + 2 * kRowPairs * pitch * 8;
  };
  int64_t tile = round_up64(s.w, unit), bytes = 0;
  const int64_t aligned_unit = std::lcm(unit, int64_t{4});
  plan.fits = tile <= 512 && (bytes = shared_bytes(tile)) <= kSharedGoal;
  for (int64_t wide = 448; !plan.fits && wide >= 1; wide /= 2) {
    tile = aligned_unit * std::max<int64_t>(1, wide / aligned_unit);
    plan.fits = (bytes = shared_bytes(tile)) <= (tile == aligned_unit ? kSharedMost : kSharedGoal);
    if (tile == aligned_unit) break;
  }
  if (!plan.fits) return plan;
  p.tiles = static_cast<int32_t>(ceil_div(s.w, tile));
  const int64_t items = std::max(p.rows, p.tile) / kRowOutputs * kRowPairs;
  plan.config.block =
      dim3(whole_warps(ceil_div(items, ceil_div(items, kStripThreads)), kStripThreads));
  plan.config.shared_bytes = static_cast<size_t>(bytes);
  set_grid(plan, p.planes * ceil_div(s.h, 2 * kRowPairs) * p.tiles);
  return plan;
}

// conv_column: what a step of the walk takes of shared memory.
inline int64_t column_bytes(const StripParams& p, bool last) {
  const int64_t tile = p.tile;
  int64_t floats = 2 * tile + (p.reuse ? 0 : p.rows * tile);
  for (int i = 0; i < p.steps; ++i)
    floats +=
        p.ring[i] * tile + (last ? p.step[i].taps * (tile + 4) : round_up64(p.step[i].taps, 4));
  return 4 * floats + (p.dtype == DType::kFloat32 ? 0 : 2 * p.rows * tile);
}

// Sets the rows of a step and all that follows from them; returns the bytes of shared memory.
inline int64_t set_rows(StripParams& p, bool last, int64_t rows, bool ahead) {
  const auto halo = [&](int i) { return (p.step[i].taps - 1) / 2 * p.step[i].dilation; };
  const int64_t h0 = halo(0), h1 = p.steps == 2 ? halo(1) : 0;
  p.rows = static_cast<int32_t>(rows), p.ahead = ahead;
  p.reuse = p.steps == 2 && rows >= p.length;
  p.ring[0] = static_cast<int32_t>(2 * h0 + rows * (ahead ? 2 : 1));
  p.ring[1] = static_cast<int32_t>(p.steps == 2 ? 2 * h1 + rows : 0);
  p.before[0] = static_cast<int32_t>(ceil_div(2 * (h0 + h1), rows));
  p.before[1] = static_cast<int32_t>(ceil_div(2 * h1, rows));
  return column_bytes(p, last);
}

// Stripes of 32 columns, or of all the channels; in one step if the image is small enough, else in
// steps of as many rows as keep a GPU busy, the next ones fetched ahead.
inline StripPlan plan_column(DType dtype, const StripPass& s) {
  StripPlan plan;
  StripParams& p = plan.p = strip_params(dtype, s);
  const bool last = s.channels_last;
  p.planes = !last ? s.n * s.c : s.vertical ? s.n : s.n * s.h;
  const int64_t length = s.vertical ? s.h : s.w, width = !last ? s.w : s.vertical ? s.w * s.c : s.c;
  if (width > kMostBlocks) return plan;
  p.length = static_cast<int32_t>(length), p.width = static_cast<int32_t>(width);
  p.wide = dtype != DType::kFloat32 && strip_aligned(dtype, s, width, 8) ? 8
           : strip_aligned(dtype, s, width, 4)                           ? 4
                                                                         : 0;
  int64_t unit = p.step[0].dilation;
  if (s.steps == 2) unit = std::lcm(unit, int64_t{p.step[1].dilation});
  unit *= kStripOutputs;
  if (unit > (1 << 24)) return plan;  // far more rows than there is room for
  const int64_t whole = round_up64(length, unit);
  int64_t tile = 32;
  if (width <= 64)
    for (tile = 8; tile < width;) tile *= 2;
  int64_t bytes = 0;
  const int64_t threads = column_threads(last);
  for (; tile >= 8 && !plan.fits; tile /= 2) {
    p.tile = static_cast<int32_t>(tile);
    const int64_t lanes = tile / 4, stripes = ceil_div(width, tile);
    const int64_t items = std::clamp<int64_t>(kManyThreads / (p.planes * stripes), 64, threads);
    const int64_t most = std::min(whole, round_up64(ceil_div(items, lanes) * kStripOutputs, unit));
    const auto try_rows = [&](int64_t rows, bool ahead) {
      plan.fits = (bytes = set_rows(p, last, rows, ahead)) <= kSharedMost;
    };
    if (most == whole) try_rows(whole, false);
    for (const bool ahead : {true, false})
      for (int64_t rows = most; rows >= unit && !plan.fits; rows -= unit) try_rows(rows, ahead);
  }
  if (!plan.fits) return plan;
  const int64_t lanes = p.tile / 4;
  p.tiles = static_cast<int32_t>(ceil_div(width, p.tile));
  // Few stripes are cut along the axis as well, unless their halos would be more than 15 % of them.
  int64_t halos = 0;
  for (int i = 0; i < s.steps; ++i) halos += (p.step[i].taps - 1) * p.step[i].dilation;
  const int64_t least = std::max<int64_t>(p.rows, halos * 7);
  const int64_t cuts = std::clamp<int64_t>(ceil_div(kManyBlocks / 4, p.planes * p.tiles), 1,
                                           std::max<int64_t>(1, length / least));
  p.segment = static_cast<int32_t>(round_up64(ceil_div(length, cuts), p.rows));
  p.segments = static_cast<int32_t>(ceil_div(length, p.segment));
  const int64_t items = p.rows / kStripOutputs * lanes;
  plan.config.block = dim3(whole_warps(ceil_div(items, ceil_div(items, threads)), threads));
  plan.config.shared_bytes = static_cast<size_t>(bytes);
  set_grid(plan, p.planes * p.segments * p.tiles);
  return plan;
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
