// StarConv levels streamed over image rows: each level keeps the kh rows of PW1's output that its
// depth-wise convolution spans in a ring, so a row passes through all levels while it is in cache and
// nothing but the first input and the last output touches memory.
//
// Per row and block of pixels a level reads its input once: normalise, distil, PW1. The star of the row
// kh/2 above follows `lag` blocks behind, when the columns to its right are there, and only then PW2
// of the new row overwrites that block of b; so b needs one row per kh/2, not one more.
#include "band.h"
#include "pointwise.h"

namespace sdan_fast {
namespace SDAN_ISA {

namespace {

static_assert(sizeof(float*) <= 2 * sizeof(float), "place() makes room for pointers in floats");

struct LevelState {
  float* a;  // kh rows x co channels x a_stride, each channel with a left margin
  float* b;  // b_rows rows x co channels x stride
  float* d;  // d_rows rows x distill.co channels x stride
  float* r;  // co channels x stride: the output row
  const float** row_pointers;
  int64_t out_begin, out_end, out_next;
  int64_t in_end;
  int margin, lag, b_rows, d_rows;
  int64_t a_stride;
};

// Everything that one band needs while it runs.
struct Band {
  const StarChain* chain;
  Region region;
  int64_t x0, width;  // the tile's columns: those of the region and its halo, inside the image
  bool right_edge;
  int vecs;
  int64_t stride;
  float* x;      // input row
  float* z;      // (max lag + 1) blocks of normalised input
  float* block;  // one block of output
  float* zeros;
  LevelState levels[kMaxLevels];
};

int rows_above(const StarLevel& level) { return level.kh / 2; }

// Lays out the scratch of a tile `width` wide; with a null base it only measures.
int64_t place(const StarChain& chain, int64_t width, char* base, Band* band) {
  ScratchCursor cursor{base, 0};
  const int64_t padded = round_up(width, kLanes);
  const int64_t stride = tile_stride(padded);
  int channels = chain.channels;
  int widest = chain.channels;
  int max_lag = 1;
  int64_t widest_row = 0;
  band->vecs = static_cast<int>(padded / kLanes);
  band->stride = stride;
  band->x = cursor.take(stride * chain.channels);
  for (int i = 0; i < chain.level_count; ++i) {
    const StarLevel& level = chain.levels[i];
    LevelState& s = band->levels[i];
    s.margin = static_cast<int>(round_up(level.kw / 2, 16));
    s.lag = (level.kw / 2 + kBlock - 1) / kBlock;
    s.a_stride = tile_stride(padded + 2 * s.margin);
    s.b_rows = rows_above(level) > 0 ? rows_above(level) : 1;
    s.d_rows = 1;
    for (int j = i; j < chain.level_count; ++j) s.d_rows += rows_above(chain.levels[j]);
    const int co = level.pw1.co;
    s.a = cursor.take(s.a_stride * level.kh * co);
    s.b = cursor.take(stride * s.b_rows * co);
    s.d = level.distill.co > 0 ? cursor.take(stride * s.d_rows * level.distill.co) : nullptr;
    s.r = cursor.take(stride * co);
    s.row_pointers = reinterpret_cast<const float**>(cursor.take(2 * static_cast<int64_t>(level.kh)));
    if (s.a_stride > widest_row) widest_row = s.a_stride;
    if (s.lag > max_lag) max_lag = s.lag;
    if (channels > widest) widest = channels;
    channels = co;
  }
  band->zeros = cursor.take(widest_row);
  band->z = cursor.take(static_cast<int64_t>(max_lag + 1) * widest * kBlock);
  band->block = cursor.take(static_cast<int64_t>(chain.fuse.co) * kBlock);
  if (base != nullptr) fill_zero(band->zeros, widest_row);
  return cursor.used;
}

template <Activation kOuter>
void star_block_as(const StarLevel& level, LevelState& s, const TileRow* rows, const float* b,
                   ptrdiff_t stride, int64_t column, int vecs) {
  const int taps = level.kh * level.kw;
  for (int c = 0; c < level.pw1.co; ++c) {
    for (int i = 0; i < level.kh; ++i) s.row_pointers[i] = rows[i].data + c * rows[i].channel_stride + column;
    const float* bc = b + c * stride + column;
    float* out = s.r + c * stride + column;
    if (level.kh == 3 && level.kw == 3) {
      star_channel_3x3<kOuter>(s.row_pointers, level.dw + c * 9, level.dw_bias[c], bc, out, vecs);
    } else {
      star_channel_any<kOuter>(s.row_pointers, level.kh, level.kw, level.dw + static_cast<int64_t>(c) * taps,
                               level.dw_bias[c], bc, out, vecs);
    }
  }
}

void star_block(const StarLevel& level, LevelState& s, const TileRow* rows, const float* b,
                ptrdiff_t stride, int64_t column, int vecs) {
  switch (level.outer) {
    case Activation::kNone:
      return star_block_as<Activation::kNone>(level, s, rows, b, stride, column, vecs);
    case Activation::kGelu:
      return star_block_as<Activation::kGelu>(level, s, rows, b, stride, column, vecs);
    case Activation::kRelu6:
      return star_block_as<Activation::kRelu6>(level, s, rows, b, stride, column, vecs);
    case Activation::kRelu:
      return star_block_as<Activation::kRelu>(level, s, rows, b, stride, column, vecs);
    case Activation::kSilu:
      return star_block_as<Activation::kSilu>(level, s, rows, b, stride, column, vecs);
  }
}

SDAN_INLINE int block_vecs(const Band& band, int block) {
  const int left = band.vecs - block * kBlockVecs;
  return left < kBlockVecs ? left : kBlockVecs;
}

// Writes the last level's row q: through `fuse` if there is one.
void emit(Band& band, int64_t q) {
  const StarChain& chain = *band.chain;
  LevelState& last = band.levels[chain.level_count - 1];
  const int64_t skip = band.region.x0 - band.x0;  // the tile's halo columns on the left
  const int64_t count = band.region.x1 - band.region.x0;
  if (chain.fuse.co == 0) {
    store_tile(chain.out, band.region.n, q, band.region.x0, chain.levels[chain.level_count - 1].pw1.co, count,
               last.r + skip, band.stride);
    return;
  }
  PointwiseInput inputs[kMaxLevels + 1];
  int n = 0;
  for (int i = 0; i < chain.level_count; ++i) {
    const int co = chain.levels[i].distill.co;
    if (co == 0) continue;
    const LevelState& s = band.levels[i];
    inputs[n++] = {s.d + (q % s.d_rows) * co * band.stride, band.stride, co};
  }
  inputs[n++] = {last.r, band.stride, chain.levels[chain.level_count - 1].pw1.co};
  const int blocks = (band.vecs + kBlockVecs - 1) / kBlockVecs;
  for (int j = 0; j < blocks; ++j) {
    const int64_t column = static_cast<int64_t>(j) * kBlock;
    const int vecs = block_vecs(band, j);
    const int64_t begin = column > skip ? column : skip;
    const int64_t limit = skip + count;
    const int64_t end = column + vecs * kLanes < limit ? column + vecs * kLanes : limit;
    if (begin >= end) continue;
    pointwise_block(inputs, n, column, chain.fuse.weight, chain.fuse.bias, chain.fuse.co, band.block, kBlock,
                    vecs);
    store_tile(chain.out, band.region.n, q, band.x0 + begin, chain.fuse.co, end - begin,
               band.block + (begin - column), kBlock);
  }
}

void push(Band& band, int index, int64_t y, const float* x);

// What follows once level `index` has its output row q complete in s.r.
void row_done(Band& band, int index, int64_t q) {
  if (index + 1 < band.chain->level_count) {
    push(band, index + 1, q, band.levels[index].r);
  } else {
    emit(band, q);
  }
}

// The rows that the depth-wise convolution for output row q spans.
void gather_rows(const Band& band, const StarLevel& level, const LevelState& s, int64_t q, TileRow* rows) {
  for (int i = 0; i < level.kh; ++i) {
    const int64_t y = q - rows_above(level) + i;
    if (y < 0 || y >= band.chain->height) {
      rows[i] = {band.zeros + s.margin, 0};
    } else {
      rows[i] = {s.a + (y % level.kh) * level.pw1.co * s.a_stride + s.margin, static_cast<ptrdiff_t>(s.a_stride)};
    }
  }
}

constexpr int kMaxKernel = 255;

// Feeds input row y (in order, from the level's first to in_end - 1) to a level.
void push(Band& band, int index, int64_t y, const float* x) {
  const StarLevel& level = band.chain->levels[index];
  LevelState& s = band.levels[index];
  const int ci = level.pw1.ci, co = level.pw1.co;
  const int above = rows_above(level);
  const int blocks = (band.vecs + kBlockVecs - 1) / kBlockVecs;
  float* a = s.a + (y % level.kh) * co * s.a_stride + s.margin;
  float* b = s.b + (y % s.b_rows) * co * band.stride;
  const bool distil = level.distill.co > 0 && y >= band.region.y0 && y < band.region.y1;
  const int64_t q = y - above;
  const bool star_here = q >= s.out_begin && q < s.out_end;
  TileRow rows[kMaxKernel];
  if (star_here) gather_rows(band, level, s, q, rows);
  const ptrdiff_t z_size = static_cast<ptrdiff_t>(ci) * kBlock;

  for (int j = 0; j < blocks + s.lag; ++j) {
    if (j < blocks) {
      const int64_t column = static_cast<int64_t>(j) * kBlock;
      const int vecs = block_vecs(band, j);
      float* z = band.z + (j % (s.lag + 1)) * z_size;
      normalise_block(x + column, band.stride, ci, level.eps, z, kBlock, vecs);
      if (distil) {
        const PointwiseInput in{x, static_cast<ptrdiff_t>(band.stride), ci};
        float* d = s.d + (y % s.d_rows) * level.distill.co * band.stride + column;
        pointwise_block(&in, 1, column, level.distill.weight, level.distill.bias, level.distill.co, d,
                        band.stride, vecs);
        gelu_block(d, band.stride, level.distill.co, vecs);
      }
      const PointwiseInput in{z, kBlock, ci};
      pointwise_block(&in, 1, 0, level.pw1.weight, level.pw1.bias, co, a + column, s.a_stride, vecs);
      if (j == blocks - 1 && band.right_edge) {
        // The padding of the depth-wise convolution; PW1 left its bias there.
        const int64_t tail = static_cast<int64_t>(band.vecs) * kLanes - band.width;
        for (int c = 0; c < co; ++c) fill_zero(a + c * s.a_stride + band.width, tail);
      }
    }
    const int i = j - s.lag;
    if (i >= 0) {
      const int64_t column = static_cast<int64_t>(i) * kBlock;
      const int vecs = block_vecs(band, i);
      const PointwiseInput in{band.z + (i % (s.lag + 1)) * z_size, kBlock, ci};
      if (above == 0) {
        pointwise_block(&in, 1, 0, level.pw2.weight, level.pw2.bias, co, b + column, band.stride, vecs);
        if (star_here) star_block(level, s, rows, b, band.stride, column, vecs);
      } else {
        if (star_here) star_block(level, s, rows, b, band.stride, column, vecs);
        pointwise_block(&in, 1, 0, level.pw2.weight, level.pw2.bias, co, b + column, band.stride, vecs);
      }
    }
  }
  if (star_here) {
    s.out_next = q + 1;
    row_done(band, index, q);
  }
  if (y + 1 < s.in_end) return;
  // The last rows have nothing below them but the image's edge.
  while (s.out_next < s.out_end) {
    const int64_t last = s.out_next++;
    gather_rows(band, level, s, last, rows);
    const float* b_last = s.b + (last % s.b_rows) * co * band.stride;
    for (int j = 0; j < blocks; ++j) {
      star_block(level, s, rows, b_last, band.stride, static_cast<int64_t>(j) * kBlock, block_vecs(band, j));
    }
    row_done(band, index, last);
  }
}

SDAN_INLINE int64_t clip(int64_t v, int64_t low, int64_t high) { return v < low ? low : (v > high ? high : v); }

}  // namespace

void star_chain_scratch(const StarChain* chain, int64_t width, int64_t* bytes) {
  Band band;
  int64_t halo = 0;
  for (int i = 0; i < chain->level_count; ++i) halo += chain->levels[i].kw / 2;
  *bytes = place(*chain, width + 2 * halo < chain->width ? width + 2 * halo : chain->width, nullptr, &band);
}

void star_chain_run(const StarChain* chain, const Region* region, void* scratch) {
  Band band;
  band.chain = chain;
  band.region = *region;
  int64_t halo = 0;
  for (int i = 0; i < chain->level_count; ++i) halo += chain->levels[i].kw / 2;
  band.x0 = clip(region->x0 - halo, 0, chain->width);
  const int64_t x1 = clip(region->x1 + halo, 0, chain->width);
  band.width = x1 - band.x0;
  band.right_edge = x1 == chain->width;
  place(*chain, band.width, static_cast<char*>(scratch), &band);

  int64_t begin = region->y0, end = region->y1;
  for (int i = chain->level_count - 1; i >= 0; --i) {
    const StarLevel& level = chain->levels[i];
    LevelState& s = band.levels[i];
    s.out_begin = s.out_next = begin;
    s.out_end = end;
    begin = clip(begin - rows_above(level), 0, chain->height);
    end = clip(end + rows_above(level), 0, chain->height);
    s.in_end = end;
    // Margins are read as the zero padding at the image's edges; inside the image they only reach the halo.
    const int64_t padded = static_cast<int64_t>(band.vecs) * kLanes;
    for (int64_t r = 0; r < static_cast<int64_t>(level.kh) * level.pw1.co; ++r) {
      float* row = s.a + r * s.a_stride;
      fill_zero(row, s.margin);
      fill_zero(row + s.margin + padded, s.a_stride - s.margin - padded);
    }
  }
  for (int64_t y = begin; y < end; ++y) {
    load_tile(chain->x, region->n, y, band.x0, 0, chain->channels, band.width, band.x, band.stride);
    push(band, 0, y, band.x);
  }
}

void pack_pointwise(const float* weight, int co, int ci, float* packed) {
  pack_pointwise_weight(weight, co, ci, packed);
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
