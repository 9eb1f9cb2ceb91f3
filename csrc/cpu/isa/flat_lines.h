// Few taps of channels_last rows, in the order in which memory moves fastest: vectors follow one
// another as in a copy, one stream in and one out for each row, and what is stored is aligned where
// the image is.
//
// A vector's channels are those of its place in the row, and so are its weights: each tap has as
// many vectors of them as it takes until the places repeat. Every multiply-add then loads its
// weight, which few taps can afford.
#pragma once

#include "flat_shape.h"

namespace sdan_fast {
namespace SDAN_ISA {

// R rows, dh apart, of V neighbouring vectors: `x` and `y` point at the first row's inputs (tap (0,
// 0)) and outputs, `w` at the first tap's weights there. KW: all of so many columns of taps are in
// the image, or 0. The order of the sums is that of accumulate().
template <int R, int V, int KH, int KW, typename T>
SDAN_INLINE void line_block(const FlatConv<T>& conv, const FlatWindow& window, const T* x, T* y,
                            const float* w) {
  const int kh = KH > 0 ? KH : conv.kh;
  const int j0 = KW > 0 ? 0 : window.j0;
  const int j1 = KW > 0 ? KW : window.j1;
  const ptrdiff_t row = conv.row * conv.dh, y_row = conv.y_row * conv.dh;
  const ptrdiff_t column = conv.column * conv.dw;
  const ptrdiff_t pitch = conv.pitch;
  const float* bias = w + pitch * kh * (KW > 0 ? KW : conv.kw);
  Vec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = zero();
  }
  x += j0 * column, w += j0 * kh * pitch;
  const auto add = [&](int s) __attribute__((always_inline)) {
    Vec in[V];
    load_used<R>(in, x + s * row, kLanes, 0, LoadAll{});
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (R > 1 && (s < r || s - r >= kh)) continue;
      const float* tap = w + (s - r) * pitch;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = fma(in[v], load(tap + v * kLanes), acc[r][v]);
    }
  };
#pragma GCC unroll 5
  for (int j = j0; j < j1; ++j, x += column, w += kh * pitch) {
    if constexpr (KH > 0) {
#pragma GCC unroll 8
      for (int s = 0; s < R + KH - 1; ++s) add(s);
    } else {
      for (int s = window.s0; s < window.s1; ++s) add(s);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      store(y + r * y_row + v * kLanes, acc[r][v] + load(bias + v * kLanes));
    }
  }
}

// Arguments by value, which no store can change (conv_rows in tile_conv.h).
template <int R, int KH, int KW, typename T>
__attribute__((noinline)) void line_part_of(FlatConv<T> conv, FlatWindow window, const T* x, T* y,
                                            int64_t columns) {
  constexpr int kVecs = flat_vecs<R>();
  const int64_t floats = columns * conv.c;
  const int64_t first = y - conv.y;
  const auto single = [&](int64_t at) __attribute__((always_inline)) {
    line_block<R, 1, KH, 0>(conv, window, x + at, y + at,
                            conv.weights + (first + at) % conv.period);
  };
  int64_t at = 0;
  if (first % kLanes != 0) {
    single(0);
    at = kLanes - first % kLanes;
  }
  const int64_t next = kVecs * kLanes % conv.period;
  int64_t place = (first + at) % conv.period;
  for (; at + kVecs * kLanes <= floats; at += kVecs * kLanes) {
    line_block<R, kVecs, KH, KW>(conv, window, x + at, y + at, conv.weights + place);
    place += next;
    if (place >= conv.period) place -= conv.period;
  }
  for (; at + kLanes <= floats; at += kLanes) single(at);
  if (at < floats) single(floats - kLanes);
}

// `columns` of R rows with one window.
template <int R, int KH, typename T>
SDAN_INLINE void line_part(const FlatConv<T>& conv, const FlatWindow& window, const T* x, T* y,
                           int64_t columns) {
  if constexpr (KH > 0) {
    if (window.j0 == 0 && window.j1 == conv.kw) {
      if (conv.kw == 3) return line_part_of<R, KH, 3>(conv, window, x, y, columns);
      if constexpr (KH == 1) {
        if (conv.kw == 5) return line_part_of<R, KH, 5>(conv, window, x, y, columns);
      } else {
        if (conv.kw == 1) return line_part_of<R, KH, 1>(conv, window, x, y, columns);
      }
    }
  }
  line_part_of<R, KH, 0>(conv, window, x, y, columns);
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
