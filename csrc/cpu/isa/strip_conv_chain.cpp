// A chain of strip convolutions, gated or not, as one horizontal and one vertical pass, a band of
// rows at a time.
//
// On a zero-padded grid the horizontal convolutions act on rows and the vertical ones on columns,
// so they commute: all horizontal ones run first, a few rows at a time while they are hot, then all
// vertical ones, each reading a window of rows that slides down the tile, so that what lies between
// the input and the output never leaves the cache. The biases, which the reordering would misplace,
// add a field that is exactly
//   sum over stages s of  (bh_s a_s + bv_s a_{s+1})(h)  r_s(w),
// a_s = V_S ... V_s 1 (a column), r_s = H_S ... H_{s+1} 1 (a row), every operator zero-padded to
// the image.
#include "strip_conv_chain.h"

#include "by_dtype.h"
#include "plane_conv.h"
#include "row_lanes.h"
#include "tile_conv.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

// Pixels [first, first + count) of an axis of the image.
struct Span {
  int64_t first, count;
};

// Where a tile lies on one axis: its outputs, and the image's length.
struct Axis {
  int64_t out_first, out_count, size;
};

SDAN_INLINE int64_t strip_pad(const StripArgs& s) {
  return (s.used - 1) / 2 * s.d;
}

// Sum of the pads of strips [from, stages).
SDAN_INLINE int64_t pad_from(const StripArgs* strips, int64_t from, int64_t stages) {
  int64_t pad = 0;
  for (int64_t s = from; s < stages; ++s) pad += strip_pad(strips[s]);
  return pad;
}

// The part inside the image of the tile's outputs widened by `pad` on either side.
SDAN_INLINE Span clipped(const Axis& axis, int64_t pad) {
  int64_t first = axis.out_first - pad;
  int64_t last = axis.out_first + axis.out_count + pad;
  first = first < 0 ? 0 : first;
  last = last > axis.size ? axis.size : last;
  return {first, last - first};
}

struct NoBias {
  template <int R, int V>
  SDAN_INLINE void add(Vec (&)[R][V], int64_t, int64_t, int64_t) const {}
};

struct NoPrepare {
  SDAN_INLINE void operator()(int64_t) const {}
};

// Rows that the horizontal pass takes together at most: with channels as lanes, a vector of the
// input then serves several taps and a weight several rows; of planes read in place, the vectors at
// several rows' ends are as many independent sums.
constexpr int64_t kPlaneRows = 4;
template <bool kLanewise>
constexpr int64_t line_rows() {
  return kLanewise ? kConvVecs : kPlaneRows;
}

// Runs strips [from, stages) along `count` lines of pixels, `line_floats` apart; `taps` holds each
// as a row convolution. The lines lie in `a`, zero outside the image, and pixel 0 of `a` and of
// `b`, the other buffer, stands at axis.out_first - pad_from(strips, 0, stages). The tile's outputs
// go to `dest`, lines dest_floats apart.
template <bool kLanewise>
void run_lines(float* a, float* b, int64_t line_floats, int64_t count, const StripArgs* strips,
               const Taps* taps, int64_t from, int64_t stages, const Axis& axis, float* dest,
               int64_t dest_floats) {
  constexpr int kStep = pixel_floats<kLanewise>();
  const int64_t pad = pad_from(strips, 0, stages);
  if (from == stages) {
    for (int64_t l = 0; l < count; ++l) {
      std::memcpy(dest + l * dest_floats, a + l * line_floats + pad * kStep,
                  static_cast<size_t>(axis.out_count * kStep) * sizeof(float));
    }
    return;
  }
  const int64_t origin = axis.out_first - pad;
  for (int64_t s = from; s < stages; ++s) {
    // Stage s is wanted as far as the later ones reach; outside the image it is zero.
    const int64_t later = pad_from(strips, s + 1, stages);
    const Span span = clipped(axis, later);
    const int64_t begin = span.first - origin;
    const int64_t end = begin + span.count;
    const bool last = s + 1 == stages;
    if (!last) {
      const int64_t wanted = axis.out_first - later - origin;
      const int64_t wanted_end = wanted + axis.out_count + 2 * later;
      for (int64_t l = 0; l < count; ++l) {
        fill_zero(b + l * line_floats + wanted * kStep, (begin - wanted) * kStep);
        fill_zero(b + l * line_floats + end * kStep, (wanted_end - end) * kStep);
      }
    }
    const float* in = a + (begin - strip_pad(strips[s])) * kStep;
    float* out = last ? dest : b + begin * kStep;
    const int64_t out_floats = last ? dest_floats : line_floats;
    if constexpr (kLanewise) {
      // The axes change places: pixels are the rows of this convolution, lines its columns.
      const Taps turned = {taps[s].weights, taps[s].kw, 1,
                           taps[s].dw,      1,          static_cast<int>(line_floats)};
      const GridSink<true, float> sink = {out, kStep, out_floats, count, kLanes};
      const ConvBlock<true, NoBias, GridSink<true, float>, NoFetch> block = {
          in, turned, {}, sink, {}};
      conv_tile(&block, 1, kStep, span.count, count, NoPrepare{});
    } else {
      for (int64_t l = 0; l < count; ++l) {
        const GridSink<false, float> sink = {out + l * out_floats, 0, 1, span.count, kLanes};
        conv_rows<false, 1, kRowConvVecs, 1>(in + l * line_floats, taps[s], 0, 0, span.count,
                                             NoBias{}, sink, NoFetch{});
      }
    }
    float* t = a;
    a = b;
    b = t;
  }
}

// Ones inside the image, zero outside: what a bias adds along one axis.
template <bool kLanewise>
void ones_line(float* line, const StripArgs* strips, int64_t stages, const Axis& axis) {
  constexpr int kStep = pixel_floats<kLanewise>();
  const int64_t pad = pad_from(strips, 0, stages);
  const Span span = clipped(axis, pad);
  const int64_t begin = (span.first - (axis.out_first - pad)) * kStep;
  const int64_t end = begin + span.count * kStep;
  fill_zero(line, begin);
  for (int64_t i = begin; i < end; ++i) line[i] = 1.0f;
  fill_zero(line + end, (axis.out_count + 2 * pad) * kStep - end);
}

SDAN_INLINE int64_t round_up(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

// Hands out pieces of one scratch allocation; with a null base it only counts.
struct Arena {
  float* base;
  int64_t used;
  float* take(int64_t floats) {
    float* p = base == nullptr ? nullptr : base + used;
    used += round_up(floats);
    return p;
  }
};

// Rows [first, last) of the image after some of the vertical strips; outside the image they are
// zero. The window slides: what its reader has passed is overwritten.
struct Level {
  float* rows;
  int64_t capacity;
  int64_t first, last;
};

struct Buffers {
  Level* levels;     // one per stage: what its vertical strip reads
  float* line[2];    // line_rows() lines of (columns + halo_w) pixels
  float* column[2];  // (rows + halo_h) pixels
  float* field_row;  // stages x row_floats: r_s
  float* field_col;  // stages x col_floats: bh_s a_s + bv_s a_{s+1}
  float* work;       // col_floats
  Taps* horizontal;  // the strips as row convolutions
  Taps* vertical;    // as column convolutions
  Taps* turned;      // the vertical strips as row convolutions, for the field's column factors
  float* lanes[2];   // the columns of kLanes rows, where rows are lanes
  LaneBits* masks;   // of the first strip's edges, where it reads the plane in place
  int64_t row_floats, col_floats, line_floats;
};

template <bool kLanewise>
Buffers lay_out(const StripChainArgs& a, int64_t rows, int64_t columns, int64_t masks, bool turned,
                Arena* arena) {
  constexpr int kStep = pixel_floats<kLanewise>();
  constexpr int64_t kSlack = kConvSlack * kLanes;
  Buffers b;
  b.row_floats = round_up(columns * kStep) + kLanes;
  b.col_floats = round_up(rows * kStep) + kLanes;
  b.line_floats = round_up((columns + a.halo_w) * kStep) + kSlack + kLanes;
  b.levels = reinterpret_cast<Level*>(
      arena->take(static_cast<int64_t>((sizeof(Level) + 3) / 4) * a.stages));
  for (int64_t s = 0; s < a.stages; ++s) {
    const int64_t halo = 2 * pad_from(a.vertical, s, a.stages);
    int64_t capacity = strip_level_rows(a.band, halo);
    if (capacity > rows + halo) capacity = rows + halo;
    float* p = arena->take(capacity * b.row_floats + kSlack);
    if (arena->base != nullptr) b.levels[s] = {p, capacity, 0, 0};
  }
  for (int i = 0; i < 2; ++i) {
    b.line[i] = arena->take(line_rows<kLanewise>() * b.line_floats + kSlack);
    b.lanes[i] = arena->take(turned ? (columns + a.halo_w + 2 * kLanes) * kLanes : 0);
    b.column[i] = arena->take((rows + a.halo_h) * kStep + kSlack);
  }
  b.field_row = arena->take(a.stages * b.row_floats + kSlack);
  b.field_col = arena->take(a.stages * b.col_floats);
  b.work = arena->take(b.col_floats);
  const int64_t tap_floats = static_cast<int64_t>((sizeof(Taps) + 3) / 4) * a.stages;
  b.horizontal = reinterpret_cast<Taps*>(arena->take(tap_floats));
  b.vertical = reinterpret_cast<Taps*>(arena->take(tap_floats));
  b.turned = reinterpret_cast<Taps*>(arena->take(tap_floats));
  b.masks = reinterpret_cast<LaneBits*>(arena->take((masks + 1) / 2));
  for (int64_t s = 0; s < a.stages; ++s) {
    const int kw = static_cast<int>(a.horizontal[s].used);
    const int kh = static_cast<int>(a.vertical[s].used);
    float* wh = arena->take(static_cast<int64_t>(kw) * kStep);
    float* wv = arena->take(static_cast<int64_t>(kh) * kStep);
    if (arena->base == nullptr) continue;
    b.horizontal[s] = {wh, 1, kw, 1, static_cast<int>(a.horizontal[s].d), kStep};
    b.vertical[s] = {wv, kh, 1, static_cast<int>(a.vertical[s].d), 1, kStep};
    b.turned[s] = {wv, 1, kh, 1, static_cast<int>(a.vertical[s].d), kStep};
  }
  return b;
}

template <bool kLanewise, typename T>
SDAN_INLINE Vec channel_vec(const void* p, int64_t c0, int channels) {
  if (p == nullptr) return zero();
  const T* t = static_cast<const T*>(p) + c0;
  return kLanewise ? load_n(t, channels) : set1(to_float(*t));
}

// The row and column factors of the bias field for this tile.
template <bool kLanewise, typename T>
void make_field(const StripChainArgs& a, const Buffers& b, const Axis& rows, const Axis& columns,
                int64_t c0, int channels) {
  constexpr int kStep = pixel_floats<kLanewise>();
  for (int64_t s = 0; s < a.stages; ++s) {
    ones_line<kLanewise>(b.line[0], a.horizontal, a.stages, columns);
    run_lines<kLanewise>(b.line[0], b.line[1], b.line_floats, 1, a.horizontal, b.horizontal, s + 1,
                         a.stages, columns, b.field_row + s * b.row_floats, 0);
    float* q = b.field_col + s * b.col_floats;
    for (int64_t i = 0; i < rows.out_count * kStep; i += kLanes) store(q + i, zero());
    for (int term = 0; term < 2; ++term) {  // bh_s a_s, then bv_s a_{s+1}
      const void* bias = term == 0 ? a.horizontal[s].bias : a.vertical[s].bias;
      if (bias == nullptr) continue;
      const Vec scale = channel_vec<kLanewise, T>(bias, c0, channels);
      ones_line<kLanewise>(b.column[0], a.vertical, a.stages, rows);
      run_lines<kLanewise>(b.column[0], b.column[1], 0, 1, a.vertical, b.turned, s + term, a.stages,
                           rows, b.work, 0);
      for (int64_t i = 0; i < rows.out_count * kStep; i += kLanes) {
        store(q + i, fma(load(b.work + i), scale, load(q + i)));
      }
    }
  }
}

// The field: sum over stages of column factor times row factor.
template <bool kLanewise>
struct FieldBias {
  const float* row;
  const float* col;
  int64_t row_floats, col_floats, stages;
  template <int R, int V>
  SDAN_INLINE void add(Vec (&sums)[R][V], int64_t r0, int64_t dh, int64_t c) const {
    constexpr int kStep = pixel_floats<kLanewise>();
    const float* q = col + r0 * kStep;
    const float* w = row + c * kStep;
    for (int64_t s = 0; s < stages; ++s, q += col_floats, w += row_floats) {
      Vec in[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) in[v] = load(w + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec factor = load_weight<kLanewise>(q + r * dh * kStep);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] = fma(in[v], factor, sums[r][v]);
      }
    }
  }
};

// Stores whole vectors of a float tile; lanes past the last column are never read back as pixels.
template <bool kLanewise>
struct TileSink {
  float* out;
  int64_t row_floats, columns;
  template <int V>
  SDAN_INLINE void operator()(int64_t r, int64_t c, const Vec (&sums)[V]) const {
    constexpr int kVecPixels = kLanewise ? 1 : kLanes;
    float* p = out + r * row_floats + c * pixel_floats<kLanewise>();
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if (c + v * kVecPixels < columns) store(p + v * kLanes, sums[v]);
    }
  }
};

// Where the tile's results go, times the gate's pixels there unless `gate` is null.
template <bool kLanewise, typename T>
struct GatedSink {
  GridSink<kLanewise, T> grid;
  const T* gate;
  template <int V>
  SDAN_INLINE void operator()(int64_t r, int64_t c, const Vec (&sums)[V]) const {
    if (gate == nullptr) {
      grid(r, c, sums);
      return;
    }
    const T* p = gate + r * grid.row + c * (kLanewise ? grid.pixel : 1);
    const ptrdiff_t next = kLanewise ? grid.pixel : kLanes;
    Vec gated[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int64_t left =
          kLanewise ? (c + v < grid.columns ? grid.channels : 0) : grid.columns - c - v * kLanes;
      if (left >= kLanes) {
        gated[v] = sums[v] * load(p + v * next);
      } else if (left > 0) {
        gated[v] = sums[v] * load_n(p + v * next, static_cast<int>(left));
      } else {
        gated[v] = zero();
      }
    }
    grid(r, c, gated);
  }
};

// Whether rows become lanes of the horizontal strips: these have the taps that pay for two
// transpositions (measured), few lanes of the last rows are empty, and the columns stay in a
// second-level cache.
SDAN_INLINE bool turns_rows(const StripChainArgs& a, bool wide) {
  constexpr int64_t kMostColumns = 8192;
  int64_t taps = 0;
  for (int64_t s = 0; s < a.stages; ++s) taps += a.horizontal[s].used;
  return !SDAN_IS_PORTABLE && taps >= (SDAN_IS_AVX512 && !wide ? 11 : 13) &&
         4 * a.h >= 3 * round_up(a.h) && a.w + a.halo_w <= kMostColumns;
}

// One tile on its way down: its windows and what fills them.
template <bool kLanewise, typename T>
struct Bands {
  static constexpr int kStep = pixel_floats<kLanewise>();
  const StripChainArgs& a;
  const Buffers& b;
  const Axis& columns;
  const T* x;     // the plane
  int64_t pixel;  // elements from one pixel to the next
  int channels;
  const PlaneConv<float>* first;  // the first strip where it reads the plane in place, or nullptr
  int64_t ahead;                  // the end of the image rows that the tile reads
  bool turned;                    // whether rows are lanes of the horizontal strips

  // The horizontal strips of image rows [from, to), which all exist.
  void horizontal(int64_t from, int64_t to, float* out) const {
    if constexpr (!kLanewise) {
      if (turned) {
        as_lanes(from, to, out);
        return;
      }
    }
    if constexpr (!kLanewise && std::is_same_v<T, float>) {
      if (first != nullptr) {
        in_place(from, to, out);
        return;
      }
    }
    constexpr int64_t kRows = kLanewise ? line_rows<true>() : 1;
    const int64_t width = columns.out_count + a.halo_w;
    const int64_t row = a.w * pixel;
    for (int64_t r = from; r < to; r += kRows, out += kRows * b.row_floats) {
      const int64_t count = to - r < kRows ? to - r : kRows;
      for (int64_t l = 0; l < count; ++l) {
        stage_row<kLanewise>(b.line[0] + l * b.line_floats, x + (r + l) * row,
                             columns.out_first - a.halo_w / 2, width, a.w, pixel, channels, kStep);
      }
      run_lines<kLanewise>(b.line[0], b.line[1], b.line_floats, count, a.horizontal, b.horizontal,
                           0, a.stages, columns, out, b.row_floats);
    }
  }

  // The same with rows as lanes.
  void as_lanes(int64_t from, int64_t to, float* out) const {
    const int64_t pad = a.halo_w / 2;
    const int64_t origin = columns.out_first - pad;
    for (int64_t r = from; r < to; r += kLanes, out += kLanes * b.row_floats) {
      const int rows = lanes_of(to - r);
      float *in = b.lanes[0], *other = b.lanes[1];
      // What a strip does not write, up to what the next one reads, is beyond the image.
      const auto zero_beside = [&](float* line, int64_t reach, const Span& span) {
        const int64_t wanted = pad - reach;
        const int64_t begin = span.first - origin, end = begin + span.count;
        fill_zero(line + wanted * kLanes, (begin - wanted) * kLanes);
        fill_zero(line + end * kLanes, (wanted + columns.out_count + 2 * reach - end) * kLanes);
      };
      Span span = clipped(columns, pad);
      rows_to_lanes(x + r * a.w + span.first, a.w, rows, span.count,
                    in + (span.first - origin) * kLanes);
      zero_beside(in, pad, span);
      for (int64_t s = 0; s < a.stages; ++s) {
        const int64_t later = pad_from(a.horizontal, s + 1, a.stages);
        span = clipped(columns, later);
        const int64_t begin = span.first - origin;
        const float* taps_begin = in + (begin - strip_pad(a.horizontal[s])) * kLanes;
        if (s + 1 == a.stages) {
          convolve_lanes<true>(taps_begin, b.horizontal[s], span.count, out, b.row_floats, rows);
        } else {
          convolve_lanes<false>(taps_begin, b.horizontal[s], span.count, other + begin * kLanes, 0,
                                rows);
          zero_beside(other, later, span);
          float* t = in;
          in = other;
          other = t;
        }
      }
    }
  }

  // The same, without a padded copy.
  void in_place(int64_t from, int64_t to, float* out) const {
    const bool last = a.stages == 1;
    float* line = b.line[0] + pad_from(a.horizontal, 0, a.stages);
    PlaneConv<float> conv = *first;
    conv.y_row = last ? b.row_floats : b.line_floats;
    for (int64_t r = from; r < to; r += kPlaneRows, out += kPlaneRows * b.row_floats) {
      const int64_t count = to - r < kPlaneRows ? to - r : kPlaneRows;
      const PlaneRows<float> rows = {conv.x + r * conv.w, last ? out : line, nullptr, nullptr};
      if (count == kPlaneRows) {
        plane_strip<kPlaneRows>(conv, rows);
      } else {
        for (int64_t l = 0; l < count; ++l) {
          plane_strip<1>(conv, PlaneRows<float>{rows.x + l * conv.w, rows.y + l * conv.y_row,
                                                nullptr, nullptr});
        }
      }
      if (last) continue;
      run_lines<kLanewise>(b.line[0], b.line[1], b.line_floats, count, a.horizontal, b.horizontal,
                           1, a.stages, columns, out, b.row_floats);
    }
  }

  // The input of vertical strip s shall hold image rows [from, to).
  void fill(int64_t s, int64_t from, int64_t to) const {
    Level& level = b.levels[s];
    if (to <= level.last) return;
    if (turned && s == 0 && to < ahead) {  // whole groups of lanes
      const int64_t begin = level.last < 0 ? 0 : level.last;
      const int64_t whole = begin + round_up(to - begin);
      to = whole < ahead ? whole : ahead;
    }
    if (to - level.first > level.capacity) {
      const int64_t kept = level.last - from;
      std::memmove(level.rows, level.rows + (from - level.first) * b.row_floats,
                   static_cast<size_t>(kept * b.row_floats) * sizeof(float));
      level.first = from;
    }
    float* rows = level.rows - level.first * b.row_floats;
    const int64_t begin = level.last < 0 ? (to < 0 ? to : 0) : level.last;
    const int64_t end = to > a.h ? (begin > a.h ? begin : a.h) : to;
    for (int64_t r = level.last; r < begin; ++r) fill_zero(rows + r * b.row_floats, b.row_floats);
    for (int64_t r = end; r < to; ++r) fill_zero(rows + r * b.row_floats, b.row_floats);
    level.last = to;
    if (begin >= end) return;
    if (s == 0) {
      horizontal(begin, end, rows + begin * b.row_floats);
      return;
    }
    const TileSink<kLanewise> sink = {rows + begin * b.row_floats, b.row_floats, columns.out_count};
    const ConvBlock<kLanewise, NoBias, TileSink<kLanewise>, NoFetch> block = {
        window(s - 1, begin, end), b.vertical[s - 1], {}, sink, {}};
    conv_tile(&block, 1, b.row_floats, end - begin, columns.out_count, NoPrepare{});
  }

  // Row 0 of what vertical strip s reads for its outputs [from, to).
  const float* window(int64_t s, int64_t from, int64_t to) const {
    const int64_t pad = strip_pad(a.vertical[s]);
    fill(s, from - pad, to + pad);
    return b.levels[s].rows + (from - pad - b.levels[s].first) * b.row_floats;
  }
};

template <bool kLanewise, typename T>
void run_tile(const StripChainArgs& a, int64_t n, int64_t block, int64_t tile) {
  const int64_t h0 = tile / a.grid.tiles_w * a.grid.tile_h;
  const int64_t w0 = tile % a.grid.tiles_w * a.grid.tile_w;
  const Axis rows = {h0, a.h - h0 < a.grid.tile_h ? a.h - h0 : a.grid.tile_h, a.h};
  const Axis columns = {w0, a.w - w0 < a.grid.tile_w ? a.w - w0 : a.grid.tile_w, a.w};
  const int64_t c0 = block * a.lanes;
  const int channels = static_cast<int>(a.c - c0 < a.lanes ? a.c - c0 : a.lanes);

  // A tile as wide as the plane needs no copy of it, unless masks would take longer than that.
  RowEdges edges = edges_of(a.w, strip_pad(a.horizontal[0]));
  int64_t masks = edges.count() * a.horizontal[0].used;
  const bool turned = !kLanewise && turns_rows(a, sizeof(T) == sizeof(float));
  const bool in_place = !kLanewise && !turned && std::is_same_v<T, float> &&
                        columns.out_count == a.w && masks <= 10 * edges.all;
  if (!in_place) masks = 0;

  Arena arena = {nullptr, 0};
  lay_out<kLanewise>(a, rows.out_count, columns.out_count, masks, turned, &arena);
  arena = {static_cast<float*>(thread_scratch(static_cast<size_t>(arena.used) * sizeof(float))), 0};
  const Buffers b = lay_out<kLanewise>(a, rows.out_count, columns.out_count, masks, turned, &arena);
  for (int64_t s = 0; s < a.stages; ++s) {
    for (int axis = 0; axis < 2; ++axis) {
      const StripArgs& strip = axis == 0 ? a.horizontal[s] : a.vertical[s];
      float* out = const_cast<float*>(axis == 0 ? b.horizontal[s].weights : b.vertical[s].weights);
      stage_weights<kLanewise>(out, static_cast<const T*>(strip.weight) + c0 * strip.k, strip.k,
                               static_cast<int>(strip.k), 0, static_cast<int>(strip.first), 1,
                               static_cast<int>(strip.used), channels);
    }
  }
  if (a.any_bias) make_field<kLanewise, T>(a, b, rows, columns, c0, channels);

  const int64_t pixel = kLanewise ? a.c : 1;  // elements from one pixel to the next
  const int64_t plane = kLanewise ? n * a.h * a.w * a.c + c0 : (n * a.c + c0) * a.h * a.w;
  const T* x = static_cast<const T*>(a.x) + plane;

  PlaneConv<float> first = {};
  if constexpr (!kLanewise && std::is_same_v<T, float>) {
    if (in_place) {
      edges.masks = b.masks;
      fill_masks(edges, a.w, static_cast<int>(a.horizontal[0].used), a.horizontal[0].d);
      const float* images = static_cast<const float*>(a.x);
      first = {
          images, images + a.n * a.c * a.h * a.w, x, nullptr, a.h, a.w, 0, b.horizontal[0], zero(),
          edges};
      // What the first strip leaves beyond the image's ends.
      const int64_t pad = pad_from(a.horizontal, 0, a.stages);
      for (int64_t l = 0; a.stages > 1 && l < kPlaneRows; ++l) {
        fill_zero(b.line[0] + l * b.line_floats, pad);
        fill_zero(b.line[0] + l * b.line_floats + pad + a.w, pad);
      }
    }
  }
  const Span seen = clipped(rows, pad_from(a.vertical, 0, a.stages));
  const int64_t rows_end = seen.first + seen.count;
  const Bands<kLanewise, T> bands = {
      a, b, columns, x, pixel, channels, in_place ? &first : nullptr, rows_end, turned};
  for (int64_t s = 0; s < a.stages; ++s) {
    b.levels[s].first = b.levels[s].last = h0 - pad_from(a.vertical, s, a.stages);
  }
  const int64_t row = a.w * pixel;
  for (int64_t r = 0; r < rows.out_count; r += a.band) {
    const int64_t count = rows.out_count - r < a.band ? rows.out_count - r : a.band;
    const int64_t at = (h0 + r) * row + w0 * pixel;
    T* y = static_cast<T*>(a.y) + plane + at;
    const T* gate = a.gate == nullptr ? nullptr : static_cast<const T*>(a.gate) + plane + at;
    const GatedSink<kLanewise, T> sink = {{y, row, pixel, columns.out_count, channels}, gate};
    const FieldBias<kLanewise> field = {b.field_row, b.field_col + r * pixel_floats<kLanewise>(),
                                        b.row_floats, b.col_floats, a.any_bias ? a.stages : 0};
    using Ahead = Fetch<kLanewise, T, true>;
    const float* window = bands.window(a.stages - 1, h0 + r, h0 + r + count);
    const Ahead fetch = {x + at + (b.levels[0].last - h0 - r) * row, y, row, pixel, gate};
    const ConvBlock<kLanewise, FieldBias<kLanewise>, GatedSink<kLanewise, T>, Ahead> block = {
        window, b.vertical[a.stages - 1], field, sink, fetch};
    conv_tile(&block, 1, b.row_floats, count, columns.out_count, NoPrepare{});
  }
}

}  // namespace

void strip_conv_chain_run(const StripChainArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    for_each_tile(args, begin, end, [&](auto lanewise, int64_t n, int64_t group, int64_t tile) {
      run_tile<decltype(lanewise)::value, T>(args, n, group, tile);
    });
  });
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
