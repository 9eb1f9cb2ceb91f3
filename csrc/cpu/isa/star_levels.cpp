// StarConv levels streamed over image rows: each level keeps the kh rows of PW1's output that its
// depth-wise convolution spans in a ring, so a row passes through all levels while it is in cache
// and nothing but the first input and the last output touches memory.
//
// A level reads its input row once, block by block: normalise, distil, PW1, PW2 from the same few
// kilobytes. Then the star of the row kh/2 above, whose depth-wise taps are now all there, runs
// along whole rows and leaves the next level's input where its own was.
//
// Two threads may share a region, one streaming it from its first row down and one from its last
// row up, each taking its next row while there are any (ChainMeeting). Where they meet, each reads
// the other's nearest rows from the other's rings, level by level: nothing is computed twice, and
// neither waits for longer than the other takes for a row. Rows are counted from the end that a
// thread starts at, so that the one that comes from below sees its image upside down.
//
// Where a gate computes the input, its row goes straight into the first level.
#include "gate.h"

namespace sdan_fast {
namespace SDAN_ISA {

namespace {

static_assert(sizeof(float*) <= 2 * sizeof(float), "place() makes room for pointers in floats");

struct LevelState {
  float* a;  // kh rows x co channels x a_stride, each channel with a left margin
  float* b;  // b_rows rows x co channels x stride
  float* d;  // d_rows rows x distill.co channels, or pairs of them, x stride
  const float** row_pointers;
  int64_t out_begin, out_end, out_next;
  int margin, b_rows, d_rows, d_channels;
  int64_t a_stride;
};

// Everything that one band needs while it runs.
struct Band {
  const StarChain* chain;
  Region region;  // its rows counted as the band counts them
  bool upwards;
  const char* base;          // its scratch
  const char* partner_base;  // that of the band that it meets
  int64_t meeting_row;       // the first row that is the partner's, if they have met
  int64_t x0, width;  // the tile's columns: those of the region and its halo, inside the image
  bool right_edge;
  int vecs;
  int64_t stride;
  float* x;      // the row that goes from level to level
  float* z;      // one block of normalised input
  float* raw;    // the same block before, where it is needed as pairs
  float* block;  // one block of output
  float* zeros;
  int64_t row, rows_end;  // the input row that the levels work on, and the end of those to come
  int64_t lag;            // how many rows the output is behind the input
  void* gate;             // scratch of chain->before
  PrefetchQueue queue;
  LevelState levels[kMaxLevels];
};

// Cache lines of the next input and output row taken at each step of a product (pointwise.h). They
// have to come between the middle level of one row and the first of the next, some 1600 steps of
// four levels of 56 channels for 2240 lines: asked for sooner they would have left the second-level
// cache, through which all levels' rings pass meanwhile, before they are used.
constexpr int kLinesAStep = 2;

constexpr int64_t kNeverMet = INT64_MAX;

int rows_above(const StarLevel& level) {
  return level.kh / 2;
}

// The image's row that the band counts as y.
SDAN_INLINE int64_t image_row(const Band& band, int64_t y) {
  return band.upwards ? band.chain->height - 1 - y : y;
}

// Lays out the scratch of a tile `width` wide; with a null base it only measures.
int64_t place(const StarChain& chain, int64_t width, char* base, Band* band) {
  ScratchCursor cursor{base, 0};
  const int64_t padded = round_up(width, kLanes);
  const int64_t stride = tile_stride(padded);
  int widest = chain.channels, most_outputs = chain.fuse.co;
  int64_t widest_row = 0;
  band->vecs = static_cast<int>(padded / kLanes);
  band->stride = stride;
  for (int i = 0; i < chain.level_count; ++i) {
    if (chain.levels[i].pw1.co > widest) widest = chain.levels[i].pw1.co;
  }
  band->x = cursor.take(stride * widest);
  for (int i = 0; i < chain.level_count; ++i) {
    const StarLevel& level = chain.levels[i];
    LevelState& s = band->levels[i];
    s.margin = static_cast<int>(round_up(level.kw / 2, 16));
    s.a_stride = tile_stride(padded + 2 * s.margin);
    s.b_rows = rows_above(level) + 1;
    s.d_rows = 1;
    for (int j = i; j < chain.level_count; ++j) s.d_rows += rows_above(chain.levels[j]);
    const int co = level.pw1.co;
    s.a = cursor.take(s.a_stride * level.kh * co);
    s.b = cursor.take(stride * s.b_rows * co);
    s.d_channels = tile_rows(level.distill.co, level.distill.pairs);
    s.d = s.d_channels > 0 ? cursor.take(stride * s.d_rows * s.d_channels) : nullptr;
    if (level.distill.co > most_outputs) most_outputs = level.distill.co;
    s.row_pointers =
        reinterpret_cast<const float**>(cursor.take(2 * static_cast<int64_t>(level.kh)));
    if (s.a_stride > widest_row) widest_row = s.a_stride;
  }
  band->zeros = cursor.take(widest_row);
  band->z = cursor.take(static_cast<int64_t>(widest) * kBlock);
  band->raw = cursor.take(static_cast<int64_t>(tile_rows(widest, true)) * kBlock);
  band->block = cursor.take(static_cast<int64_t>(most_outputs) * kBlock);
  if (chain.before != nullptr) {
    int64_t bytes;
    gate_scratch(chain.before, &bytes);
    band->gate = cursor.take(bytes / static_cast<int64_t>(sizeof(float)));
  }
  if (base != nullptr) fill_zero(band->zeros, widest_row);
  return cursor.used;
}

template <Activation kOuter, bool kCoarse>
void star_row_with(const Band& band, const StarLevel& level, const LevelState& s,
                   const TileRow* rows, const float* b) {
  const int taps = level.kh * level.kw;
  for (int c = 0; c < level.pw1.co; ++c) {
    for (int i = 0; i < level.kh; ++i)
      s.row_pointers[i] = rows[i].data + c * rows[i].channel_stride;
    const float* bc = b + c * band.stride;
    float* out = band.x + c * band.stride;
    if (level.kh == 3 && level.kw == 3) {
      star_channel_3x3<kOuter, kCoarse>(s.row_pointers, level.dw + c * 9, level.dw_bias[c], bc, out,
                                        band.vecs);
    } else {
      star_channel_any<kOuter, kCoarse>(s.row_pointers, level.kh, level.kw,
                                        level.dw + static_cast<int64_t>(c) * taps, level.dw_bias[c],
                                        bc, out, band.vecs);
    }
  }
}

template <Activation kOuter>
void star_row_as(const Band& band, const StarLevel& level, const LevelState& s, const TileRow* rows,
                 const float* b) {
  if constexpr (kHasPairs) {
    // Every product that reads the row rounds it to bfloat16.
    if (level.pw1.pairs) return star_row_with<kOuter, true>(band, level, s, rows, b);
  }
  star_row_with<kOuter, false>(band, level, s, rows, b);
}

// The level's output row q, into band.x.
void star_row(const Band& band, const StarLevel& level, const LevelState& s, const TileRow* rows,
              int64_t q) {
  const float* b = s.b + (q % s.b_rows) * level.pw1.co * band.stride;
  switch (level.outer) {
    case Activation::kNone:
      return star_row_as<Activation::kNone>(band, level, s, rows, b);
    case Activation::kGelu:
      return star_row_as<Activation::kGelu>(band, level, s, rows, b);
    case Activation::kRelu6:
      return star_row_as<Activation::kRelu6>(band, level, s, rows, b);
    case Activation::kRelu:
      return star_row_as<Activation::kRelu>(band, level, s, rows, b);
    case Activation::kSilu:
      return star_row_as<Activation::kSilu>(band, level, s, rows, b);
  }
}

SDAN_INLINE int block_vecs(const Band& band, int block) {
  const int left = band.vecs - block * kBlockVecs;
  return left < kBlockVecs ? left : kBlockVecs;
}

// Writes the last level's row q: through `fuse` if there is one.
void emit(Band& band, int64_t q) {
  const StarChain& chain = *band.chain;
  const int64_t skip = band.region.x0 - band.x0;  // the tile's halo columns on the left
  const int64_t count = band.region.x1 - band.region.x0;
  if (chain.fuse.co == 0) {
    store_tile(chain.out, band.region.n, image_row(band, q), band.region.x0, 0,
               chain.levels[chain.level_count - 1].pw1.co, count, band.x + skip, band.stride);
    return;
  }
  const bool pairs = chain.fuse.pairs;
  const int last = chain.levels[chain.level_count - 1].pw1.co;
  const int blocks = (band.vecs + kBlockVecs - 1) / kBlockVecs;
  for (int j = 0; j < blocks; ++j) {
    const int64_t column = static_cast<int64_t>(j) * kBlock;
    const int vecs = block_vecs(band, j);
    const int64_t begin = column > skip ? column : skip;
    const int64_t limit = skip + count;
    const int64_t end = column + vecs * kLanes < limit ? column + vecs * kLanes : limit;
    if (begin >= end) continue;
    PointwiseInput inputs[kMaxLevels + 1];
    int n = 0;
    for (int i = 0; i < chain.level_count; ++i) {
      const LevelState& s = band.levels[i];
      if (s.d_channels == 0) continue;
      inputs[n++] = {s.d + (q % s.d_rows) * s.d_channels * band.stride + column, band.stride,
                     s.d_channels};
    }
    inputs[n++] = {band.x + column, band.stride, last};
    if (pairs) {
      pack_pairs(band.x + column, band.stride, last, vecs, band.z, kBlock);
      inputs[n - 1] = {band.z, kBlock, tile_rows(last, true)};
    }
    pointwise_block(inputs, n, 0, chain.fuse, band.block, kBlock, vecs, &band.queue, kLinesAStep);
    store_tile(chain.out, band.region.n, image_row(band, q), band.x0 + begin, 0, chain.fuse.co,
               end - begin, band.block + (begin - column), kBlock);
  }
}

// Asks for the row of output that this row of input leads to, near the image's last row the first
// of several, and for the next row of input.
void prefetch_rows(Band& band) {
  const StarChain& chain = *band.chain;
  const Region& region = band.region;
  const int channels =
      chain.fuse.co > 0 ? chain.fuse.co : chain.levels[chain.level_count - 1].pw1.co;
  band.queue.clear();
  const int64_t q = band.row - band.lag;
  if (q >= region.y0 && q < region.y1) {
    band.queue.add(chain.out, region.n, image_row(band, q), region.x0, channels,
                   region.x1 - region.x0, true);
  }
  if (band.row + 1 == band.rows_end) return;
  if (chain.before != nullptr) {
    gate_prefetch(*chain.before, region.n, image_row(band, band.row + 1), 0,
                  chain.width < kGateAhead ? chain.width : kGateAhead, &band.queue);
  } else {
    band.queue.add(chain.x, region.n, image_row(band, band.row + 1), band.x0, chain.channels,
                   band.width, false);
  }
}

void push(Band& band, int index, int64_t y);

// What follows once level `index` has its output row q complete in band.x.
void row_done(Band& band, int index, int64_t q) {
  if (index + 1 < band.chain->level_count) {
    push(band, index + 1, q);
  } else {
    emit(band, q);
  }
}

// The rows that the depth-wise convolution for output row q spans, as they lie in the image.
void gather_rows(const Band& band, const StarLevel& level, const LevelState& s, int64_t q,
                 TileRow* rows) {
  const int64_t height = band.chain->height;
  for (int i = 0; i < level.kh; ++i) {
    const int64_t y = band.upwards ? q + rows_above(level) - i : q - rows_above(level) + i;
    if (y < 0 || y >= height) {
      rows[i] = {band.zeros + s.margin, 0};
      continue;
    }
    const float* a = s.a;
    int64_t at = y;
    if (y >= band.meeting_row) {
      // Both bands lay out their scratch alike.
      a = reinterpret_cast<const float*>(band.partner_base +
                                         (reinterpret_cast<const char*>(s.a) - band.base));
      at = height - 1 - y;
    }
    rows[i] = {a + (at % level.kh) * level.pw1.co * s.a_stride + s.margin,
               static_cast<ptrdiff_t>(s.a_stride)};
  }
}

constexpr int kMaxKernel = 255;

// Completes the level's next output row and passes it on.
void next_row(Band& band, int index) {
  const StarLevel& level = band.chain->levels[index];
  LevelState& s = band.levels[index];
  const int64_t q = s.out_next++;
  TileRow rows[kMaxKernel];
  gather_rows(band, level, s, q, rows);
  star_row(band, level, s, rows, q);
  row_done(band, index, q);
}

// Feeds input row y, in band.x, to a level; in order, from the level's first row on.
void push(Band& band, int index, int64_t y) {
  const StarLevel& level = band.chain->levels[index];
  LevelState& s = band.levels[index];
  const int ci = level.pw1.ci, co = level.pw1.co;
  const int blocks = (band.vecs + kBlockVecs - 1) / kBlockVecs;
  float* a = s.a + (y % level.kh) * co * s.a_stride + s.margin;
  float* b = s.b + (y % s.b_rows) * co * band.stride;
  const bool distil = level.distill.co > 0 && y >= band.region.y0 && y < band.region.y1;
  // Rows of the halo are there for their neighbours' depth-wise convolution alone.
  const bool gates = y >= s.out_begin && y < s.out_end;
  const bool pairs = level.pw1.pairs;
  const PointwiseInput block{band.z, kBlock, tile_rows(ci, pairs)};
  if (index == band.chain->level_count / 2) prefetch_rows(band);
  for (int j = 0; j < blocks; ++j) {
    const int64_t column = static_cast<int64_t>(j) * kBlock;
    const int vecs = block_vecs(band, j);
    if (pairs) {
      normalise_block<true>(band.x + column, band.stride, ci, level.eps, band.z, kBlock, vecs,
                            kBlock, distil ? band.raw : nullptr);
    } else {
      normalise_block<false>(band.x + column, band.stride, ci, level.eps, band.z, kBlock, vecs,
                             kBlock);
    }
    if (distil) {
      const Pointwise& pw = level.distill;
      float* d = s.d + (y % s.d_rows) * s.d_channels * band.stride + column;
      if (pairs) {
        const PointwiseInput raw{band.raw, kBlock, tile_rows(ci, true)};
        pointwise_block(&raw, 1, 0, pw, band.block, kBlock, vecs, &band.queue, kLinesAStep);
        gelu_block<true>(band.block, kBlock, pw.co, vecs);
        pack_pairs(band.block, kBlock, pw.co, vecs, d, band.stride);
      } else {
        const PointwiseInput row{band.x + column, static_cast<ptrdiff_t>(band.stride), ci};
        pointwise_block(&row, 1, 0, pw, d, band.stride, vecs, &band.queue, kLinesAStep);
        gelu_block<false>(d, band.stride, pw.co, vecs);
      }
    }
    pointwise_block(&block, 1, 0, level.pw1, a + column, s.a_stride, vecs, &band.queue,
                    kLinesAStep);
    if (gates) {
      pointwise_block(&block, 1, 0, level.pw2, b + column, band.stride, vecs, &band.queue,
                      kLinesAStep);
    }
  }
  if (band.right_edge) {
    // The padding of the depth-wise convolution; PW1 left its bias there.
    const int64_t tail = static_cast<int64_t>(band.vecs) * kLanes - band.width;
    for (int c = 0; c < co; ++c) fill_zero(a + c * s.a_stride + band.width, tail);
  }
  while (s.out_next < s.out_end && s.out_next + rows_above(level) <= y) next_row(band, index);
}

// After a level's last row of input: the output rows that waited for the rows beyond it, which are
// the image's edge or the partner's.
void finish_level(Band& band, int index, ChainMeeting* meeting) {
  LevelState& s = band.levels[index];
  int64_t end = s.out_end;
  if (meeting != nullptr) {
    __atomic_store_n(&meeting->sides[band.upwards].levels_ready, index + 1, __ATOMIC_RELEASE);
  }
  if (end > band.meeting_row - rows_above(band.chain->levels[index])) {
    if (end > band.meeting_row) end = band.meeting_row;
    const ChainMeeting::Side& partner = meeting->sides[!band.upwards];
    wait_for(&partner.levels_ready, index + 1);
    band.partner_base = partner.scratch;
  }
  while (s.out_next < end) next_row(band, index);
}

SDAN_INLINE int64_t clip(int64_t v, int64_t low, int64_t high) {
  return v < low ? low : (v > high ? high : v);
}

}  // namespace

void star_chain_scratch(const StarChain* chain, int64_t width, int64_t* bytes) {
  Band band;
  int64_t halo = 0;
  for (int i = 0; i < chain->level_count; ++i) halo += chain->levels[i].kw / 2;
  *bytes = place(*chain, width + 2 * halo < chain->width ? width + 2 * halo : chain->width, nullptr,
                 &band);
}

void star_chain_run(const StarChain* chain, const Region* region, bool upwards,
                    ChainMeeting* meeting, void* scratch) {
  const TileScope tiles(chain->levels[0].pw1);
  Band band;
  band.chain = chain;
  band.region = *region;
  band.upwards = upwards;
  band.base = static_cast<const char*>(scratch);
  band.meeting_row = kNeverMet;
  if (upwards) {
    band.region.y0 = chain->height - region->y1;
    band.region.y1 = chain->height - region->y0;
  }
  int64_t halo = 0;
  for (int i = 0; i < chain->level_count; ++i) halo += chain->levels[i].kw / 2;
  band.x0 = clip(region->x0 - halo, 0, chain->width);
  const int64_t x1 = clip(region->x1 + halo, 0, chain->width);
  band.width = x1 - band.x0;
  band.right_edge = x1 == chain->width;
  place(*chain, band.width, static_cast<char*>(scratch), &band);

  int64_t begin = band.region.y0, end = band.region.y1, halo_y = 0;
  for (int i = chain->level_count - 1; i >= 0; --i) {
    const StarLevel& level = chain->levels[i];
    LevelState& s = band.levels[i];
    s.out_begin = s.out_next = begin;
    s.out_end = end;
    halo_y += rows_above(level);
    begin = clip(begin - rows_above(level), 0, chain->height);
    end = clip(end + rows_above(level), 0, chain->height);
  }
  if (meeting != nullptr) {
    if (__atomic_load_n(&meeting->rows_taken, __ATOMIC_RELAXED) >= end - begin) return;
    meeting->sides[upwards].scratch = band.base;
  }
  for (int i = 0; i < chain->level_count; ++i) {
    const StarLevel& level = chain->levels[i];
    LevelState& s = band.levels[i];
    // Margins are read as the zero padding at the image's edges; inside the image they only reach
    // the halo.
    const int64_t padded = static_cast<int64_t>(band.vecs) * kLanes;
    for (int64_t r = 0; r < static_cast<int64_t>(level.kh) * level.pw1.co; ++r) {
      float* row = s.a + r * s.a_stride;
      fill_zero(row, s.margin);
      fill_zero(row + s.margin + padded, s.a_stride - s.margin - padded);
    }
  }
  band.rows_end = end;
  band.lag = halo_y;
  int64_t y = begin;
  const auto take = [&]() -> bool {
    if (meeting == nullptr) return y < end;
    return __atomic_fetch_add(&meeting->rows_taken, 1, __ATOMIC_RELAXED) < end - begin;
  };
  for (; take(); ++y) {
    if (chain->before != nullptr) {
      gate_row(*chain->before, region->n, image_row(band, y), band.gate, band.x, band.stride);
    } else {
      load_tile(chain->x, region->n, image_row(band, y), band.x0, 0, chain->channels, band.width,
                band.x, band.stride);
    }
    band.row = y;
    push(band, 0, y);
  }
  if (y == begin) return;
  // The rows that are left are the partner's, who has begun the last of them.
  if (y < end) band.meeting_row = y;
  for (int i = 0; i < chain->level_count; ++i) finish_level(band, i, meeting);
  if (y == end) return;
  // The partner may still be reading what this thread's next task will overwrite.
  __atomic_store_n(&meeting->sides[upwards].finished, 1, __ATOMIC_RELEASE);
  wait_for(&meeting->sides[!upwards].finished, 1);
}

void pack_pointwise(const float* weight, int co, int ci, float* packed) {
  pack_pointwise_weight(weight, co, ci, packed);
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
