// An image copied between memory formats, through tiles of a first-level cache's size.
#include "band.h"

namespace sdan_fast {
namespace SDAN_ISA {

void copy_image(const ImageView* from, const ImageView* to, int channels, const Region* region) {
  constexpr int kPixels = 64;
  constexpr int kChannels = 64;
  constexpr int kStride = kPixels + kLanes;  // rows of a tile do not share cache sets
  alignas(64) float tile[kChannels * kStride];
  for (int64_t y = region->y0; y < region->y1; ++y) {
    for (int64_t x = region->x0; x < region->x1; x += kPixels) {
      const int64_t n = region->x1 - x < kPixels ? region->x1 - x : kPixels;
      for (int c = 0; c < channels; c += kChannels) {
        const int rows = channels - c < kChannels ? channels - c : kChannels;
        load_tile(*from, region->n, y, x, c, rows, n, tile, kStride);
        store_tile(*to, region->n, y, x, c, rows, n, tile, kStride);
      }
    }
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
