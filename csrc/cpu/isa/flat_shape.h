// Where the taps of a depth-wise convolution lie in a channels_last image that is read in place,
// and its weights as the kernels of flat_conv.h and flat_lines.h want them.
#pragma once

#include <utility>

#include "tile_conv.h"

namespace sdan_fast {
namespace SDAN_ISA {

// Sums at a time, which with an input and its weights have to fit the registers.
#if SDAN_IS_AVX512
constexpr int kFlatSums = 16;
#elif SDAN_IS_AVX2
constexpr int kFlatSums = 8;
#else
constexpr int kFlatSums = 4;
#endif

// Vectors at a time of R rows.
template <int R>
constexpr int flat_vecs() {
  return kFlatSums / R < 8 ? kFlatSums / R : 8;
}

// The taps that can touch the image.
struct FlatKernel {
  int64_t kh, kw, dh, dw;
};

// One image of T, of at least kLanes channels. Height and width, rows and columns: of the
// convolution, not of the image where the axes are exchanged.
template <typename T>
struct FlatConv {
  const T* x;
  T* y;
  bool exchanged;
  int64_t h, w, c;
  ptrdiff_t row, column;      // elements from one to the next, of x
  ptrdiff_t y_row, y_column;  // of y
  int kh, kw;
  int64_t dh, dw;
  int64_t pad_h, pad_w;
  int unit;              // pixels
  int vecs;              // of a unit
  int64_t period;        // floats after which lines repeat themselves, 0 where units are computed
  int64_t pitch;         // of a tap's weights there
  bool ahead;            // whether the next block's lines are asked for
  const float* weights;  // of a unit's vectors, one after the other, [kw][kh] each; of lines
                         // [kw][kh][pitch]
  const float* bias;     // of a unit's vectors, or [pitch]
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

// The convolution but for its images and what stage_flat fills in. Few taps leave memory to bind:
// they are computed in lines, unless a pixel is one vector, which makes lines of its units.
template <typename T>
FlatConv<T> flat_geometry(int64_t h, int64_t w, int64_t c, const FlatKernel& k) {
  constexpr int64_t kLineFloats = 8 * 1024;  // of weights, for a first-level cache
  constexpr int64_t kFarPixel = 384;         // bytes, beyond which no prefetcher follows the blocks
  FlatConv<T> conv = {};
  conv.h = h, conv.w = w, conv.c = c;
  conv.row = w * c, conv.column = c;
  conv.kh = static_cast<int>(k.kh), conv.kw = static_cast<int>(k.kw);
  conv.dh = k.dh, conv.dw = k.dw;
  int64_t period = c;
  while (period % kLanes != 0) period *= 2;
  conv.pitch = period + kFlatSums * kLanes;
  const bool lines = (k.kh == 1 ? k.kw <= 5 : k.kh == 3 && k.kw <= 3) &&
                     (k.kh * k.kw + 1) * conv.pitch <= kLineFloats;
  conv.period = lines && c > kLanes ? period : 0;
  conv.exchanged = k.kh == 1 && k.kw > 1 && !lines;
  if (conv.exchanged) {
    std::swap(conv.h, conv.w);
    std::swap(conv.row, conv.column);
    std::swap(conv.kh, conv.kw);
    std::swap(conv.dh, conv.dw);
  }
  conv.y_row = conv.row, conv.y_column = conv.column;
  conv.ahead = conv.exchanged && c * static_cast<int64_t>(sizeof(T)) > kFarPixel;
  conv.pad_h = (conv.kh - 1) / 2 * conv.dh;
  conv.pad_w = (conv.kw - 1) / 2 * conv.dw;
  conv.unit = flat_unit(c, !conv.exchanged);
  conv.vecs = static_cast<int>((conv.unit * c + kLanes - 1) / kLanes);
  return conv;
}

// Elements from one row of the image to the next, of x and of y.
template <typename T>
SDAN_INLINE void set_pitches(FlatConv<T>& conv, ptrdiff_t x, ptrdiff_t y) {
  (conv.exchanged ? conv.column : conv.row) = x;
  (conv.exchanged ? conv.y_column : conv.y_row) = y;
}

// Floats that stage_flat writes: the weights and the bias.
template <typename T>
SDAN_INLINE int64_t flat_floats(const FlatConv<T>& conv) {
  const int64_t tap = conv.period > 0 ? conv.pitch : int64_t{conv.vecs} * kLanes;
  return tap * (int64_t{conv.kh} * conv.kw + 1);
}

// A filter as it is handed over: its first channel's first tap that is used, the floats from a
// channel to the next and from a row to the next, and a bias or nullptr.
template <typename W>
struct FlatFilter {
  const W* weight;
  int64_t taps, row;
  const W* bias;
};

// `pitch` floats: one channel after the other, again and again.
template <typename W>
void stage_channels(float* out, int64_t pitch, const W* from, int64_t step, int64_t c) {
  for (int64_t k = 0; k < c; ++k) out[k] = from == nullptr ? 0.0f : to_float(from[k * step]);
  for (int64_t k = c; k < pitch; ++k) out[k] = out[k - c];
}

template <typename T, typename W>
void stage_lines(FlatConv<T>& conv, float* out, const FlatFilter<W>& filter) {
  for (int j = 0; j < conv.kw; ++j) {
    for (int i = 0; i < conv.kh; ++i, out += conv.pitch) {
      stage_channels(out, conv.pitch, filter.weight + i * filter.row + j, filter.taps, conv.c);
    }
  }
  conv.bias = out;
  stage_channels(out, conv.pitch, filter.bias, 1, conv.c);
}

template <typename T, typename W>
void stage_units(FlatConv<T>& conv, float* out, const FlatFilter<W>& filter) {
  const int64_t down = conv.exchanged ? 1 : filter.row;
  const int64_t right = conv.exchanged ? filter.row : 1;
  float* addends = out + int64_t{conv.vecs} * kLanes * conv.kh * conv.kw;
  conv.bias = addends;
  for (int q = 0; q < conv.vecs; ++q) {
    const int64_t at = flat_at(q, conv.unit * conv.c);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t channel = (at + lane) % conv.c;
      const W* w = filter.weight + channel * filter.taps;
      float* to = out + lane;
      for (int j = 0; j < conv.kw; ++j) {
        for (int i = 0; i < conv.kh; ++i, to += kLanes) *to = to_float(w[i * down + j * right]);
      }
      *addends++ = filter.bias == nullptr ? 0.0f : to_float(filter.bias[channel]);
    }
    out += kLanes * conv.kh * conv.kw;
  }
}

// Fills weights and bias.
template <typename T, typename W>
void stage_flat(FlatConv<T>& conv, float* out, const FlatFilter<W>& filter) {
  conv.weights = out;
  if (conv.period > 0) {
    stage_lines(conv, out, filter);
  } else {
    stage_units(conv, out, filter);
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

}  // namespace SDAN_ISA
}  // namespace sdan_fast
