// Tiles of consecutive pixels of a batch, moved between dense tensors and float32 scratch; see
// band.h, whose tiles are pieces of a row.
#pragma once

#include "../pixels.h"
#include "band.h"

namespace sdan_fast {
namespace SDAN_ISA {

// Pixels that pass through all steps of a kernel together: runs of several cache lines, few enough
// that what is no longer needed leaves the second-level cache soon.
constexpr int64_t kChunk = 256;

// Of a tile of so many pixels. Pixels of the next image are loaded where those of one end, a whole
// vector at a time, so that a row may need as many floats more.
SDAN_INLINE int64_t pixel_tile_stride(int64_t pixels) {
  return tile_stride(round_up(pixels, kLanes) + kLanes);
}

SDAN_INLINE ImageView image_of(const PixelView& v) {
  return {v.data, v.dtype, v.stride_run, v.stride_c, 0, v.stride_p};
}

// f(run, place in it, pixels before, pixels) for each run that pixels [first, first + n) lie in.
template <typename F>
SDAN_INLINE void for_runs(const PixelView& view, int64_t first, int64_t n, const F& f) {
  for (int64_t done = 0; done < n;) {
    const int64_t run = (first + done) / view.run_pixels, at = (first + done) % view.run_pixels;
    const int64_t left = view.run_pixels - at < n - done ? view.run_pixels - at : n - done;
    f(run, at, done, left);
    done += left;
  }
}

// dst[c][0, n) = pixels [first, first + n), then zeros up to a whole vector.
static inline void load_pixels(const PixelView& view, int64_t first, int64_t n, int channels,
                               float* dst, ptrdiff_t stride) {
  for_runs(view, first, n, [&](int64_t run, int64_t at, int64_t done, int64_t count) {
    load_tile(image_of(view), run, 0, at, 0, channels, count, dst + done, stride);
  });
  // The last run was completed to vectors of its own.
  for (int c = 0; c < channels; ++c) {
    for (int64_t i = n; i < round_up(n, kLanes); ++i) dst[c * stride + i] = 0.0f;
  }
}

// The same in pairs (pairs.h); past the n pixels there may be anything up to a whole vector.
static inline void load_pixel_pairs(const PixelView& view, int64_t first, int64_t n, int channels,
                                    float* dst, ptrdiff_t stride) {
  for_runs(view, first, n, [&](int64_t run, int64_t at, int64_t done, int64_t count) {
    load_pair_tile(image_of(view), run, 0, at, channels, count, dst + done, stride);
  });
}

static inline void store_pixels(const PixelView& view, int64_t first, int64_t n, int channels,
                                const float* src, ptrdiff_t stride) {
  for_runs(view, first, n, [&](int64_t run, int64_t at, int64_t done, int64_t count) {
    store_tile(image_of(view), run, 0, at, 0, channels, count, src + done, stride);
  });
}

// Pixels [first, first + n) of a batch that has `end`, at place `at` of their tile.
struct Chunk {
  int64_t first, n, at, end;
};

// each(chunk) for all chunks of a part, done(pixels) after the last one of every tile.
template <typename Each, typename Done>
SDAN_INLINE void for_chunks(const PixelTiling& tiling, int64_t part, const Each& each,
                            const Done& done) {
  const int64_t end = tiling.tiles * (part + 1) / tiling.parts;
  for (int64_t t = tiling.tiles * part / tiling.parts; t < end; ++t) {
    const int64_t first = t * tiling.tile;
    const int64_t left = tiling.pixels - first;
    const int64_t pixels = left < tiling.tile ? left : tiling.tile;
    for (int64_t at = 0; at < pixels; at += kChunk) {
      const int64_t n = pixels - at < kChunk ? pixels - at : kChunk;
      each(Chunk{first + at, n, at, tiling.pixels});
    }
    done(pixels);
  }
}

// Asks for the chunk after this one, as far as it lies in one run.
SDAN_INLINE void fetch_pixels(PrefetchQueue* queue, const PixelView& view, const Chunk& chunk,
                              int channels, bool write) {
  const int64_t first = chunk.first + chunk.n;
  if (view.data == nullptr || first >= chunk.end) return;
  const int64_t run = first / view.run_pixels, at = first % view.run_pixels;
  const int64_t n = chunk.end - first < kChunk ? chunk.end - first : kChunk;
  const int64_t left = view.run_pixels - at < n ? view.run_pixels - at : n;
  queue->add(image_of(view), run, 0, at, channels, left, write);
}

// How many lines products of so many steps a block (prefetch_steps) take from the queue at each, so
// that those of a chunk have asked for another one's `rows` rows.
SDAN_INLINE int lines_a_step(int rows, int steps) {
  const int all = steps * static_cast<int>(kChunk / kLanes) / kPointwiseVecs;
  const int lines = rows * static_cast<int>(kChunk / 16 + 1);
  return all > 0 ? (lines + all - 1) / all : 0;
}

// out = the 1x1 convolution of the first `n` pixels of a tile; blocks of pixels that stay in the
// first-level cache while all outputs are computed. kSummed channels are summed at a time, and
// these sums added: one long chain rounds more.
template <int kSummed = 32>
static void pointwise_pixels(const float* x, ptrdiff_t x_stride, const Pointwise& pw, float* out,
                             ptrdiff_t out_stride, int64_t n, PrefetchQueue* queue, int lines) {
  constexpr int kMost = 64;
  const int rows = tile_rows(pw.ci, pw.pairs);
  // Matrix tiles sum as they please.
  const int wanted = pw.tiles != nullptr ? 1 : (rows + kSummed - 1) / kSummed;
  const int count = wanted < kMost ? wanted : kMost;
  PointwiseInput in[kMost];
  for (int k = 0; k < count; ++k) {
    const int begin = static_cast<int>(int64_t{rows} * k / count);
    const int end = static_cast<int>(int64_t{rows} * (k + 1) / count);
    in[k] = {x + begin * x_stride, x_stride, end - begin};
  }
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t left = round_up(n - i, kLanes) / kLanes;
    pointwise_block(in, count, i, pw, out + i, out_stride,
                    static_cast<int>(left < kBlockVecs ? left : kBlockVecs), queue, lines);
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
