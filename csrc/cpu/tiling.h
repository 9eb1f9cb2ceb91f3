// How the depth-wise kernels cut a plane into tiles that stay in a cache.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "isa/depthwise_conv2d.h"

namespace sdan_fast {

// The lanes of one vector of the picked instruction set.
inline int64_t vector_lanes() {
  return picked_isa() == Isa::kAvx512 ? 16 : 8;
}

// The taps of an odd kernel of size k and dilation d that can touch an image of `size` pixels: the
// others meet only padding.
struct UsedTaps {
  int64_t first, count;
};
inline UsedTaps used_taps(int64_t k, int64_t d, int64_t size) {
  const int64_t radius = (k - 1) / 2;
  const int64_t reach = size > 0 ? (size - 1) / d : 0;
  const int64_t used = radius < reach ? radius : reach;
  return {radius - used, 2 * used + 1};
}

struct TileProblem {
  int64_t h, w;
  int64_t halo_h, halo_w;  // input pixels beyond the outputs, both sides together
  int64_t pixel_floats;    // of the buffer
  bool columns_have_halo;  // whether the buffer holds halo_w too
  int64_t budget;          // floats of the buffer
  int64_t window_rows;     // rows in use at a time
  int64_t window_budget;   // floats that they should not exceed
};

// The tiles within the budget that read the least input twice, preferring those whose window of
// rows stays in the first-level cache if that costs little. For halos beyond the budget: short
// tiles, any size. *read is what is read over what there is.
inline TileGrid make_tiles(const TileProblem& p, double* read) {
  const int64_t align = p.pixel_floats == 1 ? 64 : 8;
  TileGrid best = {}, best_windowed = {};
  double ratio = 0.0, ratio_windowed = 0.0;
  for (int64_t wanted = 1; wanted <= 32; ++wanted) {
    int64_t tw = ((p.w + wanted - 1) / wanted + align - 1) / align * align;
    if (tw > p.w) tw = p.w;
    const int64_t row = (tw + (p.columns_have_halo ? p.halo_w : 0)) * p.pixel_floats;
    int64_t th = p.budget / row - p.halo_h;
    if (th >= 1) {
      if (th > p.h) th = p.h;
      const int64_t tiles_h = (p.h + th - 1) / th;
      const int64_t tiles_w = (p.w + tw - 1) / tw;
      th = (p.h + tiles_h - 1) / tiles_h;  // even rows of tiles
      const TileGrid grid = {th, tw, (p.h + th - 1) / th, tiles_w};
      const double rows_read = static_cast<double>(p.h + (tiles_h - 1) * p.halo_h);
      const double columns_read = static_cast<double>(p.w + (tiles_w - 1) * p.halo_w);
      const double r =
          rows_read * columns_read / (static_cast<double>(p.h) * static_cast<double>(p.w));
      if (ratio == 0.0 || r < ratio) {
        ratio = r;
        best = grid;
      }
      const int64_t window = p.window_rows < th + p.halo_h ? p.window_rows : th + p.halo_h;
      if (window * row <= p.window_budget && (ratio_windowed == 0.0 || r < ratio_windowed)) {
        ratio_windowed = r;
        best_windowed = grid;
      }
    }
    if (ratio_windowed != 0.0 || tw <= align) break;  // narrower tiles only read more
  }
  if (ratio_windowed != 0.0 && ratio_windowed <= 1.25 * ratio) {
    *read = ratio_windowed;
    return best_windowed;
  }
  *read = ratio;
  if (ratio != 0.0) return best;
  *read = 100.0;
  const int64_t th = p.h < 64 ? p.h : 64;
  const int64_t tw = p.w < 512 ? p.w : 512;
  return {th, tw, (p.h + th - 1) / th, (p.w + tw - 1) / tw};
}

// Cuts rows further until there are about `wanted` tasks, `per_tile` of them for each tile; never
// below tiles of half the halo, where recomputing it would cost more than an idle thread.
inline void refine_tiles(TileGrid* grid, int64_t h, int64_t halo_h, int64_t per_tile,
                         int64_t wanted) {
  const int64_t smallest = halo_h / 2 > 8 ? halo_h / 2 : 8;
  const int64_t tasks = per_tile * grid->tiles_h * grid->tiles_w;
  if (tasks >= wanted || tasks == 0) return;
  const int64_t factor = (wanted + tasks - 1) / tasks;
  int64_t th = (h + grid->tiles_h * factor - 1) / (grid->tiles_h * factor);
  if (th < smallest) th = smallest;
  if (th >= grid->tile_h) return;
  grid->tile_h = th;
  grid->tiles_h = (h + th - 1) / th;
}

}  // namespace sdan_fast
