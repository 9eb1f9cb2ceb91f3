// LayerNorm over the channels of each pixel, and its gradients; statistics in two passes over
// values that are read once.
//
// The first pass finds the mean as well as float32 can hold it; the second sums what is left after
// that shift, d = x - shift, and d squared. The mean of d corrects the shift's own rounding, which
// matters where the mean is far larger than the standard deviation: normalized values are
// (d - mean of d) / deviation, and no difference of large numbers is taken twice.
//
// Contiguous tensors: a block takes 32 groups of V neighbouring pixels; its 8 warps share the
// channels, and add their sums through shared memory. channels_last tensors: a few lanes of a warp
// take one pixel. Up to kNormCached channels a warp (or vectors a lane) stay in registers; with
// more (R = 0) each pass reads them again.
#pragma once

#include "device.cuh"

namespace sdan_fast::cuda {

constexpr int kNormWarps = 8, kNormThreads = 32 * kNormWarps;
// Blocks of an SM at least. With 160 registers a thread one was alone on an SM of an H100, and
// nobody worked while it waited for memory: 20 us forward at 1x56x180x320, and 56 backward.
constexpr int kNormResident = 3, kNormBackwardResident = 2;
constexpr int kNormCached = 8;      // channels of a warp
constexpr int kNormLastCached = 4;  // vectors of a lane
constexpr int kNormLastMost = 512;  // channels of norm_backward_last, which keeps their sums

struct NormParams {
  int64_t images, pixels;  // pixels of an image
  int32_t channels;
  float eps;
};

// Calls f(i, c) for the channels c of this warp; i counts them, and is a constant if they are
// cached.
template <int R, typename F>
__device__ __forceinline__ void each_channel(int channels, F&& f) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if constexpr (R > 0) {
    SDAN_UNROLL
    for (int i = 0; i < R; ++i)
      if (warp + i * kNormWarps < channels) f(i, warp + i * kNormWarps);
  } else {
    for (int c = warp; c < channels; c += kNormWarps) f(0, c);
  }
}

// v = the sum of v over the warps, lane by lane. Callers alternate between two `part`s: the barrier
// of each call then also says that everybody has read what the call before left in the other one.
template <int V>
__device__ __forceinline__ void sum_over_warps(float (&part)[kNormWarps][V][32], float (&v)[V]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  SDAN_UNROLL
  for (int e = 0; e < V; ++e) part[warp][e][lane] = v[e];
  __syncthreads();
  SDAN_UNROLL
  for (int e = 0; e < V; ++e) {
    v[e] = 0;
    SDAN_UNROLL
    for (int w = 0; w < kNormWarps; ++w) v[e] += part[w][e][lane];
  }
}

// The values of one tensor at this thread's pixels: in registers if R > 0, else read on demand.
template <typename T, int V, int R>
struct PixelColumn {
  const T* at;  // channel 0
  int64_t step;
  bool live;
  float cache[R > 0 ? R : 1][V];

  __device__ __forceinline__ void read(int c, float (&v)[V]) const {
    if (live) {
      load<V>(at + c * step, v);
    } else {
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) v[e] = 0;
    }
  }
  __device__ __forceinline__ PixelColumn(const T* at_, int64_t step_, bool live_, int channels)
      : at(at_), step(step_), live(live_) {
    if constexpr (R > 0) each_channel<R>(channels, [&](int i, int c) { read(c, cache[i]); });
  }
  __device__ __forceinline__ void get(int i, int c, float (&v)[V]) const {
    if constexpr (R > 0) {
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) v[e] = cache[i][e];
    } else {
      read(c, v);
    }
  }
};

// What normalizes one pixel: x becomes ((x - shift) - delta) * rstd.
struct Moments {
  float shift, delta, rstd;
  __device__ __forceinline__ float operator()(float x) const {
    return ((x - shift) - delta) * rstd;
  }
};

// From the sums of d and of d * d over n channels.
__device__ __forceinline__ Moments moments(float shift, float sum, float squares, float n,
                                           float eps) {
  const float delta = sum / n;
  return Moments{shift, delta, 1.0f / sqrtf(fmaxf(squares / n - delta * delta, 0.0f) + eps)};
}

// Shared memory of `statistics`.
template <int V>
struct NormParts {
  float mean[kNormWarps][V][32], rest[kNormWarps][2 * V][32];
};

template <typename T, int V, int R>
__device__ __forceinline__ void statistics(const PixelColumn<T, V, R>& x, const NormParams& p,
                                           NormParts<V>& part, Moments (&m)[V]) {
  const float n = static_cast<float>(p.channels);
  float mean[V], sums[2 * V];
  SDAN_UNROLL
  for (int e = 0; e < V; ++e) mean[e] = sums[e] = sums[V + e] = 0;
  each_channel<R>(p.channels, [&](int i, int c) {
    float v[V];
    x.get(i, c, v);
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) mean[e] += v[e];
  });
  sum_over_warps<V>(part.mean, mean);
  SDAN_UNROLL
  for (int e = 0; e < V; ++e) mean[e] /= n;
  each_channel<R>(p.channels, [&](int i, int c) {
    float v[V];
    x.get(i, c, v);
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) {
      const float d = v[e] - mean[e];
      sums[e] += d;
      sums[V + e] = fmaf(d, d, sums[V + e]);
    }
  });
  sum_over_warps<2 * V>(part.rest, sums);
  SDAN_UNROLL
  for (int e = 0; e < V; ++e) m[e] = moments(mean[e], sums[e], sums[V + e], n, p.eps);
}

// Where the 32 groups of V pixels of a tile are. Any grid will do.
struct NormTiles {
  int64_t groups, per_image, total;
  __device__ __forceinline__ NormTiles(const NormParams& p, int v) {
    groups = p.pixels / v;
    per_image = (groups + 31) / 32;
    total = p.images * per_image;
  }
};

// V divides the pixels of an image, and the tensors are aligned to V elements.
template <typename T, int V, int R>
__global__ void __launch_bounds__(kNormThreads, kNormResident)
    norm_forward_kernel(const T* __restrict__ x, const T* __restrict__ weight,
                        const T* __restrict__ bias, T* __restrict__ y, const NormParams p) {
  SDAN_SHARED(NormParts<V>, part, [1]);
  const NormTiles tiles(p, V);
  for (int64_t tile = blockIdx.x; tile < tiles.total; tile += gridDim.x) {
    const int64_t group = tile % tiles.per_image * 32 + threadIdx.x % 32;
    const int64_t base = tile / tiles.per_image * p.channels * p.pixels + group * V;
    const PixelColumn<T, V, R> in(x + base, p.pixels, group < tiles.groups, p.channels);
    Moments m[V];
    statistics(in, p, part[0], m);
    if (!in.live) continue;
    each_channel<R>(p.channels, [&](int i, int c) {
      float v[V];
      in.get(i, c, v);
      const float w = load_one(weight + c), b = bias ? load_one(bias + c) : 0.0f;
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) v[e] = fmaf(m[e](v[e]), w, b);
      store<V>(y + base + c * p.pixels, v);
    });
  }
}

// grad_x may be null; partial, if not null, gets partial[block][channel][2]: the sums of grad *
// normalized x and of grad over the block's pixels. Dynamic shared memory: 2 * channels floats.
template <typename T, int V, int R>
__global__ void __launch_bounds__(kNormThreads, kNormBackwardResident)
    norm_backward_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                         const T* __restrict__ weight, T* __restrict__ grad_x,
                         float* __restrict__ partial, const NormParams p) {
  SDAN_SHARED(NormParts<V>, part, [1]);
  SDAN_SHARED(float, part_g, [2][kNormWarps][V][32]);
  SDAN_DYNAMIC_SHARED(raw);
  auto* sums = reinterpret_cast<float*>(raw);  // only lane 0 of a channel's warp touches its two
  const bool first_lane = threadIdx.x % 32 == 0;
  const float n = static_cast<float>(p.channels);
  each_channel<0>(p.channels, [&](int, int c) {
    if (first_lane) sums[2 * c] = sums[2 * c + 1] = 0;
  });
  const NormTiles tiles(p, V);
  for (int64_t tile = blockIdx.x; tile < tiles.total; tile += gridDim.x) {
    const int64_t group = tile % tiles.per_image * 32 + threadIdx.x % 32;
    const int64_t base = tile / tiles.per_image * p.channels * p.pixels + group * V;
    const bool live = group < tiles.groups;
    const PixelColumn<T, V, R> in(x + base, p.pixels, live, p.channels);
    const PixelColumn<T, V, R> g_in(grad + base, p.pixels, live, p.channels);
    float g_sum[V], gx_sum[V];
    Moments m[V];
    statistics(in, p, part[0], m);
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) g_sum[e] = gx_sum[e] = 0;
    each_channel<R>(p.channels, [&](int i, int c) {
      float v[V], g[V], with_x = 0, alone = 0;
      in.get(i, c, v);
      g_in.get(i, c, g);
      const float w = load_one(weight + c);
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) {
        const float normalized = m[e](v[e]);
        with_x = fmaf(g[e], normalized, with_x);
        alone += g[e];
        g_sum[e] = fmaf(g[e], w, g_sum[e]);
        gx_sum[e] = fmaf(g[e] * w, normalized, gx_sum[e]);
      }
      if (partial) {
        with_x = warp_sum(with_x);
        alone = warp_sum(alone);
        if (first_lane) sums[2 * c] += with_x, sums[2 * c + 1] += alone;
      }
    });
    if (!grad_x) continue;
    sum_over_warps<V>(part_g[0], g_sum);
    sum_over_warps<V>(part_g[1], gx_sum);
    if (!live) continue;
    each_channel<R>(p.channels, [&](int i, int c) {
      float v[V], g[V];
      in.get(i, c, v);
      g_in.get(i, c, g);
      const float w = load_one(weight + c);
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) {
        const float normalized = m[e](v[e]);
        v[e] = m[e].rstd * (g[e] * w - g_sum[e] / n - normalized * (gx_sum[e] / n));
      }
      store<V>(grad_x + base + c * p.pixels, v);
    });
  }
  if (!partial) return;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < 2 * p.channels; i += kNormThreads)
    partial[static_cast<int64_t>(blockIdx.x) * 2 * p.channels + i] = sums[i];
}

// The moments of one pixel whose channels a few lanes share. each(f) calls f(values, channel) for
// this lane's vectors, sum(v) adds over the pixel's lanes.
template <int V, typename Each, typename Sum>
__device__ __forceinline__ Moments pixel_moments(Each&& each, Sum&& sum, float n, float eps) {
  float mean = 0, first = 0, squares = 0;
  each([&](float (&v)[V], int) {
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) mean += v[e];
  });
  mean = sum(mean) / n;
  each([&](float (&v)[V], int) {
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) {
      const float d = v[e] - mean;
      first += d;
      squares = fmaf(d, d, squares);
    }
  });
  first = sum(first);
  return moments(mean, first, sum(squares), n, eps);
}

// channels_last: `lanes` (a power of two up to 32) neighbouring lanes take a pixel, V channels at a
// time. V divides the channels.
template <typename T, int V, int R>
__global__ void __launch_bounds__(kNormThreads, 1)
    norm_last_kernel(const T* __restrict__ x, const T* __restrict__ weight,
                     const T* __restrict__ bias, T* __restrict__ y, const NormParams p, int lanes) {
  const int64_t pixels = p.images * p.pixels, per_block = kNormThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes, vectors = p.channels / V;
  const float n = static_cast<float>(p.channels);
  const auto sum = [&](float v) {
    for (int d = lanes / 2; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
  };
  for (int64_t first = blockIdx.x * per_block; first < pixels; first += gridDim.x * per_block) {
    const int64_t pixel = first + static_cast<int>(threadIdx.x) / lanes;
    const bool live = pixel < pixels;
    const T* at = x + pixel * p.channels;
    float cache[R > 0 ? R : 1][V];
    const auto each = [&](auto&& f) {  // f(values, channel)
      if constexpr (R > 0) {
        SDAN_UNROLL
        for (int i = 0; i < R; ++i)
          if (live && lane + i * lanes < vectors) f(cache[i], (lane + i * lanes) * V);
      } else {
        for (int k = lane; live && k < vectors; k += lanes) {
          load<V>(at + k * V, cache[0]);
          f(cache[0], k * V);
        }
      }
    };
    if constexpr (R > 0) each([&](float (&v)[V], int c) { load<V>(at + c, v); });
    const Moments m = pixel_moments<V>(each, sum, n, p.eps);
    each([&](float (&v)[V], int c) {
      float o[V];
      SDAN_UNROLL
      for (int e = 0; e < V; ++e)
        o[e] = fmaf(m(v[e]), load_one(weight + c + e), bias ? load_one(bias + c + e) : 0.0f);
      store<V>(y + pixel * p.channels + c, o);
    });
  }
}

// channels_last, R vectors of a lane at most; the same arguments as norm_backward_kernel's. A lane
// sees the same channels at every pixel, and keeps their sums. Dynamic shared memory: 2 * channels
// floats for each pixel of a block.
template <typename T, int V, int R>
__global__ void __launch_bounds__(kNormThreads, 1)
    norm_backward_last_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                              const T* __restrict__ weight, T* __restrict__ grad_x,
                              float* __restrict__ partial, const NormParams p, int lanes) {
  SDAN_DYNAMIC_SHARED(raw);
  auto* sums = reinterpret_cast<float*>(raw);  // [pixel of the block][2][channel]
  const int64_t pixels = p.images * p.pixels, per_block = kNormThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes, vectors = p.channels / V;
  const float n = static_cast<float>(p.channels);
  const auto sum = [&](float v) {
    for (int d = lanes / 2; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
  };
  float with_x[R][V], alone[R][V];
  SDAN_UNROLL
  for (int i = 0; i < R; ++i) {
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) with_x[i][e] = alone[i][e] = 0;
  }
  for (int64_t first = blockIdx.x * per_block; first < pixels; first += gridDim.x * per_block) {
    const int64_t pixel = first + static_cast<int>(threadIdx.x) / lanes;
    const bool live = pixel < pixels;
    const int64_t at = pixel * p.channels;
    float xs[R][V], gs[R][V];
    const auto each_vector = [&](auto&& f) {  // f(i, channel)
      SDAN_UNROLL
      for (int i = 0; i < R; ++i)
        if (live && lane + i * lanes < vectors) f(i, (lane + i * lanes) * V);
    };
    each_vector([&](int i, int c) {
      load<V>(x + at + c, xs[i]);
      load<V>(grad + at + c, gs[i]);
    });
    const auto each = [&](auto&& f) { each_vector([&](int i, int c) { f(xs[i], c); }); };
    const Moments m = pixel_moments<V>(each, sum, n, p.eps);
    float g_sum = 0, gx_sum = 0;
    each_vector([&](int i, int c) {
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) {
        const float normalized = m(xs[i][e]), g = gs[i][e];
        with_x[i][e] = fmaf(g, normalized, with_x[i][e]);
        alone[i][e] += g;
        gs[i][e] = g * load_one(weight + c + e);
        g_sum += gs[i][e];
        gx_sum = fmaf(gs[i][e], normalized, gx_sum);
        xs[i][e] = normalized;
      }
    });
    if (!grad_x) continue;
    const float g_mean = sum(g_sum) / n, gx_mean = sum(gx_sum) / n;
    each_vector([&](int i, int c) {
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) xs[i][e] = m.rstd * (gs[i][e] - g_mean - xs[i][e] * gx_mean);
      store<V>(grad_x + at + c, xs[i]);
    });
  }
  if (!partial) return;
  const int groups = kNormThreads / lanes, group = static_cast<int>(threadIdx.x) / lanes;
  SDAN_UNROLL
  for (int i = 0; i < R; ++i) {
    if (lane + i * lanes >= vectors) continue;
    float* to = sums + group * 2 * p.channels;
    put_vector<V>(to, lane + i * lanes, with_x[i]);
    put_vector<V>(to + p.channels, lane + i * lanes, alone[i]);
  }
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < 2 * p.channels; c += kNormThreads) {
    float total = 0;
    for (int k = 0; k < groups; ++k) total += sums[k * 2 * p.channels + c];
    partial[(static_cast<int64_t>(blockIdx.x) * p.channels + c % p.channels) * 2 + c / p.channels] =
        total;
  }
}

}  // namespace sdan_fast::cuda
