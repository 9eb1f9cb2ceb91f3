// Tiles of quads in shared memory: four elements of a row as one float4, which four lines, columns
// or channels beside each other are. A block's threads are quads (x) by rows (y).
#pragma once

#include "conv_tile.cuh"

namespace sdan_fast::cuda {

template <typename T>
__device__ __forceinline__ T* bytes_on(T* p, int64_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<intptr_t>(p) + bytes);
}

// Calls f with an element of the type: one branch around a loop, not one in it.
template <typename F>
__device__ __forceinline__ void with_element(DType dtype, F&& f) {
  if (dtype == DType::kFloat32)
    f(float{});
  else if (dtype == DType::kBFloat16)
    f(bfloat16{});
  else
    f(float16{});
}

// 4 elements, of which only the first `there` are: zeros for the rest.
template <bool Wide, typename T>
__device__ __forceinline__ void load_quad(const T* p, int there, float (&v)[4]) {
  SDAN_UNROLL
  for (int e = 0; e < 4; ++e) v[e] = 0;
  if constexpr (Wide) {
    if (there > 0) load<4>(p, v);
  } else {
    SDAN_UNROLL
    for (int e = 0; e < 4; ++e)
      if (e < there) v[e] = load_one(p + e);
  }
}

template <bool Wide, typename T>
__device__ __forceinline__ void store_quad(T* p, int there, const float (&v)[4]) {
  if constexpr (Wide) {
    if (there > 0) store<4>(p, v);
  } else {
    SDAN_UNROLL
    for (int e = 0; e < 4; ++e)
      if (e < there) p[e] = from_float<T>(v[e]);
  }
}

// N quads of shared memory. Written as instructions, because the compiler reads less of one that is
// not needed as a whole, and then from the same banks as its neighbours.
template <int N, int First = 0>
__device__ __forceinline__ void get_quads(const float4* p, float (&v)[4 * N]) {
  if constexpr (First < N) {
#if SDAN_DEVICE_PASS
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=f"(v[4 * First]), "=f"(v[4 * First + 1]), "=f"(v[4 * First + 2]),
                   "=f"(v[4 * First + 3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(p))), "n"(16 * First));
#else
    const float4 q = p[First];
    v[4 * First] = q.x, v[4 * First + 1] = q.y, v[4 * First + 2] = q.z, v[4 * First + 3] = q.w;
#endif
    get_quads<N, First + 1>(p, v);
  }
}

// A thread's share of a column of quads: rows threadIdx.y, + blockDim.y, ... of `count`. from: the
// first row's elements, `there` of which the image has, `next` elements to the next row's; to: the
// first row's quad, `pitch` quads to the next row's.
template <bool Wide, typename T>
__device__ __forceinline__ void stage_quads(const T* from, int64_t next, float4* to, int pitch,
                                            int count, int there) {
  constexpr int kBatch = 4;  // loads under way at a time
  const int abreast = static_cast<int>(blockDim.y);
  int i = static_cast<int>(threadIdx.y);
  from += i * next, to += i * pitch;
  const int64_t bytes = next * abreast * static_cast<int>(sizeof(T));
  SharedAddress at = shared_address(to);
  const int step = abreast * pitch * static_cast<int>(sizeof(float4));
  for (; i + (kBatch - 1) * abreast < count; i += kBatch * abreast) {
    float v[kBatch][4];
    SDAN_UNROLL
    for (int n = 0; n < kBatch; ++n) {
      load_quad<Wide>(from, there, v[n]);
      from = bytes_on(from, bytes);
    }
    SDAN_UNROLL
    for (int n = 0; n < kBatch; ++n) {
      put_shared4(at, v[n]);
      at += step;
    }
  }
  SDAN_UNROLL_BY(1)
  for (; i < count; i += abreast) {
    float v[4];
    load_quad<Wide>(from, there, v);
    put_shared4(at, v);
    from = bytes_on(from, bytes), at += step;
  }
}

// Zeros in rows [begin, end) of a column of quads.
__device__ __forceinline__ void clear_quads(float4* column, int pitch, int begin, int end) {
  const int abreast = static_cast<int>(blockDim.y), row = begin + static_cast<int>(threadIdx.y);
  const float zeros[4] = {0, 0, 0, 0};
  SharedAddress at = shared_address(column + row * pitch);
  SDAN_UNROLL_BY(1)
  for (int i = row; i < end; i += abreast) {
    put_shared4(at, zeros);
    at += abreast * pitch * static_cast<int>(sizeof(float4));
  }
}

// R rows of a thread's outputs, `next` bytes apart; `left` of them are in range.
template <bool Wide, int R, typename T>
__device__ __forceinline__ void store_quads(T* y, int64_t next, int left, int there,
                                            const float (&v)[R][4], int d = 1) {
  if (there <= 0) return;
  if (Wide && (R - 1) * d < left) {
    SDAN_UNROLL
    for (int j = 0; j < R; ++j) {
      store<4>(y, v[j]);
      y = bytes_on(y, next);
    }
    return;
  }
  SDAN_UNROLL
  for (int j = 0; j < R; ++j) {
    if (j * d < left) store_quad<Wide>(y, there, v[j]);
    y = bytes_on(y, next);
  }
}

}  // namespace sdan_fast::cuda
