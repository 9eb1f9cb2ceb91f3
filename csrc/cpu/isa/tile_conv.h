// Depth-wise convolution of one zero-padded tile held in scratch: the core of depthwise_conv2d and
// of strip_conv_chain.
//
// A tile is a grid of pixels. With kLanewise = false a pixel is one float and a vector is kLanes
// neighbours of one row (NCHW); a tap's weight is one float. With kLanewise = true a pixel is one
// or more vectors of kLanes channels (channels_last), and a tap's weight is one for each. The
// address arithmetic is the same but for the pixel's size, so both formats share one kernel.
// Padding is part of the tile, so the kernel knows no borders.
//
// R output rows, dh apart, are computed together: a vector of the input, once loaded, serves up to
// R taps, because unaligned loads rather than multiply-adds would bind otherwise.
#pragma once

#include <type_traits>

#include "prefetch.h"
#include "row_conv.h"
#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

#if SDAN_IS_AVX512
constexpr int kConvVecs = 4;
constexpr int kRowConvVecs = 8;
#elif SDAN_IS_AVX2 || defined(__aarch64__)
constexpr int kConvVecs = 2;
constexpr int kRowConvVecs = 4;
#else
constexpr int kConvVecs = 1;
constexpr int kRowConvVecs = 4;
#endif

// What a kernel may read past the last pixel that it needs, in vectors.
constexpr int kConvSlack = kRowConvVecs;

// The taps of a convolution. `weights` is ordered [kw][kh], each a float or a vector. `pixel` is
// the floats from one pixel of the tile to the next, 1 in NCHW. `skipped` weights of each column
// lie between its kh and the next column's.
struct Taps {
  const float* weights;
  int kh, kw;
  int dh, dw;
  int pixel;
  int skipped = 0;
};

// Floats of a pixel of one vector.
template <bool kLanewise>
constexpr int pixel_floats() {
  return kLanewise ? kLanes : 1;
}

// Floats between neighbouring vectors of a row.
template <bool kLanewise>
SDAN_INLINE ptrdiff_t vector_stride(const Taps& taps) {
  return kLanewise ? taps.pixel : kLanes;
}

template <bool kLanewise>
SDAN_INLINE Vec load_weight(const float* w) {
  if constexpr (kLanewise) {
    return load(w);
  } else {
    return set1(*w);
  }
}

// How the taps of column j read V vectors, `next` apart: each whole. kWholeLines: what lies in the
// lines of the first and after the last of them may be read as well, where they are neighbours.
struct LoadAll {
  static constexpr bool kWholeLines = true;
  template <int V, typename T>
  SDAN_INLINE void operator()(Vec (&in)[V], const T* p, ptrdiff_t next, int) const {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) in[v] = load(p + v * next);
  }
};

template <int Uses, int V, typename T, typename Load>
SDAN_INLINE void load_used(Vec (&in)[V], const T* p, ptrdiff_t next, int j, const Load& load) {
  load(in, p, next, j);
  if constexpr (Uses > 1) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) pin(in[v]);
  }
}

// acc[r][v] += the convolution at output row r (rows are dh apart) and vector v. `x` points at the
// first tap of row 0; `row` is the distance in elements between rows dh apart, `column` between
// taps of a row. Needs kh >= R unless KH, the kernel's height where known, is given.
template <bool kLanewise, int R, int V, int KH, typename T, typename Load>
SDAN_INLINE void accumulate(Vec (&acc)[R][V], const T* x, const Taps& taps, ptrdiff_t row,
                            ptrdiff_t column, const Load& load) {
  constexpr int kStep = pixel_floats<kLanewise>();
  const int kh = KH > 0 ? KH : taps.kh;
  const ptrdiff_t next = vector_stride<kLanewise>(taps);
  const float* w = taps.weights;
  if constexpr (!kLanewise && KH == 1 && V > 2 && Load::kWholeLines && std::is_same_v<T, float>) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row_sums(acc[r], x + r * row, w, taps.kw, column);
    return;
  }
#if !SDAN_IS_PORTABLE
  if constexpr (!kLanewise && KH == 1 && R == 1 && V > 1 && std::is_same_v<T, bfloat16>) {
    if (column == 1 && taps.kw % 2 == 1) return row_sums(acc[0], x, w, taps.kw);
  }
#endif
  const ptrdiff_t next_weights = static_cast<ptrdiff_t>(kh + taps.skipped) * kStep;
  // An input that one row's taps alone read is loaded into the multiply-add.
  constexpr int kUses = R < KH || KH == 0 ? R : KH;
  for (int j = 0; j < taps.kw; ++j, x += column, w += next_weights) {
    if constexpr (KH > 0) {
#pragma GCC unroll 16
      for (int s = 0; s < R + KH - 1; ++s) {
        Vec in[V];
        load_used<kUses>(in, x + s * row, next, j, load);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          if (s - r < 0 || s - r >= KH) continue;
          const Vec tap = load_weight<kLanewise>(w + (s - r) * kStep);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) acc[r][v] = fma(in[v], tap, acc[r][v]);
        }
      }
    } else {
      const T* xs = x;
#pragma GCC unroll 8
      for (int s = 0; s < R - 1; ++s, xs += row) {
        Vec in[V];
        load_used<kUses>(in, xs, next, j, load);
#pragma GCC unroll 8
        for (int r = 0; r <= s; ++r) {
          const Vec tap = load_weight<kLanewise>(w + (s - r) * kStep);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) acc[r][v] = fma(in[v], tap, acc[r][v]);
        }
      }
      const float* ws = w;
      for (int s = R - 1; s < kh; ++s, xs += row, ws += kStep) {
        Vec in[V];
        load_used<kUses>(in, xs, next, j, load);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec tap = load_weight<kLanewise>(ws + (R - 1 - r) * kStep);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) acc[r][v] = fma(in[v], tap, acc[r][v]);
        }
      }
#pragma GCC unroll 8
      for (int t = 0; t < R - 1; ++t, xs += row) {
        Vec in[V];
        load_used<kUses>(in, xs, next, j, load);
#pragma GCC unroll 8
        for (int r = t + 1; r < R; ++r) {
          const Vec tap = load_weight<kLanewise>(ws + (R - 1 + t - r) * kStep);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) acc[r][v] = fma(in[v], tap, acc[r][v]);
        }
      }
    }
  }
}

// Writes sums to rows of pixels: `row` elements from one row to the next, `pixel` from one pixel to
// the next (one in NCHW), `columns` pixels per row. For channels_last only `channels` lanes of a
// pixel exist.
template <bool kLanewise, typename T>
struct GridSink {
  T* out;
  int64_t row, pixel, columns;
  int channels;
  template <int V>
  SDAN_INLINE void operator()(int64_t r, int64_t c, const Vec (&sums)[V]) const {
    if constexpr (kLanewise) {
      T* p = out + r * row + c * pixel;
      if (c + V <= columns && channels == kLanes) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v, p += pixel) store(p, sums[v]);
      } else {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v, p += pixel) {
          if (c + v < columns) store_n(p, sums[v], channels);
        }
      }
    } else {
      T* p = out + r * row + c;
      if (c + V * kLanes <= columns) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(p + v * kLanes, sums[v]);
      } else {
        const int64_t left = columns - c;
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const int64_t n = left - v * kLanes;
          if (n > 0) store_n(p + v * kLanes, sums[v], static_cast<int>(n < kLanes ? n : kLanes));
        }
      }
    }
  }
};

// Asks for the cache lines of image rows that are staged or read `in` rows on, and of outputs to
// come, one block's worth at a time: all the rows of a group at once would stall on the few misses
// that a core may have outstanding, and then leave the memory idle while it computes. The outputs
// are those of the next block, or in NCHW, where a block of short vectors is a line wide and its
// time too short for the memory to answer, those of the next group of rows. kAlone: one block of
// channels is computed, and no other asks for the second line of its pixels that straddle two.
template <bool kLanewise, typename T, bool kAlone = false>
struct Fetch {
  const T* in;   // what stands there when block (0, 0) is computed
  const T* out;  // output (0, 0)
  int64_t row, pixel;
  const T* gate = nullptr;  // read where outputs are written, or nullptr
  template <int R, int V>
  SDAN_INLINE void operator()(int64_t row0, int64_t column, int64_t dh) const {
    // 16-bit pixels share a line between two vectors of NCHW.
    constexpr int kEvery = kLanewise || kLanes * sizeof(T) >= 64 ? 1 : 64 / (kLanes * sizeof(T));
    const int64_t next = kLanewise ? pixel : kLanes;
    const int64_t first = column * (kLanewise ? pixel : 1);
    const int64_t later = kLanewise || SDAN_IS_AVX512 ? V * next : dh == 1 ? R * row : row;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row0 + r * dh) * row + first;
#pragma GCC unroll 8
      for (int v = 0; v < V; v += kEvery) {
        __builtin_prefetch(in + at + v * next, 0, 2);  // the first level is full of this window
        prefetch_write(out + at + later + v * next);
        if constexpr (kLanewise && kAlone) {
          __builtin_prefetch(in + at + v * next + kLanes - 1, 0, 2);
          prefetch_write(out + at + later + v * next + kLanes - 1);
        }
      }
    }
    if (gate == nullptr) return;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row0 + r * dh) * row + first;
#pragma GCC unroll 8
      for (int v = 0; v < V; v += kEvery) {
        const T* p = gate + at + later + v * next;
        __builtin_prefetch(p);
        if constexpr (kLanewise && kAlone) __builtin_prefetch(p + kLanes - 1);
      }
    }
  }
};

struct NoFetch {
  template <int R, int V>
  SDAN_INLINE void operator()(int64_t, int64_t, int64_t) const {}
};

// One block: R rows dh apart by V vectors. `bias.add(sums, row, dh, column)` comes last, since
// starting from a large bias would round every product to its unit; `sink(row, column, sums)` takes
// V vectors of one row. Rows and columns count output pixels of the tile.
template <bool kLanewise, int R, int V, int KH, typename Bias, typename Sink, typename Fetcher>
SDAN_INLINE void conv_block(const float* x, const Taps& taps, ptrdiff_t row_floats, int64_t row0,
                            int64_t column0, const Bias& bias, const Sink& sink,
                            const Fetcher& fetch) {
  fetch.template operator()<R, V>(row0, column0, taps.dh);
  Vec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = zero();
  }
  accumulate<kLanewise, R, V, KH>(acc, x, taps, row_floats * taps.dh,
                                  static_cast<ptrdiff_t>(taps.dw) * (kLanewise ? taps.pixel : 1),
                                  LoadAll{});
  bias.add(acc, row0, taps.dh, column0);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sink(row0 + r * taps.dh, column0, acc[r]);
}

// A group of R rows over all columns. Not inlined: each instance is one hot loop. All that it needs
// is taken by value: through a reference it would be loaded again after each store of a vector, and
// the next block's loads would wait for it.
template <bool kLanewise, int R, int V, int KH, typename Bias, typename Sink, typename Fetcher>
__attribute__((noinline)) void conv_rows(const float* x, Taps taps, ptrdiff_t row_floats,
                                         int64_t row0, int64_t columns, Bias bias, Sink sink,
                                         Fetcher fetch) {
  constexpr int kVecPixels = kLanewise ? 1 : kLanes;
  const ptrdiff_t pixel = kLanewise ? taps.pixel : 1;
  x += row0 * row_floats;
  int64_t c = 0;
  while (c < columns) {
    // Three vectors left of four are cheaper as four: the sums are more independent chains.
    const int64_t left = (columns - c + kVecPixels - 1) / kVecPixels;
    if (left >= V || (V >= 4 && left == V - 1)) {
      conv_block<kLanewise, R, V, KH>(x + c * pixel, taps, row_floats, row0, c, bias, sink, fetch);
      c += V * kVecPixels;
    } else if (V >= 8 && left >= 3) {
      conv_block<kLanewise, R, (V >= 8 ? V / 2 : 1), KH>(x + c * pixel, taps, row_floats, row0, c,
                                                         bias, sink, fetch);
      c += (V / 2) * kVecPixels;
    } else if (V >= 4 && left >= 2) {
      conv_block<kLanewise, R, (V >= 4 ? 2 : 1), KH>(x + c * pixel, taps, row_floats, row0, c, bias,
                                                     sink, fetch);
      c += 2 * kVecPixels;
    } else {
      conv_block<kLanewise, R, 1, KH>(x + c * pixel, taps, row_floats, row0, c, bias, sink, fetch);
      c += kVecPixels;
    }
  }
}

// One vector's worth of channels of a tile: its first padded input, its taps, what to add, where to
// write.
template <bool kLanewise, typename Bias, typename Sink, typename Fetcher>
struct ConvBlock {
  const float* x;
  Taps taps;
  Bias bias;
  Sink sink;
  Fetcher fetch;
  template <int R, int V, int KH>
  SDAN_INLINE void rows(ptrdiff_t row_floats, int64_t row, int64_t columns) const {
    conv_rows<kLanewise, R, V, KH>(x, taps, row_floats, row, columns, bias, sink, fetch);
  }
};

// rows x columns outputs of a tile with rows `row_floats` floats apart, for every block of channels
// in turn. Bias and sink see whole vectors; the sink has to cut the last one of a row, and to
// ignore columns past it (GridSink does). `prepare(n)` is called before input rows up to n - 1 are
// read, with rising n, so that a caller may stage rows right before their use. All blocks have the
// taps' sizes of the first one.
template <typename Block, typename Prepare>
SDAN_INLINE void conv_tile(const Block* blocks, int count, ptrdiff_t row_floats, int64_t rows,
                           int64_t columns, const Prepare& prepare) {
  const int kh = blocks[0].taps.kh;
  if (kh == 1) {  // taps.dh is 1 here, so two rows are neighbours
    int64_t r = 0;
    for (; r + 1 < rows; r += 2) {
      prepare(r + 2);
      for (int b = 0; b < count; ++b)
        blocks[b].template rows<2, kRowConvVecs / 2, 1>(row_floats, r, columns);
    }
    if (r < rows) {
      prepare(rows);
      for (int b = 0; b < count; ++b)
        blocks[b].template rows<1, kRowConvVecs, 1>(row_floats, r, columns);
    }
    return;
  }
  const int64_t dh = blocks[0].taps.dh;
  const int64_t halo = (kh - 1) * dh;
  for (int64_t r0 = 0; r0 < rows; r0 += 4 * dh) {
    prepare((r0 + 4 * dh < rows ? r0 + 4 * dh : rows) + halo);
    for (int b = 0; b < count; ++b) {
      const Block& block = blocks[b];
      for (int64_t r = r0; r < r0 + dh && r < rows; ++r) {
        if (r + 3 * dh < rows) {
          if (kh == 3) {
            block.template rows<4, kConvVecs, 3>(row_floats, r, columns);
          } else {
            block.template rows<4, kConvVecs, 0>(row_floats, r, columns);
          }
          continue;
        }
        int64_t left = r;
        if (left + dh < rows) {
          block.template rows<2, kConvVecs, 0>(row_floats, left, columns);
          left += 2 * dh;
        }
        if (left < rows) block.template rows<1, kConvVecs, 0>(row_floats, left, columns);
      }
    }
  }
}

SDAN_INLINE void fill_zero(float* p, int64_t n) {
  if (n > 0) std::memset(p, 0, static_cast<size_t>(n) * sizeof(float));
}

// Copies image row `x` (pixels of one plane, or of `channels` channels at distance `pixel_stride`)
// into a tile row of pixels of `step` floats: columns [first, first + columns) of the image, zero
// where outside [0, width). The row needs a vector of slack at its end.
template <bool kLanewise, typename T>
SDAN_INLINE void stage_row(float* out, const T* x, int64_t first, int64_t columns, int64_t width,
                           int64_t pixel_stride, int channels, int step) {
  const int64_t begin = first < 0 ? (-first < columns ? -first : columns) : 0;
  int64_t end = width - first;
  end = end > columns ? columns : (end < begin ? begin : end);
  // Whole vectors: the left ones reach into the pixels, which follow, the right ones into the row's
  // slack.
  for (int64_t i = 0; i < begin * step; i += kLanes) store(out + i, zero());
  for (int64_t i = end * step; i < columns * step; i += kLanes) store(out + i, zero());
  if constexpr (kLanewise) {
    const T* p = x + (first + begin) * pixel_stride;
    float* o = out + begin * step;
    const int tail = channels % kLanes;
    const int whole = channels - tail;
    for (int64_t c = begin; c < end; ++c, p += pixel_stride, o += step) {
      for (int k = 0; k < whole; k += kLanes) store(o + k, load(p + k));
      if (tail != 0) store(o + whole, load_n(p + whole, tail));
    }
  } else {
    const T* p = x + first;
    int64_t c = begin;
    for (; c + kLanes <= end; c += kLanes) store(out + c, load(p + c));
    if (c < end)
      store_n(out + c, load_n(p + c, static_cast<int>(end - c)), static_cast<int>(end - c));
  }
}

// Weights of `channels` channels, each kh x kw floats or 16-bit numbers, rows first, cut to the
// taps [i0, i0 + taps.kh) x [j0, j0 + taps.kw) that can touch the image, as taps.weights wants
// them.
template <bool kLanewise, typename T>
SDAN_INLINE void stage_weights(float* out, const T* w, int64_t channel_stride, int full_kw, int i0,
                               int j0, int kh, int kw, int channels) {
  for (int j = 0; j < kw; ++j) {
    for (int i = 0; i < kh; ++i) {
      const int64_t from = static_cast<int64_t>(i0 + i) * full_kw + (j0 + j);
      if constexpr (kLanewise) {
        for (int c = 0; c < kLanes; ++c) {
          *out++ = c < channels ? to_float(w[c * channel_stride + from]) : 0.0f;
        }
      } else {
        *out++ = to_float(w[from]);
      }
    }
  }
}

// f(lanewise, n, group, tile) for tasks [begin, end) of an op's parallel loop: a group is `lanes`
// channels. In channels_last the groups of a tile follow one another, since they share its lines.
template <typename Args, typename F>
SDAN_INLINE void for_each_tile(const Args& a, int64_t begin, int64_t end, const F& f) {
  const int64_t groups = (a.c + a.lanes - 1) / a.lanes;
  const int64_t tiles = a.grid.tiles_h * a.grid.tiles_w;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n = t / (groups * tiles);
    const int64_t rest = t % (groups * tiles);
    if (a.channels_last) {
      f(std::true_type{}, n, rest % groups, rest / groups);
    } else {
      f(std::false_type{}, n, rest / tiles, rest % tiles);
    }
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
