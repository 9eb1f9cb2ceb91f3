// The 1x1 convolution of pixels whose channels are neighbours (channels_last), without a
// transposition: vectors run along the outputs, and each pixel's inputs are broadcast one at a
// time, or as the pairs of bfloat16 that they lie in.
//
// Each step of the inner loop loads V vectors of weights and broadcasts R inputs for R x V
// multiply-adds, all sums staying in registers: with AVX2 4 x 3 or 6 x 2, 7 or 8 loads for 12.
#pragma once

#include <type_traits>

#include "pairs.h"
#include "prefetch.h"
#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

#if SDAN_IS_AVX512
constexpr int kOutputVecs = 4;   // of a block at most
constexpr int kOutputSums = 24;  // in registers
constexpr int kOutputPixels = 12;
#elif SDAN_IS_AVX2
constexpr int kOutputVecs = 3;
constexpr int kOutputSums = 12;
constexpr int kOutputPixels = 8;
#else
constexpr int kOutputVecs = 2;
constexpr int kOutputSums = 4;
constexpr int kOutputPixels = 4;
#endif

// Inputs that are added up one after the other, for R pixels together; longer sums would gather
// more rounding errors than a blocked product. Of single pixels PyTorch has several sums under way.
template <int R>
constexpr int64_t kOutputSummed = R == 1 ? 16 : 64;

// Pixels that a block of V vectors multiplies at a time; all of them divide 24.
template <int V>
constexpr int kPixelsOf = kOutputSums / V < kOutputPixels ? kOutputSums / V : kOutputPixels;

SDAN_INLINE int64_t output_vecs(int64_t co) {
  return (co + kLanes - 1) / kLanes;
}

// Output vectors are split as evenly as possible into blocks of at most kOutputVecs.
SDAN_INLINE int64_t output_blocks(int64_t co) {
  return (output_vecs(co) + kOutputVecs - 1) / kOutputVecs;
}
SDAN_INLINE int64_t output_block_begin(int64_t co, int64_t block) {
  return output_vecs(co) * block / output_blocks(co);
}

// The first output of a vector. The last vector ends with the last output, and so computes some of
// the one before again: masked stores take longer, with AVX2 several times.
SDAN_INLINE int64_t output_of(int64_t co, int64_t vec) {
  const int64_t last = co < kLanes ? 0 : co - kLanes;
  return vec * kLanes < last ? vec * kLanes : last;
}

// For each block [words of input][vectors of the block], weight(output, word) in each lane, zero
// where there are fewer outputs than lanes; then bias(output) the same way.
template <typename Weight, typename Bias>
SDAN_INLINE void pack_outputs(int64_t words, int64_t co, const Weight& weight, const Bias& bias,
                              float* out) {
  const int64_t blocks = output_blocks(co);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = output_block_begin(co, b), end = output_block_begin(co, b + 1);
    for (int64_t k = 0; k < words; ++k) {
      for (int64_t v = begin; v < end; ++v) {
        for (int64_t m = output_of(co, v); m < output_of(co, v) + kLanes; ++m) {
          *out++ = m < co ? weight(m, k) : 0.0f;
        }
      }
    }
  }
  for (int64_t v = 0; v < output_vecs(co); ++v) {
    for (int64_t m = output_of(co, v); m < output_of(co, v) + kLanes; ++m) {
      *out++ = m < co ? bias(m) : 0.0f;
    }
  }
}

// A 1x1 convolution packed by pack_outputs. Of pairs, a word of input is two channels.
struct OutputProducts {
  const float* packed;
  int64_t words, co;
};

// A word of input, as float, or two bfloat16 as they lie.
template <typename X>
SDAN_INLINE Vec broadcast(const X* x) {
  float word;
  std::memcpy(&word, x, sizeof(word));
  return set1(word);
}

// R pixels by V output vectors; x are their inputs, pixel after pixel. finish(r, v, sum) takes the
// sums.
template <typename Product, int R, int V, typename X, typename Finish>
SDAN_INLINE void outputs_kernel(const X* x, int64_t words, const float* weight, const float* bias,
                                const Finish& finish) {
  constexpr int64_t kWord = sizeof(float) / sizeof(X);
  constexpr int64_t kSummed = kOutputSummed<R> / kWord;
  Vec acc[R][V], before[R][V];
  for (int64_t begin = 0; begin < words; begin += kSummed) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        if (begin > 0) before[r][v] = begin > kSummed ? before[r][v] + acc[r][v] : acc[r][v];
        acc[r][v] = zero();
      }
    }
    const int64_t end = words - begin < kSummed ? words : begin + kSummed;
    for (int64_t k = begin; k < end; ++k, weight += V * kLanes) {
      Vec w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = load(weight + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec in = broadcast(x + (r * words + k) * kWord);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = Product::add(in, w[v], acc[r][v]);
      }
    }
  }
  // The bias comes last: carried through the sum it makes every rounding larger.
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec sum = words > kSummed ? before[r][v] + acc[r][v] : acc[r][v];
      finish(r, v, sum + load(bias + v * kLanes));
    }
  }
}

// The pixels of a block of V vectors, the first of which is `first`. `finish` is taken by value,
// and must hold nothing by reference, as in plane_group (plane_products.h).
template <typename Product, int V, typename X, typename Finish>
static void output_block(const OutputProducts& p, int64_t first, const X* x, int64_t n,
                         PrefetchQueue* queue, int lines, Finish finish) {
  constexpr int R = kPixelsOf<V>;
  constexpr int64_t kWord = sizeof(float) / sizeof(X);
  const int64_t words = p.words;
  const float* weight = p.packed + first * kLanes * p.words;
  const float* bias = p.packed + (output_vecs(p.co) * p.words + first) * kLanes;
  // Fewer outputs than lanes are less than a vector.
  const int lanes = V > 1 || p.co >= kLanes ? kLanes : static_cast<int>(p.co);
  const int64_t last = output_of(p.co, first + V - 1);
  const auto pixels = [&](auto count, int64_t i) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    queue->step(lines);
    outputs_kernel<Product, kCount, V>(x + i * words * kWord, words, weight, bias,
                                       [&](int r, int v, Vec sum) __attribute__((always_inline)) {
                                         finish(i + r, v + 1 < V ? (first + v) * kLanes : last, sum,
                                                lanes);
                                       });
  };
  int64_t i = 0;
  for (; i + R <= n; i += R) pixels(std::integral_constant<int, R>{}, i);
  // What is left is computed with some of those before it, again.
  if (i < n && n >= R) return pixels(std::integral_constant<int, R>{}, n - R);
  for (; i < n; ++i) pixels(std::integral_constant<int, 1>{}, i);
}

// Pixels to pass through all outputs together, one block after another: few enough that they stay
// in a cache, and a multiple of every register block.
SDAN_INLINE int64_t pixels_together(const OutputProducts& p) {
  const int64_t n = 16384 / p.words / 24 * 24;
  return n < 24 ? 24 : n > 96 ? 96 : n;
}

// finish(pixel, first output, sums, lanes) for all outputs of n pixels, x, some of them more than
// once; `lanes` of the vector are outputs. Each step takes `lines` lines from the queue.
template <typename Product, typename X, typename Finish>
SDAN_INLINE void output_products(const OutputProducts& p, const X* x, int64_t n,
                                 PrefetchQueue* queue, int lines, const Finish& finish) {
  const int64_t blocks = output_blocks(p.co);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = output_block_begin(p.co, b), end = output_block_begin(p.co, b + 1);
    switch (end - begin) {
      case 1:
        output_block<Product, 1>(p, begin, x, n, queue, lines, finish);
        break;
      case 2:
        output_block<Product, 2>(p, begin, x, n, queue, lines, finish);
        break;
      case 3:
        if constexpr (kOutputVecs >= 3) {
          output_block<Product, 3>(p, begin, x, n, queue, lines, finish);
        }
        break;
      default:
        if constexpr (kOutputVecs >= 4) {
          output_block<Product, 4>(p, begin, x, n, queue, lines, finish);
        }
        break;
    }
  }
}

// How many lines output_products should take from the queue at a step, so that those of n pixels
// have asked for as many more of `bytes` bytes each.
SDAN_INLINE int lines_an_output_step(int64_t co, int64_t n, int64_t bytes) {
  const int64_t steps = output_vecs(co) * n / kOutputSums;
  return static_cast<int>(n * bytes / 64 / (steps > 0 ? steps : 1) + 1);
}

// n values as float32: where they lie, or converted into `scratch`.
SDAN_INLINE const float* as_floats(const float* x, int64_t, float*) {
  return x;
}

template <typename T>
SDAN_INLINE const float* as_floats(const T* x, int64_t n, float* scratch) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(scratch + i, load(x + i));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store_n(scratch + i, load_n(x + i, left), left);
  }
  return scratch;
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
