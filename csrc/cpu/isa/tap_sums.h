// The gradient of a depth-wise filter on one plane: for every tap, the sum over the pixels of the
// output's gradient times what the tap saw, sum of grad[y][x] * in[y + i dh - pad_y][x + j dw -
// pad_x].
//
// A x B sums stay in registers: A vectors of the gradient, each moved by one more step, times B of
// the input. In a filter of several rows the gradient moves by tap rows and the input by tap
// columns, so that only loads of the input are not aligned. A filter of one row splits its taps the
// same way, j = a + A b, moving the gradient by one tap and the input by A: A + B loads instead of
// the A B that its taps alone would need, most of which would touch two cache lines.
#pragma once

#include "branch_conv.h"
#include "careful_sum.h"

namespace sdan_fast {
namespace SDAN_ISA {

// The registers hold kTapsA x kTapsB sums, kTapsA vectors of the gradient and one of the input; or
// kTapsTall sums of one tap column, whose gradient is not kept.
#if SDAN_IS_AVX512
constexpr int kTapsA = 7;
constexpr int kTapsB = 3;
constexpr int kTapsTall = 12;
constexpr int kHalfLoads = 4;  // that an access at any place costs: it lies across two cache lines
#elif SDAN_IS_AVX2
constexpr int kTapsA = 3;
constexpr int kTapsB = 4;
constexpr int kTapsTall = 12;
constexpr int kHalfLoads = 3;  // every second one does
#else
constexpr int kTapsA = 2;
constexpr int kTapsB = 2;
constexpr int kTapsTall = 6;
constexpr int kHalfLoads = 3;
#endif

// Both planes at the block's first tap and first position.
struct TapBlock {
  const float* grad;
  const float* in;
  ptrdiff_t grad_step, in_step;  // from one a to the next, from one b to the next
  ptrdiff_t grad_row, in_row;
  int64_t rows, width;
};

// A single tap, in double: nothing else is summed over so many terms into so few results, nor adds
// so little to the loads.
static inline double tap_sum(const TapBlock& block) {
  double lanes[kLanes] = {};
  for (int64_t y = 0; y < block.rows; ++y) {
    const float* grad = block.grad + y * block.grad_row;
    const float* in = block.in + y * block.in_row;
    for (int64_t x = 0; x < block.width; x += kLanes) {
      for (int k = 0; k < kLanes; ++k) {
        lanes[k] += static_cast<double>(grad[x + k]) * static_cast<double>(in[x + k]);
      }
    }
  }
  double sum = 0.0;
  for (int k = 0; k < kLanes; ++k) sum += lanes[k];
  return sum;
}

// sums[a * B + b]. In float32 at most some 64 terms are added one after the other, fewer where that
// costs little, then at most as many such sums: a sum's error grows with the length of its chain.
template <int A, int B>
static void block_sums(const TapBlock& block, double* sums) {
  constexpr int kChain = A * B < 8 ? 8 * A * B : 64;
  const int64_t vecs = (block.width + kLanes - 1) / kLanes;
  const int64_t part = vecs < kChain ? kChain / vecs : 1;
  for (int k = 0; k < A * B; ++k) sums[k] = 0.0;
  for (int64_t first = 0; first < block.rows; first += 64 * part) {
    const int64_t end = first + 64 * part < block.rows ? first + 64 * part : block.rows;
    Vec total[A][B];
#pragma GCC unroll 16
    for (int a = 0; a < A; ++a) {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) total[a][b] = zero();
    }
    for (int64_t y0 = first; y0 < end; y0 += part) {
      const int64_t y1 = y0 + part < end ? y0 + part : end;
      Vec acc[A][B];
#pragma GCC unroll 16
      for (int a = 0; a < A; ++a) {
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) acc[a][b] = zero();
      }
      for (int64_t y = y0; y < y1; ++y) {
        const float* grad = block.grad + y * block.grad_row;
        const float* in = block.in + y * block.in_row;
        for (int64_t x = 0; x < block.width; x += kLanes) {
          if constexpr (B == 1) {
            Vec v = load(in + x);
            pin(v);
#pragma GCC unroll 16
            for (int a = 0; a < A; ++a) {
              acc[a][0] = fma(v, load(grad + a * block.grad_step + x), acc[a][0]);
            }
          } else {
            Vec g[A];
#pragma GCC unroll 16
            for (int a = 0; a < A; ++a) {
              g[a] = load(grad + a * block.grad_step + x);
              pin(g[a]);
            }
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) {
              Vec v = load(in + b * block.in_step + x);
              pin(v);
#pragma GCC unroll 16
              for (int a = 0; a < A; ++a) acc[a][b] = fma(v, g[a], acc[a][b]);
            }
          }
        }
      }
#pragma GCC unroll 16
      for (int a = 0; a < A; ++a) {
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) total[a][b] = total[a][b] + acc[a][b];
      }
    }
    for (int a = 0; a < A; ++a) {
      for (int b = 0; b < B; ++b) sums[a * B + b] += lanes_sum(total[a][b]);
    }
  }
}

template <int A>
static void block_sums_of(int b, const TapBlock& block, double* sums) {
  if constexpr (A == 1) {
    if (b == 1) {
      sums[0] = tap_sum(block);
      return;
    }
  }
  if constexpr (A <= kTapsA) {
    if (b == 2) return block_sums<A, 2>(block, sums);
    if constexpr (kTapsB >= 3) {
      if (b == 3) return block_sums<A, 3>(block, sums);
    }
    if constexpr (kTapsB >= 4) {
      if (b == 4) return block_sums<A, 4>(block, sums);
    }
  }
  if constexpr (A > 1) block_sums<A, 1>(block, sums);
}

static inline void any_block_sums(int a, int b, const TapBlock& block, double* sums) {
#define SDAN_TAPS_CASE(A)                                           \
  case A:                                                           \
    if constexpr (A <= kTapsTall) block_sums_of<A>(b, block, sums); \
    break;
  switch (a) {
    SDAN_TAPS_CASE(1)
    SDAN_TAPS_CASE(2)
    SDAN_TAPS_CASE(3)
    SDAN_TAPS_CASE(4)
    SDAN_TAPS_CASE(5)
    SDAN_TAPS_CASE(6)
    SDAN_TAPS_CASE(7)
    SDAN_TAPS_CASE(8)
    SDAN_TAPS_CASE(9)
    SDAN_TAPS_CASE(10)
    SDAN_TAPS_CASE(11)
    SDAN_TAPS_CASE(12)
    default:
      break;
  }
#undef SDAN_TAPS_CASE
}

constexpr int kMostTapSums = kTapsA * kTapsB > kTapsTall ? kTapsA * kTapsB : kTapsTall;

// Planes of a convolution's input and of its output's gradient, at their first pixels; both lie in
// buffers of padded_buffer().
struct TapPlanes {
  const float* grad;
  const float* in;
  ptrdiff_t grad_stride, in_stride;
  int64_t height, width;
};

// Part `i` of `parts` equal ones of [0, n) begins here.
SDAN_INLINE int part_begin(int n, int parts, int i) {
  return static_cast<int>(static_cast<int64_t>(n) * i / parts);
}

// Filters of several rows.
static inline void rows_sums(const BranchConv& conv, const TapPlanes& planes, double* sums) {
  const int64_t pad_y = static_cast<int64_t>(conv.dh) * (conv.kh / 2);
  const int64_t pad_x = static_cast<int64_t>(conv.dw) * (conv.kw / 2);
  const int most_rows = conv.kw == 1 ? kTapsTall : kTapsA;
  const int row_parts = (conv.kh + most_rows - 1) / most_rows;
  const int column_parts = (conv.kw + kTapsB - 1) / kTapsB;
  double local[kMostTapSums];
  for (int p = 0; p < row_parts; ++p) {
    const int i0 = part_begin(conv.kh, row_parts, p), i1 = part_begin(conv.kh, row_parts, p + 1);
    // The input rows that some tap of these sees: the gradient's row above the first is beyond it.
    int64_t y0 = static_cast<int64_t>(i0) * conv.dh - pad_y;
    int64_t y1 = planes.height + static_cast<int64_t>(i1 - 1) * conv.dh - pad_y;
    if (y0 < 0) y0 = 0;
    if (y1 > planes.height) y1 = planes.height;
    // The gradient's rows that one row of the input meets stay in a first-level cache.
    const int64_t floats = 4096 / ((i1 - i0 - 1) * int64_t{conv.dh} + 1);
    const int64_t tile = floats > 64 * kLanes ? 64 * kLanes : floats > 64 ? floats / 16 * 16 : 64;
    for (int q = 0; q < column_parts; ++q) {
      const int j0 = part_begin(conv.kw, column_parts, q),
                j1 = part_begin(conv.kw, column_parts, q + 1);
      for (int64_t x0 = 0; x0 < planes.width; x0 += tile) {
        const TapBlock block{
            planes.grad + (y0 + pad_y - static_cast<int64_t>(i0) * conv.dh) * planes.grad_stride +
                x0,
            planes.in + y0 * planes.in_stride + static_cast<int64_t>(j0) * conv.dw - pad_x + x0,
            -conv.dh * planes.grad_stride,
            conv.dw,
            planes.grad_stride,
            planes.in_stride,
            y1 - y0,
            planes.width - x0 < tile ? planes.width - x0 : tile};
        any_block_sums(i1 - i0, j1 - j0, block, local);
        for (int i = i0; i < i1; ++i) {
          for (int j = j0; j < j1; ++j) {
            double& sum = sums[static_cast<int64_t>(i) * conv.kw + j];
            sum = (x0 > 0 ? sum : 0.0) + local[(i - i0) * (j1 - j0) + j - j0];
          }
        }
      }
    }
  }
}

// Filters of one row.
static inline void row_tap_sums(const BranchConv& conv, const TapPlanes& planes, double* sums) {
  const int64_t d = conv.dw, pad_x = d * (conv.kw / 2);
  const int parts = (conv.kw + kTapsA * kTapsB - 1) / (kTapsA * kTapsB);
  double local[kMostTapSums];
  for (int p = 0; p < parts; ++p) {
    const int t0 = part_begin(conv.kw, parts, p), t1 = part_begin(conv.kw, parts, p + 1);
    const int taps = t1 - t0;
    // A moved gradient is wider than the image, and moved no further than its padding.
    int best_a = 0, best_b = 0;
    int64_t best = 0;
    for (int a = 1; a <= kTapsA && a - 1 <= conv.kw / 2; ++a) {
      const int b = (taps + a - 1) / a;
      if (b > kTapsB) continue;
      const int sums_cost = 2 * a * b, loads_cost = 2 + (a - 1 + b) * kHalfLoads;
      const int64_t cost = (planes.width + (a - 1) * d + kLanes - 1) / kLanes *
                           (sums_cost > loads_cost ? sums_cost : loads_cost);
      if (best_a == 0 || cost < best) best_a = a, best_b = b, best = cost;
    }
    // Positions where some of the inputs lie in the image, from a whole vector on.
    int64_t x0 = pad_x - (t0 + static_cast<int64_t>(best_b - 1) * best_a) * d;
    int64_t x1 = planes.width + pad_x - t0 * d;
    x0 = x0 > 0 ? x0 / kLanes * kLanes : 0;
    if (x1 > planes.width + (best_a - 1) * d) x1 = planes.width + (best_a - 1) * d;
    const TapBlock block{planes.grad + x0,
                         planes.in + x0 + t0 * d - pad_x,
                         -d,
                         best_a * d,
                         planes.grad_stride,
                         planes.in_stride,
                         planes.height,
                         x1 - x0};
    any_block_sums(best_a, best_b, block, local);
    for (int t = 0; t < taps; ++t) {
      sums[t0 + t] = local[t % best_a * best_b + t / best_a];
    }
  }
}

// sums[i * kw + j] of one plane.
static inline void filter_sums(const BranchConv& conv, const TapPlanes& planes, double* sums) {
  if (conv.kh == 1) {
    row_tap_sums(conv, planes, sums);
  } else {
    rows_sums(conv, planes, sums);
  }
}

// The sum of a plane whose rows are zero up to whole vectors.
static inline double plane_sum(const float* plane, ptrdiff_t stride, int64_t height,
                               int64_t width) {
  CarefulSum sum;
  for (int64_t y = 0; y < height; ++y) sum.add_row(plane + y * stride, width);
  return sum.total();
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
