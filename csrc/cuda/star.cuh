// The star, y = outer(activation(a) * b), and its gradients: element-wise, so memory-bound and
// blind to the layout.
#pragma once

#include "activation.cuh"
#include "device.cuh"

namespace sdan_fast::cuda {

constexpr int kStarThreads = 256;

// One group of N elements. All pointers name the first of them.
template <int N, typename T>
__device__ __forceinline__ void star_forward_at(const T* a, const T* b, T* y, int activation,
                                                int outer) {
  float va[N], vb[N];
  load<N>(a, va);
  load<N>(b, vb);
  activate<is_16bit<T>>(activation, va);
  SDAN_UNROLL
  for (int i = 0; i < N; ++i) va[i] *= vb[i];
  activate<is_16bit<T>>(outer, va);
  store<N>(y, va);
}

// From g, the gradient of y, the values a and b: b becomes the gradient of a, and a that of b.
template <bool Coarse, int N>
__device__ __forceinline__ void star_gradients(float (&g)[N], float (&a)[N], float (&b)[N],
                                               int activation, int outer) {
  if (outer != kNone) {
    float s[N];
    SDAN_UNROLL
    for (int i = 0; i < N; ++i) s[i] = a[i];
    activate<Coarse>(activation, s);
    SDAN_UNROLL
    for (int i = 0; i < N; ++i) s[i] *= b[i];
    activate_backward<Coarse>(outer, s, g);  // g is now the gradient of activation(a) * b
  }
  SDAN_UNROLL
  for (int i = 0; i < N; ++i) b[i] *= g[i];
  activate_backward<Coarse>(activation, a, b);  // b = g b f'(a), a = f(a)
  SDAN_UNROLL
  for (int i = 0; i < N; ++i) a[i] *= g[i];
}

// grad_a and grad_b may be null.
template <int N, typename T>
__device__ __forceinline__ void star_backward_at(const T* grad, const T* a, const T* b, T* grad_a,
                                                 T* grad_b, int activation, int outer) {
  float g[N], va[N], vb[N];
  load<N>(grad, g);
  load<N>(a, va);
  load<N>(b, vb);
  star_gradients<is_16bit<T>>(g, va, vb, activation, outer);
  if (grad_a) store<N>(grad_a, vb);
  if (grad_b) store<N>(grad_b, va);
}

// n elements. Groups of N are read at once: all pointers are then aligned to N sizeof(T) bytes; the
// n % N last elements go one by one. Any grid of kStarThreads-thread blocks will do.
template <typename T, int N>
__global__ void __launch_bounds__(kStarThreads)
    star_forward_kernel(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ y,
                        int64_t n, int activation, int outer) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kStarThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kStarThreads, groups = n / N;
  for (int64_t i = first; i < groups; i += stride)
    star_forward_at<N>(a + i * N, b + i * N, y + i * N, activation, outer);
  if constexpr (N > 1) {
    const int64_t i = groups * N + first;
    if (i < n) star_forward_at<1>(a + i, b + i, y + i, activation, outer);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kStarThreads)
    star_backward_kernel(const T* __restrict__ grad, const T* __restrict__ a,
                         const T* __restrict__ b, T* __restrict__ grad_a, T* __restrict__ grad_b,
                         int64_t n, int activation, int outer) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kStarThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kStarThreads, groups = n / N;
  for (int64_t i = first; i < groups; i += stride) {
    const int64_t o = i * N;
    star_backward_at<N>(grad + o, a + o, b + o, grad_a ? grad_a + o : nullptr,
                        grad_b ? grad_b + o : nullptr, activation, outer);
  }
  if constexpr (N > 1) {
    const int64_t i = groups * N + first;
    if (i < n)
      star_backward_at<1>(grad + i, a + i, b + i, grad_a ? grad_a + i : nullptr,
                          grad_b ? grad_b + i : nullptr, activation, outer);
  }
}

}  // namespace sdan_fast::cuda
