// LayerNorm over the channels at each pixel, in both memory formats.
//
// Two passes for the statistics, the second one also summing the deviations: what the first mean
// lost to rounding is then known and put back, so a large common offset of the channels costs no
// accuracy.
#include "layer_norm2d.h"

#include "by_dtype.h"
#include "planes.h"
#include "prefetch.h"
#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

template <typename T>
void to_floats(float* out, const T* p, int64_t n, float missing) {
  for (int64_t i = 0; i < n; ++i) out[i] = p == nullptr ? missing : to_float(p[i]);
}

// V vectors of pixels of a staged tile, whose channels are `stride` floats apart, in place. While
// it computes, it asks for what will be moved next: the same pixels of the output, y, and of the
// next tile, `next`.
template <int V, typename T>
SDAN_INLINE void pixels_nchw(const LayerNormArgs& a, float* x, int64_t stride, const float* weight,
                             const float* bias, const T* y, const T* next) {
  const Vec scale = set1(1.0f / static_cast<float>(a.c));
  // Partial sums of kChunk channels: one long chain of additions would lose the square root of its
  // length.
  constexpr int64_t kChunk = 32;
  Vec mean[V], square[V], rest[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) mean[v] = square[v] = rest[v] = zero();
  const float* p = x;
  for (int64_t c = 0; c < a.c;) {
    const int64_t end = c + kChunk < a.c ? c + kChunk : a.c;
    Vec part[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) part[v] = zero();
    for (; c < end; ++c, p += stride, y += a.pixels) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        prefetch_write(y + v * kLanes);
        part[v] = part[v] + load(p + v * kLanes);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) mean[v] = mean[v] + part[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) mean[v] = mean[v] * scale;
  p = x;
  for (int64_t c = 0; c < a.c;) {
    const int64_t end = c + kChunk < a.c ? c + kChunk : a.c;
    Vec part[V], part_square[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) part[v] = part_square[v] = zero();
    for (; c < end; ++c, p += stride, next += a.pixels) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        __builtin_prefetch(next + v * kLanes, 0, 2);
        const Vec d = load(p + v * kLanes) - mean[v];
        part[v] = part[v] + d;
        part_square[v] = fma(d, d, part_square[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      rest[v] = rest[v] + part[v];
      square[v] = square[v] + part_square[v];
    }
  }
  Vec rstd[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    rest[v] = rest[v] * scale;
    const Vec variance = max(zero(), fnma(rest[v], rest[v], square[v] * scale));
    rstd[v] = set1(1.0f) / sqrt(variance + set1(a.eps));
  }
  for (int64_t c = 0; c < a.c; ++c, x += stride) {
    const Vec w = set1(weight[c]);
    const Vec b = set1(bias[c]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec d = (load(x + v * kLanes) - mean[v]) - rest[v];
      store(x + v * kLanes, fma(d * rstd[v], w, b));
    }
  }
}

template <typename T>
void tile_nchw(const LayerNormArgs& a, int64_t image, int64_t first, int64_t last,
               const float* weight, const float* bias, float* staged) {
  const int64_t at = image * a.c * a.pixels + first;
  const int64_t n = last - first;
  const int64_t stride = staged_stride(n);
  const T* x = static_cast<const T*>(a.x) + at;
  T* y = static_cast<T*>(a.y) + at;
  stage_planes(staged, stride, x, a.pixels, a.c, n);
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    pixels_nchw<4>(a, staged + i, stride, weight, bias, y + i, x + n + i);
  }
  for (; i < n; i += kLanes) {
    pixels_nchw<1>(a, staged + i, stride, weight, bias, y + i, x + n + i);
  }
  write_planes(y, a.pixels, a.c, n, [&](int64_t c, int64_t k, int) __attribute__((always_inline)) {
    return load(staged + c * stride + k);
  });
}

// G neighbouring pixels, whose sums are independent chains. `valid` is one in the lanes of the
// last, partial vector that hold a channel, else zero: the others must not count as deviations.
template <typename T, int G>
SDAN_INLINE void pixels_channels_last(const LayerNormArgs& a, const T* x, T* y, const float* weight,
                                      const float* bias, Vec valid, int tail) {
  const float scale = 1.0f / static_cast<float>(a.c);
  const int64_t whole = a.c - tail;
  Vec mean[G], square[G], rest[G];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) mean[g] = square[g] = rest[g] = zero();
  for (int64_t c = 0; c < whole; c += kLanes) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) mean[g] = mean[g] + load(x + g * a.c + c);
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
    if (tail != 0) mean[g] = mean[g] + load_n(x + g * a.c + whole, tail);
    mean[g] = set1(hsum(mean[g]) * scale);
  }
  for (int64_t c = 0; c < whole; c += kLanes) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const Vec d = load(x + g * a.c + c) - mean[g];
      rest[g] = rest[g] + d;
      square[g] = fma(d, d, square[g]);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
    if (tail != 0) {
      const Vec d = (load_n(x + g * a.c + whole, tail) - mean[g]) * valid;
      rest[g] = rest[g] + d;
      square[g] = fma(d, d, square[g]);
    }
    rest[g] = set1(hsum(rest[g]) * scale);
    const Vec variance = max(zero(), fnma(rest[g], rest[g], set1(hsum(square[g]) * scale)));
    square[g] = set1(1.0f) / sqrt(variance + set1(a.eps));  // from here on 1 / std
  }
  for (int64_t c = 0; c < whole; c += kLanes) {
    const Vec w = load(weight + c);
    const Vec b = load(bias + c);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const Vec d = (load(x + g * a.c + c) - mean[g]) - rest[g];
      store(y + g * a.c + c, fma(d * square[g], w, b));
    }
  }
  if (tail != 0) {
    const Vec w = load_n(weight + whole, tail);
    const Vec b = load_n(bias + whole, tail);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const Vec d = (load_n(x + g * a.c + whole, tail) - mean[g]) - rest[g];
      store_n(y + g * a.c + whole, fma(d * square[g], w, b), tail);
    }
  }
}

template <typename T>
void tile_channels_last(const LayerNormArgs& a, int64_t first, int64_t last, const float* weight,
                        const float* bias) {
  const int tail = static_cast<int>(a.c % kLanes);
  float lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = l < tail ? 1.0f : 0.0f;
  const Vec valid = load(lanes);
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  int64_t i = first;
  for (; i + 4 <= last; i += 4) {
    pixels_channels_last<T, 4>(a, x + i * a.c, y + i * a.c, weight, bias, valid, tail);
  }
  for (; i < last; ++i) {
    pixels_channels_last<T, 1>(a, x + i * a.c, y + i * a.c, weight, bias, valid, tail);
  }
}

template <typename T>
void run(const LayerNormArgs& a, int64_t begin, int64_t end) {
  const int64_t staged_floats =
      a.channels_last ? 0 : a.c * staged_stride(a.tile < a.pixels ? a.tile : a.pixels);
  float* staged = static_cast<float*>(
      thread_scratch(static_cast<size_t>(staged_floats + 2 * a.c) * sizeof(float)));
  float* weight = staged + staged_floats;
  float* bias = weight + a.c;
  to_floats(weight, static_cast<const T*>(a.weight), a.c, 1.0f);
  to_floats(bias, static_cast<const T*>(a.bias), a.c, 0.0f);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t % a.tiles * a.tile;
    const int64_t last = first + a.tile < a.pixels ? first + a.tile : a.pixels;
    if (a.channels_last) {
      tile_channels_last<T>(a, first, last, weight, bias);
    } else {
      tile_nchw<T>(a, t / a.tiles, first, last, weight, bias, staged);
    }
  }
}

}  // namespace

void layer_norm2d_run(const LayerNormArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto t) { run<decltype(t)>(args, begin, end); });
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
