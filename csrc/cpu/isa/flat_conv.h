// Depth-wise convolution of channels_last rows where they lie: nothing is copied or padded.
//
//   y[h][p][c] = bias[c] + sum over i, j of w[c][i][j] x[h + i dh - pad_h][p + j dw - pad_w][c],
//
// taps outside the image left out. A row is one sequence of floats in which a tap is a fixed
// distance, so that vectors run across the pixels: a unit is the fewest pixels that whole vectors
// cover (two of 28 channels are seven vectors of eight), and a vector's weights depend on its place
// in the unit alone. Several units at a time share each weight, several rows dh apart each input.
// A row is cut where the taps in the image change: near its ends every dw pixels.
//
// A horizontal strip is a vertical one with the axes exchanged: its rows are the columns of pixels,
// and the pixels of one of them, a row of the image apart, are units of their own.
#pragma once

#include <utility>

#include "tile_conv.h"

namespace sdan_fast {
namespace SDAN_ISA {

// With AVX-512 the padded copies are what was measured.
constexpr bool kHasFlat = !SDAN_IS_AVX512;

// Sums at a time, which with an input and its weights have to fit the registers.
#if SDAN_IS_PORTABLE
constexpr int kFlatSums = 4;
#else
constexpr int kFlatSums = 8;
#endif

// The taps that can touch the image.
struct FlatKernel {
  int64_t kh, kw, dh, dw;
};

// One image, of at least kLanes channels. Height and width, rows and columns: of the convolution,
// not of the image where the axes are exchanged.
struct FlatConv {
  const float* x;
  float* y;
  bool exchanged;
  int64_t h, w, c;
  ptrdiff_t row, column;  // floats from one to the next
  int kh, kw;
  int64_t dh, dw;
  int64_t pad_h, pad_w;
  int unit;              // pixels
  int vecs;              // of a unit
  const float* weights;  // of a unit's vectors, one after the other, [kw][kh] each
  const float* bias;     // of a unit's vectors
};

// Pixels of a unit: whole vectors cover few channels of it twice, the last of them overlapping the
// one before. Pixels that do not follow each other are units of their own.
SDAN_INLINE int flat_unit(int64_t c, bool neighbours) {
  int unit = 1;
  while (neighbours && 16 * (-unit * c & (kLanes - 1)) > unit * c) unit *= 2;
  return unit;
}

// Where vector q of n floats begins.
SDAN_INLINE int64_t flat_at(int64_t q, int64_t floats) {
  return (q + 1) * kLanes <= floats ? q * kLanes : floats - kLanes;
}

// The convolution but for its images and what stage_flat fills in.
static inline FlatConv flat_geometry(int64_t h, int64_t w, int64_t c, const FlatKernel& k) {
  FlatConv conv = {};
  conv.h = h, conv.w = w, conv.c = c;
  conv.row = w * c, conv.column = c;
  conv.kh = static_cast<int>(k.kh), conv.kw = static_cast<int>(k.kw);
  conv.dh = k.dh, conv.dw = k.dw;
  conv.exchanged = k.kh == 1 && k.kw > 1;
  if (conv.exchanged) {
    std::swap(conv.h, conv.w);
    std::swap(conv.row, conv.column);
    std::swap(conv.kh, conv.kw);
    std::swap(conv.dh, conv.dw);
  }
  conv.pad_h = (conv.kh - 1) / 2 * conv.dh;
  conv.pad_w = (conv.kw - 1) / 2 * conv.dw;
  conv.unit = flat_unit(c, !conv.exchanged);
  conv.vecs = static_cast<int>((conv.unit * c + kLanes - 1) / kLanes);
  return conv;
}

// Floats that stage_flat writes: the weights and the bias.
SDAN_INLINE int64_t flat_floats(const FlatConv& conv) {
  return int64_t{conv.vecs} * kLanes * (int64_t{conv.kh} * conv.kw + 1);
}

// Fills weights and bias. `weight` is the first channel's first tap that is used; channels are
// `taps` apart, rows full_kw.
static inline void stage_flat(FlatConv& conv, float* out, const float* weight, int64_t taps,
                              int64_t full_kw, const float* bias) {
  const int64_t down = conv.exchanged ? 1 : full_kw;
  const int64_t right = conv.exchanged ? full_kw : 1;
  float* addends = out + int64_t{conv.vecs} * kLanes * conv.kh * conv.kw;
  conv.weights = out;
  conv.bias = addends;
  for (int q = 0; q < conv.vecs; ++q) {
    const int64_t at = flat_at(q, conv.unit * conv.c);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t channel = (at + lane) % conv.c;
      const float* w = weight + channel * taps;
      float* to = out + lane;
      for (int j = 0; j < conv.kw; ++j) {
        for (int i = 0; i < conv.kh; ++i, to += kLanes) *to = w[i * down + j * right];
      }
      *addends++ = bias == nullptr ? 0.0f : bias[channel];
    }
    out += kLanes * conv.kh * conv.kw;
  }
}

// What R rows, dh apart, see of the image in some columns: inputs [s0, s1) of the kh + R - 1 that
// lie dh apart, and tap columns [j0, j1). Row r meets tap i of its own in input r + i.
struct FlatWindow {
  int s0, s1;
  int j0, j1;
};

// How the kernel's height is known: a number above 0; kInside: at least R, and no input of a window
// lies outside the image; kCut: not at all.
constexpr int kInside = 0;
constexpr int kCut = -1;

// acc[r][v] += the taps in the window, of R rows and V vectors `unit` floats apart. `x` points at
// input s0 and column j0, `w` at column j0's first weight. The order is that of accumulate().
template <int R, int V>
SDAN_INLINE void cut_sums(Vec (&acc)[R][V], const FlatConv& conv, const FlatWindow& window,
                          const float* x, const float* w, ptrdiff_t unit) {
  const ptrdiff_t row = conv.row * conv.dh;
  const ptrdiff_t column = conv.column * conv.dw;
  for (int j = window.j0; j < window.j1; ++j, x += column, w += conv.kh * kLanes) {
    const float* xs = x;
    const float* ws = w + window.s0 * kLanes;
    for (int s = window.s0; s < window.s1; ++s, xs += row, ws += kLanes) {
      Vec in[V];
      load_used<R>(in, xs, unit, j, LoadAll{});
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        if (R > 1 && (s < r || s - r >= conv.kh)) continue;
        const Vec tap = load(ws - r * kLanes);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] = fma(in[v], tap, acc[r][v]);
      }
    }
  }
}

// Vector q of V units: `x` and `y` point at its first float in the first row's inputs (tap (0, 0))
// and outputs.
template <int R, int V, int KH>
SDAN_INLINE void flat_block(const FlatConv& conv, const FlatWindow& window, const float* x,
                            float* y, int q) {
  const ptrdiff_t row = conv.row * conv.dh;
  const ptrdiff_t column = conv.column * conv.dw;
  const ptrdiff_t unit = conv.unit * conv.column;
  const float* w =
      conv.weights + (static_cast<ptrdiff_t>(q) * conv.kw + window.j0) * conv.kh * kLanes;
  x += window.j0 * column;
  Vec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = zero();
  }
  if constexpr (KH == kCut) {
    cut_sums<R, V>(acc, conv, window, x + window.s0 * row, w, unit);
  } else {
    const Taps taps = {w, conv.kh, window.j1 - window.j0, 1, 1, static_cast<int>(unit)};
    accumulate<true, R, V, KH>(acc, x, taps, row, column, LoadAll{});
  }
  const Vec bias = load(conv.bias + q * kLanes);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(y + r * row + v * unit, acc[r][v] + bias);
  }
}

template <int R, int V, int KH>
SDAN_INLINE void flat_units(const FlatConv& conv, const FlatWindow& window, const float* x,
                            float* y) {
  for (int q = 0; q < conv.vecs; ++q) {
    const int64_t at = flat_at(q, conv.unit * conv.c);
    flat_block<R, V, KH>(conv, window, x + at, y + at, q);
  }
}

// `columns` of R rows with one window.
template <int R, int KH>
__attribute__((noinline)) void flat_part(const FlatConv& conv, const FlatWindow& window,
                                         const float* x, float* y, int64_t columns) {
  constexpr int kUnits = kFlatSums / R;
  int64_t units = columns / conv.unit;
  const ptrdiff_t unit = conv.unit * conv.column;
  for (; units >= kUnits; units -= kUnits, x += kUnits * unit, y += kUnits * unit) {
    flat_units<R, kUnits, KH>(conv, window, x, y);
  }
  if constexpr (kUnits >= 8) {
    if (units >= 4) {
      flat_units<R, 4, KH>(conv, window, x, y);
      units -= 4, x += 4 * unit, y += 4 * unit;
    }
  }
  if constexpr (kUnits >= 4) {
    if (units >= 2) {
      flat_units<R, 2, KH>(conv, window, x, y);
      units -= 2, x += 2 * unit, y += 2 * unit;
    }
  }
  for (; units > 0; --units, x += unit, y += unit) flat_units<R, 1, KH>(conv, window, x, y);
  const int64_t floats = columns % conv.unit * conv.c;
  for (int q = 0; q * kLanes < floats; ++q) {
    const int64_t at = flat_at(q, floats);
    // A unit's last vector ends where a pixel does, as this one.
    flat_block<R, 1, KH>(conv, window, x + at, y + at,
                         (q + 1) * kLanes <= floats ? q : conv.vecs - 1);
  }
}

SDAN_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return a > 0 ? (a + b - 1) / b : 0;
}

// f(p, columns, j0, j1) for the parts of columns [w0, w1), `columns` from p on, whose tap columns
// in the image, of kw that lie dw apart, are [j0, j1).
template <typename F>
SDAN_INLINE void for_each_part(int64_t w, int kw, int64_t dw, int64_t w0, int64_t w1, const F& f) {
  const int64_t pad = (kw - 1) / 2 * dw;
  for (int64_t p = w0; p < w1;) {
    const int64_t before = pad - p;
    const int64_t after = w + before;  // tap columns j with j dw < after are in the image
    const int64_t j0 = ceil_div(before, dw);
    int64_t j1 = ceil_div(after, dw);
    if (j1 > kw) j1 = kw;
    int64_t columns = w1 - p;
    // One tap column more, one less.
    if (j0 > 0 && before - (j0 - 1) * dw < columns) columns = before - (j0 - 1) * dw;
    if (after - (j1 - 1) * dw < columns) columns = after - (j1 - 1) * dw;
    f(p, columns, static_cast<int>(j0), static_cast<int>(j1));
    p += columns;
  }
}

// Rows h, h + dh, ... of columns [w0, w1).
template <int R, int KH>
static void flat_rows(const FlatConv& conv, int64_t h, int64_t w0, int64_t w1) {
  const int64_t above = conv.pad_h - h;
  const int64_t s1 = ceil_div(conv.h + above, conv.dh);
  FlatWindow window = {static_cast<int>(ceil_div(above, conv.dh)), conv.kh + R - 1, 0, conv.kw};
  if (s1 < window.s1) window.s1 = static_cast<int>(s1);
  for_each_part(conv.w, conv.kw, conv.dw, w0, w1, [&](int64_t p, int64_t columns, int j0, int j1) {
    window.j0 = j0, window.j1 = j1;
    const ptrdiff_t at = h * conv.row + p * conv.column;
    const float* x = conv.x + at - conv.pad_h * conv.row - conv.pad_w * conv.column;
    if (KH != kCut && window.s0 == 0 && window.s1 == conv.kh + R - 1) {
      flat_part<R, KH>(conv, window, x, conv.y + at, columns);
    } else {
      flat_part<R, kCut>(conv, window, x, conv.y + at, columns);
    }
  });
}

// Rows [h0, h1) of columns [w0, w1), R rows at a time.
template <int R, int KH>
static void flat_conv(const FlatConv& conv, int64_t h0, int64_t h1, int64_t w0, int64_t w1) {
  for (int64_t r0 = h0; r0 < h1; r0 += R * conv.dh) {
    for (int64_t r = r0; r < r0 + conv.dh && r < h1; ++r) {
      const int64_t end = r + R * conv.dh < h1 ? r + R * conv.dh : h1;
      int64_t h = r;
      if (h + (R - 1) * conv.dh < end) {
        flat_rows<R, KH>(conv, h, w0, w1);
        continue;
      }
      if (R > 2 && h + conv.dh < end) {
        flat_rows<2, kInside>(conv, h, w0, w1);
        h += 2 * conv.dh;
      }
      for (; h < end; h += conv.dh) flat_rows<1, kCut>(conv, h, w0, w1);
    }
  }
}

template <int R, int KH>
static void flat_image_rows_of(const FlatConv& conv, int64_t h0, int64_t h1) {
  if (!conv.exchanged) {
    flat_conv<R, KH>(conv, h0, h1, 0, conv.w);
    return;
  }
  // Few rows at a time: where they are a multiple of 4 KB apart they share cache sets.
  constexpr int64_t kRows = kFlatSums / R;
  for (int64_t h = h0; h < h1; h += kRows) {
    flat_conv<R, KH>(conv, 0, conv.h, h, h1 - h < kRows ? h1 : h + kRows);
  }
}

// Rows [h0, h1) of the image.
static inline void flat_image_rows(const FlatConv& conv, int64_t h0, int64_t h1) {
  if (conv.kh == 1) {
    flat_image_rows_of<1, kCut>(conv, h0, h1);
  } else if (conv.kh == 3) {
    flat_image_rows_of<4, 3>(conv, h0, h1);
  } else {
    flat_image_rows_of<4, kInside>(conv, h0, h1);
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
