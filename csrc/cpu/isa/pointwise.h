// The 1x1 convolution of a tile: a small matrix product, register-blocked over outputs and pixels.
//
// A tile is channels x pixels with the pixels contiguous, so vectors run along the image row and
// any number of channels is efficient. Each step of the inner loop loads kPointwiseVecs vectors of
// pixels and kPointwiseRows weights and issues their product, all sums staying in registers: on
// AVX-512 14 x 2 sums, 28 multiply-adds for 16 loads.
//
// Where the processor multiplies pairs of bfloat16 (pairs.h), a row of a tile may hold two
// channels; rows, strides and the order of the weights stay those of float32, with half as many
// rows.
#pragma once

#include "matrix_tiles.h"
#include "pairs.h"
#include "prefetch.h"
#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

#if SDAN_IS_AVX512
constexpr int kPointwiseRows = 14;
constexpr int kPointwiseVecs = 2;
#elif SDAN_IS_AVX2
constexpr int kPointwiseRows = 6;
constexpr int kPointwiseVecs = 2;
#else
constexpr int kPointwiseRows = 6;
constexpr int kPointwiseVecs = 1;
#endif

// Outputs are split as evenly as possible into groups of at most kPointwiseRows.
SDAN_INLINE int pointwise_groups(int co) {
  return (co + kPointwiseRows - 1) / kPointwiseRows;
}
SDAN_INLINE int pointwise_group_begin(int co, int groups, int g) {
  return static_cast<int>(static_cast<int64_t>(co) * g / groups);
}

// packed[begin * ci + k * rows + m] = weight[begin + m][k] for each group of rows [begin, begin +
// rows).
static inline void pack_pointwise_weight(const float* weight, int co, int ci, float* packed) {
  const int groups = pointwise_groups(co);
  for (int g = 0; g < groups; ++g) {
    const int begin = pointwise_group_begin(co, groups, g);
    const int rows = pointwise_group_begin(co, groups, g + 1) - begin;
    float* p = packed + static_cast<int64_t>(begin) * ci;
    for (int k = 0; k < ci; ++k) {
      for (int m = 0; m < rows; ++m)
        p[k * rows + m] = weight[static_cast<int64_t>(begin + m) * ci + k];
    }
  }
}

// Where registers are free, inputs are summed in turn in two or four sums. Shorter sums round less,
// which images of a few pixels (one vector) and products of one or two outputs need to be no worse
// than a blocked matrix product; and one or two outputs alone would wait for their sums.
template <int M, int V>
constexpr int kPointwiseSums = M <= 2   ? 4
                               : V == 1 ? 2
                                        : 1;

// acc[0] = the S sums of each place, in pairs.
template <int S, int M, int V>
SDAN_INLINE void add_up(Vec (&acc)[S][M][V]) {
  static_assert(S == 1 || S == 2 || S == 4);
  if constexpr (S > 1) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        if constexpr (S == 4) {
          acc[0][m][v] = acc[0][m][v] + acc[2][m][v];
          acc[1][m][v] = acc[1][m][v] + acc[3][m][v];
        }
        acc[0][m][v] = acc[0][m][v] + acc[1][m][v];
      }
    }
  }
}

// The next tile's lines are asked for a few at a time, after every kPrefetchRows rows of input: all
// that a product has to ask for, at once, would be more than a core may have outstanding.
constexpr int kPrefetchRows = 8;

// How often a product of so many outputs, reading the rows of the inputs one after another, takes
// lines from the queue for each block of kPointwiseVecs vectors.
SDAN_INLINE int prefetch_steps(int co, int rows, int input_count) {
  return pointwise_groups(co) * input_count * ((rows + kPrefetchRows - 1) / kPrefetchRows);
}

template <typename Multiply, int M, int V>
static void pointwise_kernel(const PointwiseInput* inputs, int input_count, ptrdiff_t column,
                             const float* weight, const float* bias, float* out,
                             ptrdiff_t out_stride, PrefetchQueue* queue, int lines) {
  constexpr int S = kPointwiseSums<M, V>;
  Vec acc[S][M][V];
  for (int i = 0; i < input_count; ++i) {
    const float* x = inputs[i].x + column;
    const ptrdiff_t stride = inputs[i].stride;
    int left = inputs[i].count;
    if constexpr (S == 1) {
      // The first row of input begins the sums.
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vec w = set1(weight[m]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[0][m][v] = Multiply::first(load(x + v * kLanes), w);
      }
      x += stride;
      weight += M;
      --left;
    } else {
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) acc[s][m][v] = zero();
        }
      }
    }
    while (left >= S) {
      int steps = (left < kPrefetchRows ? left : kPrefetchRows) / S;
      left -= steps * S;
      do {
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
          Vec in[V];
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) in[v] = load(x + v * kLanes);
#pragma GCC unroll 16
          for (int m = 0; m < M; ++m) {
            const Vec w = set1(weight[m]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[s][m][v] = Multiply::add(in[v], w, acc[s][m][v]);
          }
          x += stride;
          weight += M;
        }
      } while (--steps > 0);
      if (queue != nullptr) queue->step(lines);
    }
    for (; left > 0; --left) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vec w = set1(weight[m]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          acc[0][m][v] = Multiply::add(load(x + v * kLanes), w, acc[0][m][v]);
        }
      }
      x += stride;
      weight += M;
    }
    add_up(acc);
    if (i + 1 < input_count) {
      // Each input is summed by itself and the sums added up in memory: of many inputs, the nine
      // taps of the dense 3x3 above all, one long sum would round more than a blocked product.
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          float* sum = out + m * out_stride + v * kLanes;
          store(sum, i == 0 ? acc[0][m][v] : load(sum) + acc[0][m][v]);
        }
      }
    }
  }
  // The bias comes last: carried through the sum it makes every rounding larger, half as much error
  // again.
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const Vec b = set1(bias[m]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* result = out + m * out_stride + v * kLanes;
      Vec sum = acc[0][m][v];
      if (input_count > 1) sum = load(result) + sum;
      store(result, sum + b);
    }
  }
}

template <typename Multiply, int V>
SDAN_INLINE void pointwise_group(int rows, const PointwiseInput* inputs, int input_count,
                                 ptrdiff_t column, const float* weight, const float* bias,
                                 float* out, ptrdiff_t out_stride, PrefetchQueue* queue,
                                 int lines) {
#define SDAN_POINTWISE_CASE(M)                                                                     \
  case M:                                                                                          \
    if constexpr (M <= kPointwiseRows) {                                                           \
      pointwise_kernel<Multiply, M, V>(inputs, input_count, column, weight, bias, out, out_stride, \
                                       queue, lines);                                              \
    }                                                                                              \
    break;
  switch (rows) {
    SDAN_POINTWISE_CASE(1)
    SDAN_POINTWISE_CASE(2)
    SDAN_POINTWISE_CASE(3)
    SDAN_POINTWISE_CASE(4)
    SDAN_POINTWISE_CASE(5)
    SDAN_POINTWISE_CASE(6)
    SDAN_POINTWISE_CASE(7)
    SDAN_POINTWISE_CASE(8)
    SDAN_POINTWISE_CASE(9)
    SDAN_POINTWISE_CASE(10)
    SDAN_POINTWISE_CASE(11)
    SDAN_POINTWISE_CASE(12)
    SDAN_POINTWISE_CASE(13)
    SDAN_POINTWISE_CASE(14)
    default:
      break;
  }
#undef SDAN_POINTWISE_CASE
}

// out[m][p] = bias[m] + sum over the inputs for `vecs` vectors of pixels; the inputs are read from
// `column` on, out is written from its own start. Weights packed for co outputs and the inputs'
// total of rows. prefetch_steps() times for each kPointwiseVecs vectors it takes `lines` cache
// lines from the queue.
template <typename Multiply>
static inline void pointwise_block_as(const PointwiseInput* inputs, int input_count,
                                      ptrdiff_t column, const float* weight, const float* bias,
                                      int co, float* out, ptrdiff_t out_stride, int vecs,
                                      PrefetchQueue* queue, int lines) {
  int ci = 0;
  for (int i = 0; i < input_count; ++i) ci += inputs[i].count;
  const int groups = pointwise_groups(co);
  for (int g = 0; g < groups; ++g) {
    const int begin = pointwise_group_begin(co, groups, g);
    const int rows = pointwise_group_begin(co, groups, g + 1) - begin;
    const float* w = weight + static_cast<int64_t>(begin) * ci;
    float* o = out + begin * out_stride;
    int v = 0;
    for (; v + kPointwiseVecs <= vecs; v += kPointwiseVecs) {
      pointwise_group<Multiply, kPointwiseVecs>(rows, inputs, input_count, column + v * kLanes, w,
                                                bias + begin, o + v * kLanes, out_stride, queue,
                                                lines);
    }
    if constexpr (kPointwiseVecs > 1) {
      for (; v < vecs; ++v) {
        pointwise_group<Multiply, 1>(rows, inputs, input_count, column + v * kLanes, w,
                                     bias + begin, o + v * kLanes, out_stride, nullptr, 0);
      }
    }
  }
}

static inline void pointwise_block(const PointwiseInput* inputs, int input_count, ptrdiff_t column,
                                   const float* weight, const float* bias, int co, float* out,
                                   ptrdiff_t out_stride, int vecs, PrefetchQueue* queue = nullptr,
                                   int lines = 0) {
  pointwise_block_as<MultiplyAdd>(inputs, input_count, column, weight, bias, co, out, out_stride,
                                  vecs, queue, lines);
}

// The same for weights of either kind.
static inline void pointwise_block(const PointwiseInput* inputs, int input_count, ptrdiff_t column,
                                   const Pointwise& pw, float* out, ptrdiff_t out_stride, int vecs,
                                   PrefetchQueue* queue = nullptr, int lines = 0) {
#if SDAN_IS_AVX512
  if (pw.tiles != nullptr) {
    const int steps = prefetch_steps(pw.co, inputs[0].count, input_count), blocks = tile_blocks(pw);
    return tile_products(inputs, input_count, column, pw, out, out_stride, vecs, queue,
                         (steps * lines + blocks - 1) / blocks);
  }
#endif
  if constexpr (kHasPairs) {
    if (pw.pairs) {
      return pointwise_block_as<MultiplyPairs>(inputs, input_count, column, pw.weight, pw.bias,
                                               pw.co, out, out_stride, vecs, queue, lines);
    }
  }
  pointwise_block_as<MultiplyAdd>(inputs, input_count, column, pw.weight, pw.bias, pw.co, out,
                                  out_stride, vecs, queue, lines);
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
