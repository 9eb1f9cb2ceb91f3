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

constexpr int kStagedVecs = 4;  // vectors of pixels that NCHW takes together

template <typename T>
void to_floats(float* out, const T* p, int64_t n, float missing) {
  for (int64_t i = 0; i < n; ++i) out[i] = p == nullptr ? missing : to_float(p[i]);
}

// V vectors of pixels of a plane each, of which `lanes` of the last are pixels. The first pass over
// the channels copies them to `staged`, `stride` floats a channel, for the other two: planes are
// often multiples of a large power of two apart, so that their lines evict each other. Meanwhile
// it asks for the same pixels of the output, the second pass for those that come next.
template <int V, typename T>
SDAN_INLINE void pixels_nchw(const LayerNormArgs& a, const T* x, T* y, int lanes, float* staged,
                             int64_t stride, const float* weight, const float* bias) {
  Statistics<V> s;
  statistics_of_planes(
      s, staged, stride, a.c, a.eps,
      [&](int64_t c) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const T* p = x + c * a.pixels + v * kLanes;
          store(staged + c * stride + v * kLanes,
                V > 1 || lanes == kLanes ? load(p) : load_n(p, lanes));
          prefetch_write(y + c * a.pixels + v * kLanes);
        }
      },
      [&](int64_t c) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) __builtin_prefetch(x + c * a.pixels + (V + v) * kLanes, 0, 2);
      });
  for (int64_t c = 0; c < a.c; ++c, staged += stride, y += a.pixels) {
    const Vec w = set1(weight[c]);
    const Vec b = set1(bias[c]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec d = (load(staged + v * kLanes) - s.mean[v]) - s.rest[v];
      const Vec z = fma(d * s.rstd[v], w, b);
      if (V > 1 || lanes == kLanes) {
        store(y + v * kLanes, z);
      } else {
        store_n(y, z, lanes);
      }
    }
  }
}

template <typename T>
void tile_nchw(const LayerNormArgs& a, int64_t image, int64_t first, int64_t last,
               const float* weight, const float* bias, float* staged) {
  const int64_t at = image * a.c * a.pixels + first;
  const int64_t n = last - first;
  constexpr int64_t kStride = staged_stride(kStagedVecs * kLanes);
  const T* x = static_cast<const T*>(a.x) + at;
  T* y = static_cast<T*>(a.y) + at;
  int64_t i = 0;
  for (; i + kStagedVecs * kLanes <= n; i += kStagedVecs * kLanes) {
    pixels_nchw<kStagedVecs>(a, x + i, y + i, kLanes, staged, kStride, weight, bias);
  }
  for (; i < n; i += kLanes) {
    const int lanes = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    pixels_nchw<1>(a, x + i, y + i, lanes, staged, kStride, weight, bias);
  }
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
  const int64_t staged_floats = a.channels_last ? 0 : a.c * staged_stride(kStagedVecs * kLanes);
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
