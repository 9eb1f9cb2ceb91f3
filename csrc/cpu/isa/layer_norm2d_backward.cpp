// The gradients of LayerNorm over the channels, in one pass over memory in both memory formats: the
// statistics are computed again from x, as the forward does.
//
// A tile of pixels of g and x stays in a cache between four passes over it: two for the
// statistics, one for the sums of w g and w g z over the channels, one for grad_x.
#include "layer_norm2d_backward.h"

#include "by_dtype.h"
#include "layer_norm_statistics.h"
#include "planes.h"
#include "prefetch.h"
#include "sum_parts.h"
#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

// a b, rounded before it is added to anything: a compiler that contracts products and sums would do
// so in one of w g and its mean, and their difference, which is zero for one channel, would not be.
SDAN_INLINE Vec product(Vec a, Vec b) {
  return fma(a, b, zero());
}

// V vectors of pixels of the staged tiles g and x, whose channels are `stride` floats apart: grad_x
// in place of g, z in place of x. sum_gz and sum_g have a vector for each channel. While it
// computes, it asks for what will be moved next: the same pixels of grad_x, `to`, and of the next
// tile, `next_g` and `next_x`.
template <int V, bool kInput, bool kSums, typename T>
SDAN_INLINE void pixels_nchw(const LayerNormBackwardArgs& a, float* g, float* x, int64_t stride,
                             const float* weight, float* sum_gz, float* sum_g, const T* to,
                             const T* next_g, const T* next_x) {
  Statistics<V> s;
  statistics_of_planes(
      s, x, stride, a.c, a.eps,
      [&](int64_t c) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          if constexpr (kInput) prefetch_write(to + c * a.pixels + v * kLanes);
        }
      },
      [&](int64_t c) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) __builtin_prefetch(next_x + c * a.pixels + v * kLanes, 0, 2);
      });
  Vec mean_wg[V], mean_wgz[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) mean_wg[v] = mean_wgz[v] = zero();
  for (int64_t c = 0; c < a.c;) {
    const int64_t end = c + kChainChannels < a.c ? c + kChainChannels : a.c;
    Vec part_wg[V], part_wgz[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) part_wg[v] = part_wgz[v] = zero();
    for (; c < end; ++c) {
      const Vec w = set1(weight[c]);
      Vec gz = zero(), all_g = zero();
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        __builtin_prefetch(next_g + c * a.pixels + v * kLanes, 0, 2);
        const Vec here = load(g + c * stride + v * kLanes);
        float* at = x + c * stride + v * kLanes;
        const Vec z = ((load(at) - s.mean[v]) - s.rest[v]) * s.rstd[v];
        if constexpr (kInput) {
          store(at, z);
          const Vec wg = product(w, here);
          part_wg[v] = part_wg[v] + wg;
          part_wgz[v] = fma(wg, z, part_wgz[v]);
        }
        if constexpr (kSums) {
          gz = fma(here, z, gz);
          all_g = all_g + here;
        }
      }
      if constexpr (kSums) {
        store(sum_gz + c * kLanes, load(sum_gz + c * kLanes) + gz);
        store(sum_g + c * kLanes, load(sum_g + c * kLanes) + all_g);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      mean_wg[v] = mean_wg[v] + part_wg[v];
      mean_wgz[v] = mean_wgz[v] + part_wgz[v];
    }
  }
  if constexpr (!kInput) return;
  const Vec scale = set1(1.0f / static_cast<float>(a.c));
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    mean_wg[v] = mean_wg[v] * scale;
    mean_wgz[v] = mean_wgz[v] * scale;
  }
  for (int64_t c = 0; c < a.c; ++c, g += stride, x += stride) {
    const Vec w = set1(weight[c]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec d = product(w, load(g + v * kLanes)) - mean_wg[v];
      store(g + v * kLanes, fnma(load(x + v * kLanes), mean_wgz[v], d) * s.rstd[v]);
    }
  }
}

template <typename T, bool kInput, bool kSums>
void tile_nchw(const LayerNormBackwardArgs& a, int64_t image, int64_t first, int64_t last,
               const float* weight, float* sum_gz, float* sum_g, float* staged) {
  const int64_t at = image * a.c * a.pixels + first;
  const int64_t n = last - first;
  const int64_t stride = staged_stride(n);
  const T* g = static_cast<const T*>(a.grad) + at;
  const T* x = static_cast<const T*>(a.x) + at;
  T* to = static_cast<T*>(a.grad_x) + at;
  float* staged_g = staged + a.c * stride;
  stage_planes(staged, stride, x, a.pixels, a.c, n);
  stage_planes(staged_g, stride, g, a.pixels, a.c, n);
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    pixels_nchw<4, kInput, kSums>(a, staged_g + i, staged + i, stride, weight, sum_gz, sum_g,
                                  to + i, g + n + i, x + n + i);
  }
  for (; i < n; i += kLanes) {
    pixels_nchw<1, kInput, kSums>(a, staged_g + i, staged + i, stride, weight, sum_gz, sum_g,
                                  to + i, g + n + i, x + n + i);
  }
  if constexpr (kInput) {
    write_planes(to, a.pixels, a.c, n,
                 [&](int64_t c, int64_t k, int)
                     __attribute__((always_inline)) { return load(staged_g + c * stride + k); });
  }
}

// G neighbouring pixels. sum_gz and sum_g have a number for each channel, up to a whole vector.
template <typename T, int G, bool kInput, bool kSums>
SDAN_INLINE void pixels_channels_last(const LayerNormBackwardArgs& a, const T* g, const T* x, T* to,
                                      const float* weight, float* sum_gz, float* sum_g,
                                      ChannelTail tail) {
  const int64_t whole = a.c - tail.lanes;
  Statistics<G> s;
  statistics_of_pixels(s, x, a.c, a.eps, tail);
  Vec mean_wg[G], mean_wgz[G];
#pragma GCC unroll 4
  for (int k = 0; k < G; ++k) mean_wg[k] = mean_wgz[k] = zero();
  const auto add = [&](int64_t c, const auto& read) __attribute__((always_inline)) {
    const Vec w = load(weight + c);
    Vec gz = zero(), all_g = zero();
#pragma GCC unroll 4
    for (int k = 0; k < G; ++k) {
      const Vec here = read(g + k * a.c + c);
      const Vec z = ((read(x + k * a.c + c) - s.mean[k]) - s.rest[k]) * s.rstd[k];
      if constexpr (kInput) {
        const Vec wg = product(w, here);
        mean_wg[k] = mean_wg[k] + wg;
        mean_wgz[k] = fma(wg, z, mean_wgz[k]);
      }
      if constexpr (kSums) {
        gz = fma(here, z, gz);
        all_g = all_g + here;
      }
    }
    if constexpr (kSums) {
      store(sum_gz + c, load(sum_gz + c) + gz);
      store(sum_g + c, load(sum_g + c) + all_g);
    }
  };
  const auto read_whole = [](const T* p) __attribute__((always_inline)) { return load(p); };
  const auto read_tail = [&](const T* p)
                             __attribute__((always_inline)) { return load_n(p, tail.lanes); };
  for (int64_t c = 0; c < whole; c += kLanes) add(c, read_whole);
  if (tail.lanes != 0) add(whole, read_tail);
  if constexpr (!kInput) return;
  const float scale = 1.0f / static_cast<float>(a.c);
#pragma GCC unroll 4
  for (int k = 0; k < G; ++k) {
    mean_wg[k] = set1(hsum(mean_wg[k]) * scale);
    mean_wgz[k] = set1(hsum(mean_wgz[k]) * scale);
  }
  const auto value = [&](int64_t c, int k, const auto& read) __attribute__((always_inline)) {
    const Vec z = ((read(x + k * a.c + c) - s.mean[k]) - s.rest[k]) * s.rstd[k];
    const Vec d = product(load(weight + c), read(g + k * a.c + c)) - mean_wg[k];
    return fnma(z, mean_wgz[k], d) * s.rstd[k];
  };
  for (int64_t c = 0; c < whole; c += kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < G; ++k) store(to + k * a.c + c, value(c, k, read_whole));
  }
  if (tail.lanes != 0) {
#pragma GCC unroll 4
    for (int k = 0; k < G; ++k) {
      store_n(to + k * a.c + whole, value(whole, k, read_tail), tail.lanes);
    }
  }
}

template <typename T, bool kInput, bool kSums>
void tile_channels_last(const LayerNormBackwardArgs& a, int64_t first, int64_t last,
                        const float* weight, float* sum_gz, float* sum_g) {
  const ChannelTail tail = channel_tail(a.c);
  const T* g = static_cast<const T*>(a.grad);
  const T* x = static_cast<const T*>(a.x);
  T* to = static_cast<T*>(a.grad_x);
  int64_t i = first;
  for (; i + 4 <= last; i += 4) {
    pixels_channels_last<T, 4, kInput, kSums>(a, g + i * a.c, x + i * a.c, to + i * a.c, weight,
                                              sum_gz, sum_g, tail);
  }
  for (; i < last; ++i) {
    pixels_channels_last<T, 1, kInput, kSums>(a, g + i * a.c, x + i * a.c, to + i * a.c, weight,
                                              sum_gz, sum_g, tail);
  }
}

template <typename T, bool kInput, bool kSums>
void run(const LayerNormBackwardArgs& a, int64_t begin, int64_t end) {
  const int64_t padded = (a.c + kLanes - 1) / kLanes * kLanes;
  const int64_t staged_floats =
      a.channels_last ? 0 : 2 * a.c * staged_stride(a.tile < a.pixels ? a.tile : a.pixels);
  const int64_t sum_floats = a.channels_last ? padded : a.c * kLanes;
  float* staged = static_cast<float*>(
      thread_scratch(static_cast<size_t>(staged_floats + padded + 2 * sum_floats) * sizeof(float)));
  float* weight = staged + staged_floats;
  float* sum_gz = weight + padded;
  float* sum_g = sum_gz + sum_floats;
  for (int64_t c = 0; c < padded; ++c) {
    weight[c] = c < a.c ? to_float(static_cast<const T*>(a.weight)[c]) : 0.0f;
  }
  for (int64_t part = begin; part < end; ++part) {
    if constexpr (kSums) {
      for (int64_t i = 0; i < 2 * sum_floats; ++i) sum_gz[i] = 0.0f;
    }
    const int64_t stop = (part + 1) * a.part < a.all_tiles ? (part + 1) * a.part : a.all_tiles;
    for (int64_t t = part * a.part; t < stop; ++t) {
      const int64_t first = t % a.tiles * a.tile;
      const int64_t last = first + a.tile < a.pixels ? first + a.tile : a.pixels;
      if (a.channels_last) {
        tile_channels_last<T, kInput, kSums>(a, first, last, weight, sum_gz, sum_g);
      } else {
        tile_nchw<T, kInput, kSums>(a, t / a.tiles, first, last, weight, sum_gz, sum_g, staged);
      }
    }
    if constexpr (kSums) {
      float* partial = a.partial + part * 2 * a.c;
      for (int64_t c = 0; c < a.c; ++c) {
        partial[c] = a.channels_last ? sum_gz[c] : hsum(load(sum_gz + c * kLanes));
        partial[a.c + c] = a.channels_last ? sum_g[c] : hsum(load(sum_g + c * kLanes));
      }
    }
  }
}

}  // namespace

void layer_norm2d_backward_run(const LayerNormBackwardArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    if (args.partial == nullptr) {
      run<T, true, false>(args, begin, end);
    } else if (args.grad_x == nullptr) {
      run<T, false, true>(args, begin, end);
    } else {
      run<T, true, true>(args, begin, end);
    }
  });
}

void layer_norm2d_backward_sum(const LayerNormBackwardArgs& args) {
  by_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    const auto sum = [&](int64_t which, void* out) {
      if (out == nullptr) return;
      sum_parts(args.partial + which * args.c, 2 * args.c, args.parts, args.c,
                static_cast<T*>(out));
    };
    sum(0, args.grad_weight);
    sum(1, args.grad_bias);
  });
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
