// The entry point of depthwise_conv2d's kernel, and the tiling that it shares with
// strip_conv_chain.
#pragma once

#include "../dispatch.h"

namespace sdan_fast {

// Channels that a channels_last tile of depthwise_conv2d holds at most: a few cache lines of a
// pixel.
constexpr int kGroupChannels = 64;

// How one image plane (NCHW) or group of channels (channels_last) is cut into tiles.
struct TileGrid {
  int64_t tile_h, tile_w;    // output pixels of a tile
  int64_t tiles_h, tiles_w;  // tiles of a plane
};

// Padded copies of tiles, or (NCHW) whole rows of a plane read in
// place: four at a time, one after the other, or those of a vector as its lanes.
enum class RowOrder { kTiles, kFours, kSingle, kLanes };

struct DepthwiseArgs {
  const void* x;
  const void* weight;
  const void* bias;  // nullptr if there is none
  void* y;
  DType dtype;
  bool channels_last;
  int64_t n, c, h, w;
  int64_t kh, kw;  // as in the weight
  int64_t i0, j0;  // the first taps that can touch the image
  int64_t kh_used, kw_used;
  int64_t dh, dw;
  int64_t lanes;  // channels of a group: whole vectors, at most kGroupChannels, for channels_last,
                  // else 1
  RowOrder order;
  TileGrid grid;
};

}  // namespace sdan_fast

// Tasks [begin, end) of n * ceil(c / lanes) * tiles_h * tiles_w, the last index fastest for NCHW;
// for channels_last the group of channels is the fastest, so that neighbours share cache lines.
SDAN_DECLARE_KERNEL(depthwise_conv2d_run, const ::sdan_fast::DepthwiseArgs& args, int64_t begin,
                    int64_t end)
