// The gated 1x1 convolution, a register-blocked small matrix product over tiles of pixels.
//
// NCHW: vectors run along the pixels, the tile is staged as float32 channels x pixels.
// channels_last: vectors run along the output channels, and each pixel's inputs are broadcast one
// at a time, or as the pairs of bfloat16 that they lie in.
#include "pointwise_gate.h"

#include <type_traits>

#include "by_dtype.h"
#include "planes.h"
#include "pointwise.h"
#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

#if SDAN_IS_AVX512
constexpr int kGateVecs = 4;   // output vectors of a block at most
constexpr int kGateSums = 24;  // sums in registers
constexpr int kGatePixels = 14;
#elif SDAN_IS_AVX2
constexpr int kGateVecs = 2;
constexpr int kGateSums = 12;
constexpr int kGatePixels = 6;
#else
constexpr int kGateVecs = 2;
constexpr int kGateSums = 4;
constexpr int kGatePixels = 4;
#endif

// Inputs that are added up one after the other; longer sums would gather more rounding errors than
// PyTorch's, which has several under way.
constexpr int64_t kSummed = 32;

template <int V>
constexpr int gate_rows() {
  return kGateSums / V < kGatePixels ? kGateSums / V : kGatePixels;
}

// Output vectors are split as evenly as possible into blocks of at most kGateVecs.
SDAN_INLINE int64_t gate_blocks(int64_t vecs) {
  return (vecs + kGateVecs - 1) / kGateVecs;
}

SDAN_INLINE int64_t output_vecs(int64_t co) {
  return (co + kLanes - 1) / kLanes;
}

// NCHW: weights as pack_pointwise_weight lays them out, the bias, zeros. channels_last: for each
// block of output vectors [ci][vectors of the block], zero past the last channel, then the bias; of
// pairs [ci / 2][vectors of the block].
template <typename T>
void pack(const PointwiseGateArgs& a) {
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  float* out = a.packed;
  if (!a.channels_last) {
    const int co = static_cast<int>(a.co);
    const int ci = static_cast<int>(a.ci);
    const int groups = pointwise_groups(co);
    for (int g = 0; g < groups; ++g) {
      const int begin = pointwise_group_begin(co, groups, g);
      const int end = pointwise_group_begin(co, groups, g + 1);
      for (int k = 0; k < ci; ++k) {
        for (int m = begin; m < end; ++m)
          *out++ = to_float(weight[static_cast<int64_t>(m) * ci + k]);
      }
    }
    for (int m = 0; m < co; ++m) *out++ = bias == nullptr ? 0.0f : to_float(bias[m]);
    for (int m = 0; m < co; ++m) *out++ = 0.0f;
    return;
  }
  const int64_t vecs = output_vecs(a.co);
  const int64_t blocks = gate_blocks(vecs);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = vecs * b / blocks * kLanes;
    const int64_t last = vecs * (b + 1) / blocks * kLanes;
    if (a.pairs) {
      for (int64_t k = 0; k < a.ci; k += 2) {
        for (int64_t m = first; m < last; ++m, ++out) {
          *out = 0.0f;
          if (m < a.co) std::memcpy(out, weight + m * a.ci + k, sizeof(float));
        }
      }
      continue;
    }
    for (int64_t k = 0; k < a.ci; ++k) {
      for (int64_t m = first; m < last; ++m)
        *out++ = m < a.co ? to_float(weight[m * a.ci + k]) : 0.0f;
    }
  }
  for (int64_t m = 0; m < vecs * kLanes; ++m) {
    *out++ = bias == nullptr || m >= a.co ? 0.0f : to_float(bias[m]);
  }
}

// Asks for `lines` cache lines from p on.
template <typename T>
SDAN_INLINE void fetch(const T* p, int64_t lines, int write) {
  for (int64_t i = 0; i < lines; ++i) {
    const char* line = reinterpret_cast<const char*>(p) + i * 64;
    if (write != 0) {
      __builtin_prefetch(line, 1);
    } else {
      __builtin_prefetch(line, 0);
    }
  }
}

// Pixels of a chunk: its inputs, as float32, fill a first-level cache.
SDAN_INLINE int64_t chunk_pixels(int64_t ci) {
  constexpr int64_t kBlock = static_cast<int64_t>(kPointwiseVecs) * kLanes;
  const int64_t n = 8192 / ci / kBlock * kBlock;
  return n < kBlock ? kBlock : (n > 512 ? 512 : n);
}

// Tile [first, last) of the pixels of one image, a chunk at a time: its inputs are staged next to
// each other, multiplied, and the product gated on its way out.
template <typename T>
void tile_nchw(const PointwiseGateArgs& a, int64_t image, int64_t first, int64_t last) {
  const int64_t chunk = chunk_pixels(a.ci);
  const int64_t stride = staged_stride(chunk);
  float* staged = static_cast<float*>(
      thread_scratch(static_cast<size_t>((a.ci + a.co) * stride) * sizeof(float)));
  float* product = staged + a.ci * stride;
  // The bias is added to the finished sums, not the sums to the bias, whose rounding could outweigh
  // them.
  const float* bias = a.packed + a.ci * a.co;
  const float* zeros = bias + a.co;
  const int ci = static_cast<int>(a.ci);
  const int co = static_cast<int>(a.co);
  for (int64_t i = first; i < last; i += chunk) {
    const int64_t n = last - i < chunk ? last - i : chunk;
    const int64_t at = image * a.co * a.pixels + i;
    const T* x = static_cast<const T*>(a.x) + image * a.ci * a.pixels + i;
    const T* u = static_cast<const T*>(a.u) + at;
    T* y = static_cast<T*>(a.y) + at;
    // While the product is computed: what gates it, where it goes, and the next chunk.
    PrefetchQueue queue;
    queue.clear();
    queue.add_rows(u, a.pixels, co, n, false);
    queue.add_rows(y, a.pixels, co, n, true);
    queue.add_rows(x + n, a.pixels, ci, n, false);
    constexpr int64_t kStepFloats = static_cast<int64_t>(kPointwiseVecs) * kLanes;
    const int64_t lines = (a.ci + 2 * a.co) * (n * static_cast<int64_t>(sizeof(T)) / 64 + 1);
    // Small images are in the second-level cache, and asking for each of their lines would take a
    // third of the time of the product.
    const bool cached = a.pixels * (a.ci + 2 * a.co) * static_cast<int64_t>(sizeof(T)) < (2 << 20);
    const int64_t steps = cached ? 0 : prefetch_steps(co, ci, 1) * (n / kStepFloats);
    stage_planes(staged, stride, x, a.pixels, a.ci, n);
    const PointwiseInput input = {staged, static_cast<ptrdiff_t>(stride), ci};
    pointwise_block(&input, 1, 0, a.packed, zeros, co, product, static_cast<ptrdiff_t>(stride),
                    static_cast<int>((n + kLanes - 1) / kLanes), steps > 0 ? &queue : nullptr,
                    steps > 0 ? static_cast<int>(lines / steps + 1) : 0);
    write_planes(y, a.pixels, a.co, n,
                 [&](int64_t c, int64_t k, int lanes) __attribute__((always_inline)) {
                   const T* p = u + c * a.pixels + k;
                   const Vec sum = load(product + c * stride + k) + set1(bias[c]);
                   return (lanes == kLanes ? load(p) : load_n(p, lanes)) * sum;
                 });
  }
}

// An input of the product, as float, or two of bfloat16 as they lie.
template <typename X>
SDAN_INLINE Vec broadcast(const X* x) {
  float word;
  std::memcpy(&word, x, sizeof(word));
  return set1(word);
}

// R pixels by V output vectors. x: rows of `ci` inputs, a word of them at a time; `lanes` of the
// last vector are real channels.
template <typename Product, typename X, typename T, int R, int V>
SDAN_INLINE void gate_kernel(const X* x, int64_t ci, const float* weight, const float* bias,
                             const T* u, T* y, int64_t co, int lanes) {
  constexpr int64_t kWord = sizeof(float) / sizeof(X);
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    fetch(u + r * co, V * kLanes * static_cast<int64_t>(sizeof(T)) / 64 + 1, 0);
    fetch(y + r * co, V * kLanes * static_cast<int64_t>(sizeof(T)) / 64 + 1, 1);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = zero();
  }
  Vec before[R][V];
  for (int64_t begin = 0; begin < ci; begin += kSummed) {
    const int64_t end = ci - begin < kSummed ? ci : begin + kSummed;
    if (begin > 0) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          before[r][v] = begin > kSummed ? before[r][v] + acc[r][v] : acc[r][v];
          acc[r][v] = zero();
        }
      }
    }
    for (int64_t k = begin; k < end; k += kWord, weight += V * kLanes) {
      Vec w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = load(weight + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec in = broadcast(x + r * ci + k);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = Product::add(in, w[v], acc[r][v]);
      }
    }
  }
  if (ci > kSummed) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = before[r][v] + acc[r][v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t at = r * co + v * kLanes;
      const Vec sum = acc[r][v] + load(bias + v * kLanes);
      if (v + 1 < V || lanes == kLanes) {
        store(y + at, load(u + at) * sum);
      } else {
        store_n(y + at, load_n(u + at, lanes) * sum, lanes);
      }
    }
  }
}

// All pixels of a tile by one block of V output vectors.
template <typename Product, int V, typename X, typename T>
void gate_block(const X* x, int64_t count, int64_t ci, const float* weight, const float* bias,
                const T* u, T* y, int64_t co, int lanes) {
  constexpr int R = gate_rows<V>();
  int64_t i = 0;
  for (; i + R <= count; i += R) {
    gate_kernel<Product, X, T, R, V>(x + i * ci, ci, weight, bias, u + i * co, y + i * co, co,
                                     lanes);
  }
  for (; i < count; ++i) {
    gate_kernel<Product, X, T, 1, V>(x + i * ci, ci, weight, bias, u + i * co, y + i * co, co,
                                     lanes);
  }
}

SDAN_INLINE const float* as_floats(const float* x, int64_t, float*) {
  return x;
}

template <typename T>
SDAN_INLINE const float* as_floats(const T* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
  if (i < n) store_n(out + i, load_n(x + i, static_cast<int>(n - i)), static_cast<int>(n - i));
  return out;
}

// Pixels [first, last) of the batch; x are their inputs.
template <typename Product, typename X, typename T>
void gate_pixels(const PointwiseGateArgs& a, const X* x, int64_t first, int64_t last) {
  constexpr int64_t kWord = sizeof(float) / sizeof(X);
  const int64_t count = last - first;
  const T* u = static_cast<const T*>(a.u) + first * a.co;
  T* y = static_cast<T*>(a.y) + first * a.co;
  const int64_t vecs = output_vecs(a.co);
  const int64_t blocks = gate_blocks(vecs);
  const int64_t words = a.ci / kWord;
  const float* bias = a.packed + vecs * kLanes * words;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = vecs * b / blocks;
    const int64_t end = vecs * (b + 1) / blocks;
    const int64_t c0 = begin * kLanes;
    const int64_t left = a.co - (end - 1) * kLanes;
    const int lanes = static_cast<int>(left < kLanes ? left : kLanes);
    const float* w = a.packed + c0 * words;
    switch (end - begin) {
      case 1:
        gate_block<Product, 1>(x, count, a.ci, w, bias + c0, u + c0, y + c0, a.co, lanes);
        break;
      case 2:
        gate_block<Product, 2>(x, count, a.ci, w, bias + c0, u + c0, y + c0, a.co, lanes);
        break;
      case 3:
        if constexpr (kGateVecs >= 3) {
          gate_block<Product, 3>(x, count, a.ci, w, bias + c0, u + c0, y + c0, a.co, lanes);
        }
        break;
      default:
        if constexpr (kGateVecs >= 4) {
          gate_block<Product, 4>(x, count, a.ci, w, bias + c0, u + c0, y + c0, a.co, lanes);
        }
        break;
    }
  }
}

template <typename T>
void tile_channels_last(const PointwiseGateArgs& a, int64_t first, int64_t last) {
  const T* x = static_cast<const T*>(a.x) + first * a.ci;
  if constexpr (kHasPairs && std::is_same_v<T, bfloat16>) {
    if (a.pairs) return gate_pixels<MultiplyPairs, T, T>(a, x, first, last);
  }
  const int64_t values = (last - first) * a.ci;
  float* scratch = nullptr;
  if (a.dtype != DType::kFloat32) {
    scratch = static_cast<float*>(thread_scratch(static_cast<size_t>(values) * sizeof(float)));
  }
  gate_pixels<MultiplyAdd, float, T>(a, as_floats(x, values, scratch), first, last);
}

template <typename T>
void run(const PointwiseGateArgs& a, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t % a.tiles * a.tile;
    const int64_t last = first + a.tile < a.pixels ? first + a.tile : a.pixels;
    if (a.channels_last) {
      tile_channels_last<T>(a, first, last);
    } else {
      tile_nchw<T>(a, t / a.tiles, first, last);
    }
  }
}

}  // namespace

void pointwise_gate_pack(const PointwiseGateArgs& args) {
  by_dtype(args.dtype, [&](auto t) { pack<decltype(t)>(args); });
}

void pointwise_gate_run(const PointwiseGateArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto t) { run<decltype(t)>(args, begin, end); });
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
