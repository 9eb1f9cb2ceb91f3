// Depth-wise convolution of one zero-padded tile held in scratch: the core of depthwise_conv2d and of
// strip_conv_chain.
//
// A tile is a grid of pixels. With kLanewise = false a pixel is one float and a vector is kLanes
// neighbours of one row (NCHW); a tap's weight is one float. With kLanewise = true a pixel is a vector of
// kLanes channels (channels_last), and so is a tap's weight. The address arithmetic is the same but for
// the pixel's size, so both formats share one kernel. Padding is part of the tile, so the kernel knows
// no borders.
//
// R output rows, dh apart, are computed together: a vector of the input, once loaded, serves up to R
// taps, because unaligned loads rather than multiply-adds would bind otherwise.
#pragma once

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

// The taps of a convolution. `weights` is ordered [kw][kh], each a float or a vector.
struct Taps {
  const float* weights;
  int kh, kw;
  int dh, dw;
};

template <bool kLanewise>
constexpr int pixel_floats() {
  return kLanewise ? kLanes : 1;
}

template <bool kLanewise>
SDAN_INLINE Vec load_weight(const float* w) {
  if constexpr (kLanewise) {
    return load(w);
  } else {
    return set1(*w);
  }
}

template <int Uses>
SDAN_INLINE Vec load_used(const float* p) {
  Vec a = load(p);
  if constexpr (Uses > 1) pin(a);
  return a;
}

// acc[r][v] += the convolution at output row r (rows are dh apart) and vector v. `x` points at the first
// tap of row 0; `row` is the distance in floats between rows dh apart, `column` between taps of a row.
// Needs kh >= R unless KH, the kernel's height where known, is given.
template <bool kLanewise, int R, int V, int KH>
SDAN_INLINE void accumulate(Vec (&acc)[R][V], const float* x, const Taps& taps, ptrdiff_t row,
                            ptrdiff_t column) {
  constexpr int kStep = pixel_floats<kLanewise>();
  const int kh = KH > 0 ? KH : taps.kh;
  const float* w = taps.weights;
  for (int j = 0; j < taps.kw; ++j, x += column, w += static_cast<ptrdiff_t>(kh) * kStep) {
    if constexpr (KH > 0) {
#pragma GCC unroll 16
      for (int s = 0; s < R + KH - 1; ++s) {
        Vec in[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) in[v] = load_used<R>(x + s * row + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          if (s - r < 0 || s - r >= KH) continue;
          const Vec tap = load_weight<kLanewise>(w + (s - r) * kStep);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) acc[r][v] = fma(in[v], tap, acc[r][v]);
        }
      }
    } else {
      const float* xs = x;
#pragma GCC unroll 8
      for (int s = 0; s < R - 1; ++s, xs += row) {
        Vec in[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) in[v] = load_used<R>(xs + v * kLanes);
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
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) in[v] = load_used<R>(xs + v * kLanes);
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
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) in[v] = load_used<R>(xs + v * kLanes);
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

// Writes sums to rows of pixels: `row` elements from one row to the next, `pixel` from one pixel to the next
// (one in NCHW), `columns` pixels per row. For channels_last only `channels` lanes of a pixel exist.
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

// One block: R rows dh apart by V vectors. `bias(row, column)` is added to the sums, last, since starting
// from a large bias would round every product to its unit; `sink(row, column, sums)` takes V vectors of one
// row. Rows and columns count output pixels of the tile.
template <bool kLanewise, int R, int V, int KH, typename Bias, typename Sink>
SDAN_INLINE void conv_block(const float* x, const Taps& taps, ptrdiff_t row_floats, int64_t row0,
                            int64_t column0, const Bias& bias, const Sink& sink) {
  constexpr int kVecPixels = kLanewise ? 1 : kLanes;
  Vec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = zero();
  }
  accumulate<kLanewise, R, V, KH>(acc, x, taps, row_floats * taps.dh,
                                  static_cast<ptrdiff_t>(taps.dw) * pixel_floats<kLanewise>());
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const int64_t row = row0 + r * taps.dh;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = acc[r][v] + bias(row, column0 + v * kVecPixels);
    sink(row, column0, acc[r]);
  }
}

// A group of R rows over all columns. Not inlined: each instance is one hot loop.
template <bool kLanewise, int R, int V, int KH, typename Bias, typename Sink>
__attribute__((noinline)) void conv_rows(const float* x, const Taps& taps, ptrdiff_t row_floats,
                                         int64_t row0, int64_t columns, const Bias& bias,
                                         const Sink& sink) {
  constexpr int kStep = pixel_floats<kLanewise>();
  constexpr int kVecPixels = kLanewise ? 1 : kLanes;
  x += row0 * row_floats;
  int64_t c = 0;
  while (c < columns) {
    // Three vectors left of four are cheaper as four: the sums are more independent chains.
    const int64_t left = (columns - c + kVecPixels - 1) / kVecPixels;
    if (left >= V || (V >= 4 && left == V - 1)) {
      conv_block<kLanewise, R, V, KH>(x + c * kStep, taps, row_floats, row0, c, bias, sink);
      c += V * kVecPixels;
    } else if (V >= 8 && left >= 3) {
      conv_block<kLanewise, R, (V >= 8 ? V / 2 : 1), KH>(x + c * kStep, taps, row_floats, row0, c, bias,
                                                        sink);
      c += (V / 2) * kVecPixels;
    } else if (V >= 4 && left >= 2) {
      conv_block<kLanewise, R, (V >= 4 ? 2 : 1), KH>(x + c * kStep, taps, row_floats, row0, c, bias,
                                                    sink);
      c += 2 * kVecPixels;
    } else {
      conv_block<kLanewise, R, 1, KH>(x + c * kStep, taps, row_floats, row0, c, bias, sink);
      c += kVecPixels;
    }
  }
}

// rows x columns outputs of the tile whose padded input starts at x, rows `row_floats` floats apart.
// bias and sink see whole vectors; sink has to cut the last one of a row, and to ignore columns past it.
// GridSink does so.
template <bool kLanewise, typename Bias, typename Sink>
SDAN_INLINE void conv_tile(const float* x, const Taps& taps, ptrdiff_t row_floats, int64_t rows,
                           int64_t columns, const Bias& bias, const Sink& sink) {
  if (taps.kh == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      conv_rows<kLanewise, 1, kRowConvVecs, 1>(x, taps, row_floats, r, columns, bias, sink);
    }
    return;
  }
  const int64_t dh = taps.dh;
  for (int64_t phase = 0; phase < dh && phase < rows; ++phase) {
    int64_t r = phase;
    if (taps.kh == 3) {
      for (; r + 3 * dh < rows; r += 4 * dh) {
        conv_rows<kLanewise, 4, kConvVecs, 3>(x, taps, row_floats, r, columns, bias, sink);
      }
    } else {
      for (; r + 3 * dh < rows; r += 4 * dh) {
        conv_rows<kLanewise, 4, kConvVecs, 0>(x, taps, row_floats, r, columns, bias, sink);
      }
    }
    for (; r + dh < rows; r += 2 * dh) {
      conv_rows<kLanewise, 2, kConvVecs, 0>(x, taps, row_floats, r, columns, bias, sink);
    }
    for (; r < rows; r += dh) {
      conv_rows<kLanewise, 1, kConvVecs, 0>(x, taps, row_floats, r, columns, bias, sink);
    }
  }
}

SDAN_INLINE void fill_zero(float* p, int64_t n) {
  if (n > 0) std::memset(p, 0, static_cast<size_t>(n) * sizeof(float));
}

// Copies image row `x` (pixels of one plane, or of `channels` lanes at distance `pixel_stride`) into a tile
// row: columns [first, first + columns) of the image, zero where outside [0, width).
template <bool kLanewise, typename T>
SDAN_INLINE void stage_row(float* out, const T* x, int64_t first, int64_t columns, int64_t width,
                           int64_t pixel_stride, int channels) {
  constexpr int kStep = pixel_floats<kLanewise>();
  const int64_t begin = first < 0 ? (-first < columns ? -first : columns) : 0;
  int64_t end = width - first;
  end = end > columns ? columns : (end < begin ? begin : end);
  fill_zero(out, begin * kStep);
  if constexpr (kLanewise) {
    const T* p = x + (first + begin) * pixel_stride;
    float* o = out + begin * kLanes;
    if (channels == kLanes) {
      for (int64_t c = begin; c < end; ++c, p += pixel_stride, o += kLanes) store(o, load(p));
    } else {
      for (int64_t c = begin; c < end; ++c, p += pixel_stride, o += kLanes) {
        store(o, load_n(p, channels));
      }
    }
  } else {
    const T* p = x + first;
    int64_t c = begin;
    for (; c + kLanes <= end; c += kLanes) store(out + c, load(p + c));
    if (c < end) store_n(out + c, load_n(p + c, static_cast<int>(end - c)), static_cast<int>(end - c));
  }
  fill_zero(out + end * kStep, (columns - end) * kStep);
}

// Weights of `channels` channels, each kh x kw floats or 16-bit numbers, rows first, cut to the taps
// [i0, i0 + taps.kh) x [j0, j0 + taps.kw) that can touch the image, as taps.weights wants them.
template <bool kLanewise, typename T>
SDAN_INLINE void stage_weights(float* out, const T* w, int64_t channel_stride, int full_kw, int i0, int j0,
                               int kh, int kw, int channels) {
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

}  // namespace SDAN_ISA
}  // namespace sdan_fast
