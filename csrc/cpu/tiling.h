// How the depth-wise kernels cut a plane into tiles that stay in a cache.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "isa/depthwise_conv2d.h"

namespace sdan_fast {

// The lanes of one vector of the picked instruction set.
inline int64_t vector_lanes() { return picked_isa() == Isa::kAvx512 ? 16 : 8; }

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
  int64_t halo_h, halo_w;   // input pixels beyond the outputs, both sides together
  int64_t pixel_floats;     // of the buffer
  bool columns_have_halo;   // whether the buffer holds halo_w too
};

// Cuts into tiles whose buffer has at most `budget` floats, with the least input read twice. *ratio is
// what is read over what there is, zero if nothing fits.
inline TileGrid tiles_within(const TileProblem& p, int64_t budget, double* ratio) {
  const int64_t align = p.pixel_floats == 1 ? 64 : 8;
  TileGrid best = {1, 1, p.h, p.w};
  *ratio = 0.0;
  for (int64_t wanted = 1; wanted <= 32; ++wanted) {
    int64_t tw = ((p.w + wanted - 1) / wanted + align - 1) / align * align;
    if (tw > p.w) tw = p.w;
    const int64_t columns = tw + (p.columns_have_halo ? p.halo_w : 0);
    int64_t th = budget / (columns * p.pixel_floats) - p.halo_h;
    if (th >= 1) {
      if (th > p.h) th = p.h;
      const int64_t tiles_h = (p.h + th - 1) / th;
      const int64_t tiles_w = (p.w + tw - 1) / tw;
      th = (p.h + tiles_h - 1) / tiles_h;  // even rows of tiles
      const double rows_read = static_cast<double>(p.h + (tiles_h - 1) * p.halo_h);
      const double columns_read = static_cast<double>(p.w + (tiles_w - 1) * p.halo_w);
      const double r = rows_read * columns_read / (static_cast<double>(p.h) * static_cast<double>(p.w));
      if (*ratio == 0.0 || r < *ratio) {
        *ratio = r;
        best = {th, tw, (p.h + th - 1) / th, tiles_w};
      }
    }
    if (tw <= align) break;
  }
  return best;
}

// The smallest of the two budgets that reads little twice; else the large one; else, for halos beyond any
// cache, short tiles of the whole width.
inline TileGrid make_tiles(const TileProblem& p, int64_t small_budget, int64_t large_budget) {
  double ratio = 0.0;
  TileGrid grid = tiles_within(p, small_budget, &ratio);
  if (ratio != 0.0 && ratio <= 1.3) return grid;
  grid = tiles_within(p, large_budget, &ratio);
  if (ratio != 0.0) return grid;
  const int64_t th = p.h < 64 ? p.h : 64;
  const int64_t tw = p.w < 512 ? p.w : 512;
  return {th, tw, (p.h + th - 1) / th, (p.w + tw - 1) / tw};
}

// Cuts rows further until there are about `wanted` tasks, `per_tile` of them for each tile; never below
// tiles of half the halo, where recomputing it would cost more than an idle thread.
inline void refine_tiles(TileGrid* grid, int64_t h, int64_t halo_h, int64_t per_tile, int64_t wanted) {
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
