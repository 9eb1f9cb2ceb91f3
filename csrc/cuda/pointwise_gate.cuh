// What follows the product t = W x of a gated 1x1 convolution, y = u * (t + bias), and its
// gradients: element-wise, with one bias for each channel, and the bias's gradient as a sum.
//
// Forward and backward are one kernel: with the gradient g of y in the place of u it gives the
// gradient of u, g * (t + bias), and beside it that of t, g * u, and the sums of the latter over
// the pixels. Sums are taken in a fixed order: a thread's own, a block's, and sum_parts over blocks
// and images.
#pragma once

#include "device.cuh"

namespace sdan_fast::cuda {

constexpr int kGateThreads = 256;

struct GateParams {
  int64_t images, pixels;  // pixels of an image
  int32_t channels;
  int32_t splits;   // contiguous: blocks of a plane
  int32_t vectors;  // channels_last: threads of a block that share a pixel
};

// y = a * (t + bias) if y is wanted, h = a * b if h is, and sum += h.
template <int V, typename T>
__device__ __forceinline__ void gate_at(const T* a, const T* t, const T* b, T* y, T* h, int64_t i,
                                        const float (&bias)[V], float (&sum)[V]) {
  float va[V];
  load<V>(a + i, va);
  if (y) {
    float v[V];
    load<V>(t + i, v);
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) v[e] = va[e] * (v[e] + bias[e]);
    store<V>(y + i, v);
  }
  if (!b) return;
  float v[V];
  load<V>(b + i, v);
  SDAN_UNROLL
  for (int e = 0; e < V; ++e) {
    v[e] *= va[e];
    sum[e] += v[e];
  }
  if (h) store<V>(h + i, v);
}

// Contiguous tensors. V divides the pixels. partial, if not null, gets partial[plane][split].
// grid: planes * splits, or any part of it with a stride.
template <typename T, int V>
__global__ void __launch_bounds__(kGateThreads)
    gate_kernel(const T* __restrict__ a, const T* __restrict__ t, const T* __restrict__ b,
                const T* __restrict__ bias, T* __restrict__ y, T* __restrict__ h,
                float* __restrict__ partial, const GateParams p) {
  SDAN_SHARED(float, sums, [kGateThreads / 32]);
  const int64_t groups = p.pixels / V, planes = p.images * p.channels;
  const auto splits = static_cast<unsigned>(p.splits);
  int64_t plane = blockIdx.x / splits;
  unsigned split = blockIdx.x % splits;
  for (; plane < planes; plane += gridDim.x / splits, split += gridDim.x % splits) {
    if (split >= splits) {
      split -= splits;
      if (++plane >= planes) break;
    }
    const float one = bias ? load_one(bias + plane % p.channels) : 0.0f;
    float offset[V], sum[V];
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) offset[e] = one, sum[e] = 0;
    for (int64_t i = int64_t{split} * kGateThreads + threadIdx.x; i < groups;
         i += int64_t{p.splits} * kGateThreads)
      gate_at<V>(a, t, b, y, h, plane * p.pixels + i * V, offset, sum);
    if (!partial) continue;
    CarefulSum total;
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) total.add(sum[e]);
    const float of_warp = warp_sum(total);
    __syncthreads();  // the sums of the round before have been read
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = of_warp;
    __syncthreads();
    if (threadIdx.x > 0) continue;
    CarefulSum all;
    SDAN_UNROLL
    for (int i = 0; i < kGateThreads / 32; ++i) all.add(sums[i]);
    partial[plane * p.splits + split] = all.sum - all.lost;
  }
}

// channels_last tensors. V divides the channels. A block is p.vectors vectors of channels
// (blockIdx.y counts these) of as many pixels as it has threads for; partial is
// partial[blockIdx.x][channel].
template <typename T, int V>
__global__ void __launch_bounds__(kGateThreads)
    gate_last_kernel(const T* __restrict__ a, const T* __restrict__ t, const T* __restrict__ b,
                     const T* __restrict__ bias, T* __restrict__ y, T* __restrict__ h,
                     float* __restrict__ partial, const GateParams p) {
  SDAN_SHARED(float, sums, [V][kGateThreads]);
  const int rows = kGateThreads / p.vectors, row = static_cast<int>(threadIdx.x) / p.vectors;
  const int c =
      (static_cast<int>(blockIdx.y) * p.vectors + static_cast<int>(threadIdx.x) % p.vectors) * V;
  const bool live = row < rows && c < p.channels;
  float offset[V], sum[V];
  SDAN_UNROLL
  for (int e = 0; e < V; ++e) offset[e] = live && bias ? load_one(bias + c + e) : 0.0f, sum[e] = 0;
  if (live)
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * rows + row; i < p.images * p.pixels;
         i += static_cast<int64_t>(gridDim.x) * rows)
      gate_at<V>(a, t, b, y, h, i * p.channels + c, offset, sum);
  if (!partial) return;
  SDAN_UNROLL
  for (int e = 0; e < V; ++e) sums[e][threadIdx.x] = sum[e];
  __syncthreads();
  if (row > 0 || !live) return;
  SDAN_UNROLL
  for (int e = 0; e < V; ++e) {
    CarefulSum total;
    for (int i = 0; i < rows; ++i) total.add(sums[e][i * p.vectors + threadIdx.x]);
    partial[static_cast<int64_t>(blockIdx.x) * p.channels + c + e] = total.sum - total.lost;
  }
}

}  // namespace sdan_fast::cuda
