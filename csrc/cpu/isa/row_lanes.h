// A strip along the rows of an NCHW plane, kLanes rows at a time as lanes.
//
// Along a row a tap's inputs lie across two cache lines and serve one multiply-add. With rows as
// lanes each load is a line, which neighbouring taps share, and padding is vectors of zeros. The
// rows are transposed on their way in and out, which pays from some ten taps on.
#pragma once

#include "prefetch.h"
#include "tile_conv.h"
#include "transpose.h"
#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

// Taps whose weights stay in registers beside the sums of kLanes outputs.
#if SDAN_IS_AVX512
constexpr int kLaneTaps = 8;
#else
constexpr int kLaneTaps = 4;
#endif

// `rows` of kLanes rows to be convolved, and a buffer for their columns: pad() vectors of zeros,
// the image's whole vectors, pad() of zeros again.
template <typename T>
struct LaneRows {
  const T* x;
  T* y;
  int64_t x_row, y_row;
  int rows;
  int64_t w;
  Taps taps;
  Vec bias;
  float* columns;
  SDAN_INLINE int64_t pad() const { return static_cast<int64_t>(taps.kw - 1) / 2 * taps.dw; }
  SDAN_INLINE int64_t vectors() const { return (w + kLanes - 1) / kLanes * kLanes + 2 * pad(); }
};

// What N neighbouring taps add to kLanes neighbouring outputs; `x` is what the first tap of the
// first one sees.
template <int N>
SDAN_INLINE void neighbour_taps(Vec (&acc)[kLanes], const float* x, const float* weights) {
  Vec weight[N];
#pragma GCC unroll 8
  for (int t = 0; t < N; ++t) {
    weight[t] = set1(weights[t]);
    pin(weight[t]);
  }
#pragma GCC unroll 32
  for (int i = 0; i < kLanes + N - 1; ++i) {
    Vec in = load(x + i * kLanes);
    if constexpr (N > 1) pin(in);
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t) {
      if (i - t >= 0 && i - t < kLanes) acc[i - t] = fma(in, weight[t], acc[i - t]);
    }
  }
}

SDAN_INLINE void lane_sums(Vec (&acc)[kLanes], const float* x, const Taps& taps) {
  const float* weights = taps.weights;
  const float* end = weights + taps.kw;
  if (taps.dw == 1) {
    for (; end - weights >= kLaneTaps; weights += kLaneTaps, x += kLaneTaps * kLanes) {
      neighbour_taps<kLaneTaps>(acc, x, weights);
    }
    for (; end - weights >= 2; weights += 2, x += 2 * kLanes) neighbour_taps<2>(acc, x, weights);
  }
  for (; weights < end; ++weights, x += taps.dw * kLanes) neighbour_taps<1>(acc, x, weights);
}

// Rows [0, rows) of column c on, lanes of columns of which the image has `count`.
template <typename T>
SDAN_INLINE void load_rows(Vec (&r)[kLanes], const T* x, int64_t row, int rows, int count) {
  if (rows == kLanes && count == kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) r[i] = load(x + i * row);
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) r[i] = i < rows ? load_n(x + i * row, count) : zero();
}

template <typename T>
SDAN_INLINE void store_rows(T* y, const Vec (&r)[kLanes], int64_t row, int rows, int count) {
  if (rows == kLanes && count == kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(y + i * row, r[i]);
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i < rows) store_n(y + i * row, r[i], count);
  }
}

SDAN_INLINE int lanes_of(int64_t n) {
  return n < kLanes ? static_cast<int>(n) : kLanes;
}

// The zeros stay as they are from one call to the next.
template <typename T>
SDAN_INLINE void fill_lane_pads(const LaneRows<T>& p) {
  fill_zero(p.columns, p.pad() * kLanes);
  fill_zero(p.columns + (p.vectors() - p.pad()) * kLanes, p.pad() * kLanes);
}

template <typename T>
__attribute__((noinline)) void lane_rows(LaneRows<T> p) {
  const int64_t pad = p.pad();
  int64_t staged = 0;
  for (int64_t c = 0; c < p.w; c += kLanes) {
    // What comes next, in the order in which it lies in memory: so many rows at a time are more
    // streams than a processor's own prefetchers follow.
    constexpr int kLine = 64 / sizeof(T);
    const int64_t next = kLanes * (p.x_row + c);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes * kLanes; i += kLine) {
      __builtin_prefetch(p.x + next + i, 0, 2);
      prefetch_write(p.y + next + i);
    }
    for (; staged < p.w && staged < c + kLanes + pad; staged += kLanes) {
      Vec r[kLanes];
      load_rows(r, p.x + staged, p.x_row, p.rows, lanes_of(p.w - staged));
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(p.columns + (pad + staged + i) * kLanes, r[i]);
    }
    Vec acc[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) acc[i] = zero();
    lane_sums(acc, p.columns + c * kLanes, p.taps);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) acc[i] = acc[i] + p.bias;
    transpose(acc);
    store_rows(p.y + c, acc, p.y_row, p.rows, lanes_of(p.w - c));
  }
}

// The same in steps, for a chain of strips: n columns of rows as lanes, whole vectors of them.
template <typename T>
__attribute__((noinline)) void rows_to_lanes(const T* x, int64_t row, int rows, int64_t n,
                                             float* out) {
  for (int64_t c = 0; c < n; c += kLanes) {
    Vec r[kLanes];
    load_rows(r, x + c, row, rows, lanes_of(n - c));
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(out + (c + i) * kLanes, r[i]);
  }
}

// The sums of n columns, whole vectors of columns too; kRows: as rows again.
template <bool kRows>
__attribute__((noinline)) void convolve_lanes(const float* in, Taps taps, int64_t n, float* out,
                                              int64_t row, int rows) {
  for (int64_t c = 0; c < n; c += kLanes) {
    Vec acc[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) acc[i] = zero();
    lane_sums(acc, in + c * kLanes, taps);
    if constexpr (kRows) {
      transpose(acc);
      store_rows(out + c, acc, row, rows, lanes_of(n - c));
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(out + (c + i) * kLanes, acc[i]);
    }
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
