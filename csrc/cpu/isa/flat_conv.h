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
// Few taps are computed in lines instead (flat_lines.h). A longer horizontal strip is a vertical
// one with the axes exchanged: its rows are the columns of pixels, and the pixels of one of them, a
// row of the image apart, are units of their own.
#pragma once

#include "flat_lines.h"
#include "flat_shape.h"

namespace sdan_fast {
namespace SDAN_ISA {

// acc[r][v] += the taps in the window, of R rows and V vectors `unit` floats apart. `x` points at
// input s0 and column j0, `w` at column j0's first weight. The order is that of accumulate().
template <int R, int V, typename T>
SDAN_INLINE void cut_sums(Vec (&acc)[R][V], const FlatConv<T>& conv, const FlatWindow& window,
                          const T* x, const float* w, ptrdiff_t unit) {
  const ptrdiff_t row = conv.row * conv.dh;
  const ptrdiff_t column = conv.column * conv.dw;
  for (int j = window.j0; j < window.j1; ++j, x += column, w += conv.kh * kLanes) {
    const T* xs = x;
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
template <int R, int V, int KH, typename T>
SDAN_INLINE void flat_block(const FlatConv<T>& conv, const FlatWindow& window, const T* x, T* y,
                            int q) {
  const ptrdiff_t row = conv.row * conv.dh, y_row = conv.y_row * conv.dh;
  const ptrdiff_t column = conv.column * conv.dw;
  const ptrdiff_t unit = conv.unit * conv.column, y_unit = conv.unit * conv.y_column;
  const float* w =
      conv.weights + (static_cast<ptrdiff_t>(q) * conv.kw + window.j0) * conv.kh * kLanes;
  x += window.j0 * column;
  if (R > 1 && conv.ahead) {
    const T* in = x + (conv.kh - 1 + R) * row;
    const T* out = y + R * y_row;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        __builtin_prefetch(in + r * row + v * unit);
        prefetch_write(out + r * y_row + v * y_unit);
      }
    }
  }
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
    for (int v = 0; v < V; ++v) store(y + r * y_row + v * y_unit, acc[r][v] + bias);
  }
}

template <int R, int V, int KH, typename T>
SDAN_INLINE void flat_units(const FlatConv<T>& conv, const FlatWindow& window, const T* x, T* y) {
  for (int q = 0; q < conv.vecs; ++q) {
    const int64_t at = flat_at(q, conv.unit * conv.c);
    flat_block<R, V, KH>(conv, window, x + at, y + at, q);
  }
}

// `columns` of R rows with one window. Arguments by value, which no store can change (conv_rows in
// tile_conv.h).
template <int R, int KH, typename T>
__attribute__((noinline)) void flat_part(FlatConv<T> conv, FlatWindow window, const T* x, T* y,
                                         int64_t columns) {
  // What five rows of taps see of more units at a time would not stay in a first-level cache.
  constexpr int kUnits = KH == 5 && flat_vecs<R>() > 2 ? 2 : flat_vecs<R>();
  int64_t units = columns / conv.unit;
  const ptrdiff_t unit = conv.unit * conv.column, y_unit = conv.unit * conv.y_column;
  for (; units >= kUnits; units -= kUnits, x += kUnits * unit, y += kUnits * y_unit) {
    flat_units<R, kUnits, KH>(conv, window, x, y);
  }
  if constexpr (kUnits >= 8) {
    if (units >= 4) {
      flat_units<R, 4, KH>(conv, window, x, y);
      units -= 4, x += 4 * unit, y += 4 * y_unit;
    }
  }
  if constexpr (kUnits >= 4) {
    if (units >= 2) {
      flat_units<R, 2, KH>(conv, window, x, y);
      units -= 2, x += 2 * unit, y += 2 * y_unit;
    }
  }
  for (; units > 0; --units, x += unit, y += y_unit) flat_units<R, 1, KH>(conv, window, x, y);
  const int64_t floats = columns % conv.unit * conv.c;
  for (int q = 0; q * kLanes < floats; ++q) {
    const int64_t at = flat_at(q, floats);
    // A unit's last vector ends where a pixel does, as this one.
    flat_block<R, 1, KH>(conv, window, x + at, y + at,
                         (q + 1) * kLanes <= floats ? q : conv.vecs - 1);
  }
}

// Rows h, h + dh, ... of columns [w0, w1).
template <int R, int KH, typename T>
static void flat_rows(const FlatConv<T>& conv, int64_t h, int64_t w0, int64_t w1) {
  const int64_t above = conv.pad_h - h;
  const int64_t s1 = ceil_div(conv.h + above, conv.dh);
  FlatWindow window = {static_cast<int>(ceil_div(above, conv.dh)), conv.kh + R - 1, 0, conv.kw};
  if (s1 < window.s1) window.s1 = static_cast<int>(s1);
  for_each_part(conv.w, conv.kw, conv.dw, w0, w1, [&](int64_t p, int64_t columns, int j0, int j1) {
    window.j0 = j0, window.j1 = j1;
    const T* x = conv.x + (h - conv.pad_h) * conv.row + (p - conv.pad_w) * conv.column;
    T* y = conv.y + h * conv.y_row + p * conv.y_column;
    const bool inside = window.s0 == 0 && window.s1 == conv.kh + R - 1;
    if constexpr (KH == 1 || KH == 3) {
      if (conv.period > 0 && inside) {
        line_part<R, KH>(conv, window, x, y, columns);
        return;
      }
    }
    if (conv.period > 0) {
      line_part<R, kCut>(conv, window, x, y, columns);
    } else if (KH != kCut && inside) {
      flat_part<R, KH>(conv, window, x, y, columns);
    } else {
      flat_part<R, kCut>(conv, window, x, y, columns);
    }
  });
}

// Rows [h0, h1) of columns [w0, w1), R rows at a time.
template <int R, int KH, typename T>
static void flat_conv(const FlatConv<T>& conv, int64_t h0, int64_t h1, int64_t w0, int64_t w1) {
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

template <int R, int KH, typename T>
static void flat_rectangle_of(const FlatConv<T>& conv, int64_t h0, int64_t h1, int64_t w0,
                              int64_t w1) {
  if (!conv.exchanged) {
    // Columns whose rows, as long as taps see them, stay in a second-level cache.
    constexpr int64_t kWindow = 1024 * 1024, kColumns = 64;
    const int64_t rows = (conv.kh + 2 * R - 1) * conv.dh;
    int64_t columns = kWindow / (rows * conv.c * static_cast<int64_t>(sizeof(T)));
    columns = columns < kColumns ? kColumns : columns / kColumns * kColumns;
    for (int64_t w = w0; w < w1; w += columns) {
      flat_conv<R, KH>(conv, h0, h1, w, w1 - w < columns ? w1 : w + columns);
    }
    return;
  }
  // Few rows at a time: where they are a multiple of 4 KB apart they share cache sets.
  constexpr int64_t kRows = flat_vecs<R>();
  for (int64_t h = h0; h < h1; h += kRows) {
    flat_conv<R, KH>(conv, w0, w1, h, h1 - h < kRows ? h1 : h + kRows);
  }
}

// Rows [h0, h1) of columns [w0, w1) of the image.
template <typename T>
void flat_rectangle(const FlatConv<T>& conv, int64_t h0, int64_t h1, int64_t w0, int64_t w1) {
  if (conv.kh == 1) {
    flat_rectangle_of<1, 1>(conv, h0, h1, w0, w1);
  } else if (conv.kh == 3) {
    flat_rectangle_of<4, 3>(conv, h0, h1, w0, w1);
  } else if (conv.kh == 5) {
    flat_rectangle_of<4, 5>(conv, h0, h1, w0, w1);
  } else {
    flat_rectangle_of<4, kInside>(conv, h0, h1, w0, w1);
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
