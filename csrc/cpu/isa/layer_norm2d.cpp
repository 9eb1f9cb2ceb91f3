// LayerNorm over the channels at each pixel, in both memory formats.
//
// Two passes for the statistics, the second one also summing the deviations: what the first mean lost to
// rounding is then known and put back, so a large common offset of the channels costs no accuracy.
#include "layer_norm2d.h"

#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

template <typename T>
void to_floats(float* out, const T* p, int64_t n, float missing) {
  for (int64_t i = 0; i < n; ++i) out[i] = p == nullptr ? missing : to_float(p[i]);
}

// V vectors of neighbouring pixels of one plane; `n` pixels of the last vector count.
template <typename T, int V>
SDAN_INLINE void pixels_nchw(const LayerNormArgs& a, const T* x, T* y, const float* weight,
                             const float* bias, int n) {
  const auto get = [n](const T* p, int v) __attribute__((always_inline)) {
    return V == 1 && n < kLanes ? load_n(p, n) : load(p + v * kLanes);
  };
  const Vec scale = set1(1.0f / static_cast<float>(a.c));
  Vec mean[V], square[V], rest[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) mean[v] = square[v] = rest[v] = zero();
  const T* p = x;
  for (int64_t c = 0; c < a.c; ++c, p += a.pixels) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) mean[v] = mean[v] + get(p, v);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) mean[v] = mean[v] * scale;
  p = x;
  for (int64_t c = 0; c < a.c; ++c, p += a.pixels) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec d = get(p, v) - mean[v];
      rest[v] = rest[v] + d;
      square[v] = fma(d, d, square[v]);
    }
  }
  Vec rstd[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    rest[v] = rest[v] * scale;
    const Vec variance = max(zero(), fnma(rest[v], rest[v], square[v] * scale));
    rstd[v] = set1(1.0f) / sqrt(variance + set1(a.eps));
  }
  p = x;
  for (int64_t c = 0; c < a.c; ++c, p += a.pixels, y += a.pixels) {
    const Vec w = set1(weight[c]);
    const Vec b = set1(bias[c]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec d = (get(p, v) - mean[v]) - rest[v];
      const Vec out = fma(d * rstd[v], w, b);
      if (V == 1 && n < kLanes) {
        store_n(y, out, n);
      } else {
        store(y + v * kLanes, out);
      }
    }
  }
}

template <typename T>
void tile_nchw(const LayerNormArgs& a, int64_t image, int64_t first, int64_t last, const float* weight,
               const float* bias) {
  const int64_t base = image * a.c * a.pixels;
  const T* x = static_cast<const T*>(a.x) + base;
  T* y = static_cast<T*>(a.y) + base;
  int64_t i = first;
  for (; i + 4 * kLanes <= last; i += 4 * kLanes) {
    pixels_nchw<T, 4>(a, x + i, y + i, weight, bias, kLanes);
  }
  for (; i < last; i += kLanes) {
    const int n = static_cast<int>(last - i < kLanes ? last - i : kLanes);
    pixels_nchw<T, 1>(a, x + i, y + i, weight, bias, n);
  }
}

template <typename T>
void tile_channels_last(const LayerNormArgs& a, int64_t first, int64_t last, const float* weight,
                        const float* bias) {
  const float scale = 1.0f / static_cast<float>(a.c);
  const int tail = static_cast<int>(a.c % kLanes);
  const int64_t whole = a.c - tail;
  for (int64_t i = first; i < last; ++i) {
    const T* x = static_cast<const T*>(a.x) + i * a.c;
    T* y = static_cast<T*>(a.y) + i * a.c;
    Vec sum = zero();
    for (int64_t c = 0; c < whole; c += kLanes) sum = sum + load(x + c);
    if (tail != 0) sum = sum + load_n(x + whole, tail);
    const Vec mean = set1(hsum(sum) * scale);
    Vec square = zero();
    Vec rest = zero();
    for (int64_t c = 0; c < whole; c += kLanes) {
      const Vec d = load(x + c) - mean;
      rest = rest + d;
      square = fma(d, d, square);
    }
    if (tail != 0) {
      // The lanes past the last channel must not count: give them the mean's own value.
      float t[kLanes];
      store(t, load_n(x + whole, tail) - mean);
      for (int l = tail; l < kLanes; ++l) t[l] = 0.0f;
      const Vec d = load(t);
      rest = rest + d;
      square = fma(d, d, square);
    }
    const Vec residue = set1(hsum(rest) * scale);
    const Vec variance = max(zero(), fnma(residue, residue, set1(hsum(square) * scale)));
    const Vec rstd = set1(1.0f) / sqrt(variance + set1(a.eps));
    for (int64_t c = 0; c < whole; c += kLanes) {
      const Vec d = (load(x + c) - mean) - residue;
      store(y + c, fma(d * rstd, load(weight + c), load(bias + c)));
    }
    if (tail != 0) {
      const Vec d = (load_n(x + whole, tail) - mean) - residue;
      store_n(y + whole, fma(d * rstd, load_n(weight + whole, tail), load_n(bias + whole, tail)), tail);
    }
  }
}

template <typename T>
void run(const LayerNormArgs& a, int64_t begin, int64_t end) {
  float* weight = static_cast<float*>(thread_scratch(static_cast<size_t>(2 * a.c) * sizeof(float)));
  float* bias = weight + a.c;
  to_floats(weight, static_cast<const T*>(a.weight), a.c, 1.0f);
  to_floats(bias, static_cast<const T*>(a.bias), a.c, 0.0f);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t % a.tiles * a.tile;
    const int64_t last = first + a.tile < a.pixels ? first + a.tile : a.pixels;
    if (a.channels_last) {
      tile_channels_last<T>(a, first, last, weight, bias);
    } else {
      tile_nchw<T>(a, t / a.tiles, first, last, weight, bias);
    }
  }
}

}  // namespace

void layer_norm2d_run(const LayerNormArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return run<float>(args, begin, end);
    case DType::kBFloat16:
      return run<bfloat16>(args, begin, end);
    default:
      return run<float16>(args, begin, end);
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
