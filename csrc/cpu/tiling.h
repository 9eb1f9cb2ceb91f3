// How the depth-wise kernels cut a plane into tiles that stay in the second-level cache.
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

// Tiles of h x w outputs with a halo of `halo_h`, `halo_w` pixels in all, `pixel_floats` floats each, in
// `buffers` buffers. The cut with the least recomputed halo among those that fit the budget wins.
inline TileGrid make_tiles(int64_t h, int64_t w, int64_t halo_h, int64_t halo_w, int64_t pixel_floats,
                           int64_t buffers) {
  constexpr int64_t kBudget = 128 * 1024;  // floats: half of a 1 MB second-level cache
  const auto cost = [&](int64_t th, int64_t tw) {
    return (th + halo_h) * (tw + halo_w) * pixel_floats * buffers;
  };
  if (cost(h, w) <= kBudget) return {h, w, 1, 1};
  const int64_t align = pixel_floats == 1 ? 64 : 8;
  TileGrid best = {1, w, h, 1};
  double best_ratio = 0.0;
  bool fits = false;
  for (int64_t tiles_w = 1; tiles_w <= 64; ++tiles_w) {
    int64_t tw = ((w + tiles_w - 1) / tiles_w + align - 1) / align * align;
    if (tw > w) tw = w;
    int64_t th = kBudget / ((tw + halo_w) * pixel_floats * buffers) - halo_h;
    if (th > h) th = h;
    const bool ok = th >= 1;
    if (th < 4) th = h < 4 ? h : 4;
    th = (h + (h + th - 1) / th - 1) / ((h + th - 1) / th);  // even rows of tiles
    const double ratio = static_cast<double>(cost(th, tw)) / (static_cast<double>(th) * tw);
    if (best_ratio == 0.0 || (ok && !fits) || (ok == fits && ratio < best_ratio)) {
      best = {th, tw, (h + th - 1) / th, (w + tw - 1) / tw};
      best_ratio = ratio;
      fits = ok;
    }
    if (tw <= align) break;
  }
  return best;
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
