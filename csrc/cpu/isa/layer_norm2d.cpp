// LayerNorm over the channels at each pixel, in both memory formats.
#include "layer_norm2d.h"

#include "by_dtype.h"
#include "layer_norm_statistics.h"
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
  Statistics<V> s;
  statistics_of_planes(
      s, x, stride, a.c, a.eps,
      [&](int64_t c) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) prefetch_write(y + c * a.pixels + v * kLanes);
      },
      [&](int64_t c) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) __builtin_prefetch(next + c * a.pixels + v * kLanes, 0, 2);
      });
  for (int64_t c = 0; c < a.c; ++c, x += stride) {
    const Vec w = set1(weight[c]);
    const Vec b = set1(bias[c]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec d = (load(x + v * kLanes) - s.mean[v]) - s.rest[v];
      store(x + v * kLanes, fma(d * s.rstd[v], w, b));
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

// G neighbouring pixels.
template <typename T, int G>
SDAN_INLINE void pixels_channels_last(const LayerNormArgs& a, const T* x, T* y, const float* weight,
                                      const float* bias, ChannelTail tail) {
  const int64_t whole = a.c - tail.lanes;
  Statistics<G> s;
  statistics_of_pixels(s, x, a.c, a.eps, tail);
  for (int64_t c = 0; c < whole; c += kLanes) {
    const Vec w = load(weight + c);
    const Vec b = load(bias + c);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const Vec d = (load(x + g * a.c + c) - s.mean[g]) - s.rest[g];
      store(y + g * a.c + c, fma(d * s.rstd[g], w, b));
    }
  }
  if (tail.lanes != 0) {
    const Vec w = load_n(weight + whole, tail.lanes);
    const Vec b = load_n(bias + whole, tail.lanes);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const Vec d = (load_n(x + g * a.c + whole, tail.lanes) - s.mean[g]) - s.rest[g];
      store_n(y + g * a.c + whole, fma(d * s.rstd[g], w, b), tail.lanes);
    }
  }
}

template <typename T>
void tile_channels_last(const LayerNormArgs& a, int64_t first, int64_t last, const float* weight,
                        const float* bias) {
  const ChannelTail tail = channel_tail(a.c);
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  int64_t i = first;
  for (; i + 4 <= last; i += 4) {
    pixels_channels_last<T, 4>(a, x + i * a.c, y + i * a.c, weight, bias, tail);
  }
  for (; i < last; ++i) {
    pixels_channels_last<T, 1>(a, x + i * a.c, y + i * a.c, weight, bias, tail);
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
