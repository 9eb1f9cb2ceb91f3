// Depth-wise convolution of one NCHW plane with few taps, read in place.
//
// Staging a padded copy would cost more than such a kernel itself: its unaligned loads come right
// after the stores that they straddle, which no store buffer forwards. Here the vectors at a row's
// ends are masked loads, and the rows at the plane's top and bottom leave out the taps that meet
// padding.
#pragma once

#include "prefetch.h"
#include "tile_conv.h"
#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

// The vectors of a row: those of [left, right) have all their taps in the image, each of the others
// a mask for each tap, masks[vector][kw], the vectors between them left out.
struct RowEdges {
  int64_t left, right, all;
  LaneBits* masks;
  SDAN_INLINE int64_t count() const { return left + all - right; }
};

SDAN_INLINE RowEdges edges_of(int64_t w, int64_t pad) {
  const int64_t all = (w + kLanes - 1) / kLanes;
  const int64_t left = (pad + kLanes - 1) / kLanes;
  const int64_t right = w > pad ? (w - pad) / kLanes : 0;
  return left < right ? RowEdges{left, right, all, nullptr} : RowEdges{all, all, all, nullptr};
}

// Writes the count() * kw masks.
SDAN_INLINE void fill_masks(const RowEdges& edges, int64_t w, int kw, int64_t dw) {
  LaneBits* out = edges.masks;
  for (int64_t i = 0; i < edges.count(); ++i) {
    const int64_t v = i < edges.left ? i : i - edges.left + edges.right;
    int64_t first = v * kLanes - (kw - 1) / 2 * dw;
    for (int j = 0; j < kw; ++j, first += dw) {
      const int64_t begin = first < 0 ? (first > -kLanes ? -first : kLanes) : 0;
      const int64_t end = w - first < kLanes ? (w > first ? w - first : 0) : kLanes;
      *out++ = begin < end ? static_cast<LaneBits>((1u << end) - (1u << begin)) : LaneBits{0};
    }
  }
}

// Those of a vector at an edge.
struct LoadLanes {
  static constexpr bool kWholeLines = false;
  const LaneBits* masks;
  template <typename T>
  SDAN_INLINE void operator()(Vec (&in)[1], const T* p, ptrdiff_t, int j) const {
    in[0] = load_lanes(p, masks[j]);
  }
};

// Neighbouring vectors, in the order of load_two where there are pairs of them. WholeLines: what
// lies before and after them, a vector or two, may be read as well.
template <bool WholeLines>
struct LoadNeighbours {
  static constexpr bool kWholeLines = WholeLines;
  template <int V, typename T>
  SDAN_INLINE void operator()(Vec (&in)[V], const T* p, ptrdiff_t, int) const {
    if constexpr (V == 1) {
      in[0] = load(p);
    } else {
#pragma GCC unroll 4
      for (int v = 0; v < V; v += 2) load_two(p + v * kLanes, in[v], in[v + 1]);
    }
  }
};

// A plane of h x w pixels, of the images [begin, end), and what is made of it, rows y_row apart.
template <typename T>
struct PlaneConv {
  const T *begin, *end;
  const T* x;
  T* y;
  int64_t h, w, y_row;
  Taps taps;
  Vec bias;
  RowEdges edges;
};

// R rows, dh apart: their first taps' row, where they go, and the rows of input and output that
// come next. Those are asked for in the order in which they lie in memory, as many lines for each
// block as it reads anew.
template <typename T>
struct PlaneRows {
  const T* x;
  T* y;
  const T* next_x;
  const T* next_y;
};

// V vectors from column c on; V is 1 at an edge.
template <int R, int V, int KH, typename T, typename Load>
SDAN_INLINE void plane_block(const PlaneConv<T>& p, const Taps& taps, const PlaneRows<T>& rows,
                             int64_t c, const Load& load) {
  if (R > 1 && rows.next_x != nullptr) {
    constexpr int kLine = 64 / sizeof(T);
#pragma GCC unroll 16
    for (int i = 0; i < R * V * kLanes; i += kLine) {
      __builtin_prefetch(rows.next_x + R * c + i, 0, 2);
      prefetch_write(rows.next_y + R * c + i);
    }
  }
  Vec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = zero();
  }
  const ptrdiff_t row = p.w * taps.dh;
  const T* x = rows.x + c - static_cast<ptrdiff_t>((taps.kw - 1) / 2) * taps.dw;
  accumulate<false, R, V, KH>(acc, x, taps, row, taps.dw, load);
  T* y = rows.y + c;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r, y += p.y_row * taps.dh) {
    if constexpr (V > 1) {
#pragma GCC unroll 4
      for (int v = 0; v < V; v += 2) {
        store_two(y + v * kLanes, acc[r][v] + p.bias, acc[r][v + 1] + p.bias);
      }
    } else if (p.w - c >= kLanes) {
      store(y, acc[r][0] + p.bias);
    } else {
      store_n(y, acc[r][0] + p.bias, static_cast<int>(p.w - c));
    }
  }
}

// The vectors [left, right) of R rows.
template <int R, int V, int KH, typename T, typename Load>
SDAN_INLINE void plane_vectors(const PlaneConv<T>& p, const Taps& taps, const PlaneRows<T>& rows,
                               const Load& load) {
  const int64_t right = p.edges.right;
  int64_t v = p.edges.left;
  for (; v + V <= right; v += V) plane_block<R, V, KH>(p, taps, rows, v * kLanes, load);
  if constexpr (V > 4) {
    if (v + V / 2 <= right) {
      plane_block<R, V / 2, KH>(p, taps, rows, v * kLanes, load);
      v += V / 2;
    }
  }
  if constexpr (V > 2) {
    if (v + 2 <= right) {
      plane_block<R, 2, KH>(p, taps, rows, v * kLanes, load);
      v += 2;
    }
  }
  for (; v < right; ++v) plane_block<R, 1, KH>(p, taps, rows, v * kLanes, load);
}

// The vectors of R rows that have taps beyond the row's left or right end.
template <int R, int KH, typename T>
SDAN_INLINE void plane_edges(const PlaneConv<T>& p, const Taps& taps, const PlaneRows<T>& rows,
                             int64_t begin, int64_t end, const LaneBits* masks) {
  for (int64_t v = begin; v < end; ++v, masks += taps.kw) {
    plane_block<R, 1, KH>(p, taps, rows, v * kLanes, LoadLanes{masks});
  }
}

// The vectors between those.
template <int R, int V, int KH, typename T>
SDAN_INLINE void plane_middle(const PlaneConv<T>& p, const Taps& taps, const PlaneRows<T>& rows) {
  const T* last = rows.x + (R - 1) * taps.dh * p.w + p.w;
  if (KH == 1 && rows.x - p.begin >= kLanes && p.end - last >= 2 * kLanes) {
    plane_vectors<R, V, KH>(p, taps, rows, LoadNeighbours<true>{});
  } else {
    plane_vectors<R, V, KH>(p, taps, rows, LoadNeighbours<false>{});
  }
}

// R whole rows. Not inlined: each instance is one hot loop, which takes what it needs by value
// (conv_rows in tile_conv.h).
template <int R, int V, int KH, typename T>
__attribute__((noinline)) void plane_rows(PlaneConv<T> p, Taps taps, PlaneRows<T> rows) {
  const RowEdges& edges = p.edges;
  plane_edges<R, KH>(p, taps, rows, 0, edges.left, edges.masks);
  plane_middle<R, V, KH>(p, taps, rows);
  plane_edges<R, KH>(p, taps, rows, edges.right, edges.all, edges.masks + edges.left * taps.kw);
}

// R neighbouring rows of a kernel of one row, one after the other but for their ends: the sums of a
// vector alone are a chain of multiply-adds that wait for each other.
template <int R, typename T>
__attribute__((noinline)) void plane_strip(PlaneConv<T> p, PlaneRows<T> rows) {
  const RowEdges& edges = p.edges;
  PlaneRows<T> row = rows;
  for (int r = 0; r < R; ++r, row.x += p.w, row.y += p.y_row) {
    plane_middle<1, kRowConvVecs, 1>(p, p.taps, row);
  }
  plane_edges<R, 1>(p, p.taps, rows, 0, edges.left, edges.masks);
  plane_edges<R, 1>(p, p.taps, rows, edges.right, edges.all, edges.masks + edges.left * p.taps.kw);
}

// One row, the taps that meet padding left out.
template <typename T>
SDAN_INLINE void plane_border_row(const PlaneConv<T>& p, int64_t r) {
  Taps taps = p.taps;
  const int64_t dh = taps.dh;
  const int64_t top = r - (taps.kh - 1) / 2 * dh;
  const int64_t skip = top < 0 ? (-top + dh - 1) / dh : 0;
  const int64_t fit = (p.h - 1 - top) / dh + 1;
  taps.kh = static_cast<int>((fit < p.taps.kh ? fit : p.taps.kh) - skip);
  taps.skipped = p.taps.kh - taps.kh;
  taps.weights += skip;
  plane_rows<1, kRowConvVecs, 0, T>(
      p, taps, {p.x + (top + skip * dh) * p.w, p.y + r * p.y_row, nullptr, nullptr});
}

// Rows [h0, h1) of the plane, with a kernel of KH rows: 1, 3, 5 or (KH = 0) four or more. `single`:
// row by row, the one order in which no more than a stream is read and one written, and that of
// strips in any case.
template <int KH, typename T>
SDAN_INLINE void plane_conv(const PlaneConv<T>& p, int64_t h0, int64_t h1, bool single) {
  const int64_t dh = p.taps.dh;
  const int64_t pad = (p.taps.kh - 1) / 2 * dh;
  const int64_t begin = h0 > pad ? h0 : (pad < h1 ? pad : h1);
  const int64_t end = h1 < p.h - pad ? h1 : (p.h - pad > begin ? p.h - pad : begin);
  const auto rows_at = [&](int64_t r) __attribute__((always_inline)) {
    return PlaneRows<T>{p.x + (r - pad) * p.w, p.y + r * p.y_row, nullptr, nullptr};
  };
  for (int64_t r = h0; r < begin; ++r) plane_border_row(p, r);
  if constexpr (KH == 1) {
    int64_t r = begin;
    for (; r + 3 < end; r += 4) plane_strip<4>(p, rows_at(r));
    for (; r < end; ++r) plane_strip<1>(p, rows_at(r));
  } else if (single) {
    for (int64_t r = begin; r < end; ++r) plane_rows<1, kRowConvVecs, KH>(p, p.taps, rows_at(r));
  } else {
    for (int64_t r0 = begin; r0 < end; r0 += 4 * dh) {
      for (int64_t r = r0; r < r0 + dh && r < end; ++r) {
        PlaneRows<T> rows = rows_at(r);
        // The dh groups of the next 4 dh rows share out what they have in common.
        const int64_t next = r0 + 4 * dh + 4 * (r - r0);
        rows.next_x = p.x + (next + pad) * p.w;
        rows.next_y = p.y + next * p.y_row;
        if (r + 3 * dh < end) {
          plane_rows<4, kConvVecs, KH>(p, p.taps, rows);
          continue;
        }
        if (r + dh < end) plane_rows<2, kConvVecs, KH>(p, p.taps, rows);
        const int64_t last = r + dh < end ? r + 2 * dh : r;
        if (last < end) plane_rows<1, kRowConvVecs, KH>(p, p.taps, rows_at(last));
      }
    }
  }
  for (int64_t r = end; r < h1; ++r) plane_border_row(p, r);
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
