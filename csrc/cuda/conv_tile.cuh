// What the convolution kernels share: pieces of a tile between global memory, registers and shared
// memory.
#pragma once

#include "device.cuh"
#include "launches.h"

namespace sdan_fast::cuda {

// A place in shared memory, in bytes, to add to.
#if SDAN_DEVICE_PASS
using SharedAddress = unsigned;
#else
using SharedAddress = uintptr_t;
#endif

__device__ __forceinline__ SharedAddress shared_address(const void* p) {
#if SDAN_DEVICE_PASS
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
#else
  return reinterpret_cast<uintptr_t>(p);
#endif
}

// 4 floats to shared memory. Written as an instruction, because the compiler takes a vector store
// apart now and then.
__device__ __forceinline__ void put_shared4(SharedAddress p, float4 v) {
#if SDAN_DEVICE_PASS
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(p), "f"(v.x), "f"(v.y), "f"(v.z),
               "f"(v.w)
               : "memory");
#else
  *reinterpret_cast<float4*>(p) = v;
#endif
}

__device__ __forceinline__ void put_shared4(float* p, float4 v) {
  put_shared4(shared_address(p), v);
}

__device__ __forceinline__ void put_shared4(SharedAddress p, const float (&v)[4]) {
  float4 a;
  a.x = v[0], a.y = v[1], a.z = v[2], a.w = v[3];
  put_shared4(p, a);
}

// N floats between registers and shared memory, in pieces of 4. Of 8, every other group of 4 lanes
// starts with the second half, which keeps lanes that are 8 floats apart off each other's banks.
template <int N>
__device__ __forceinline__ void put_shared(float* p, const float (&v)[N]) {
  if constexpr (N == 8) {
    const int first = (threadIdx.x >> 2 & 1) * 4;
    float4 a, b;
    a.x = first ? v[4] : v[0], a.y = first ? v[5] : v[1], a.z = first ? v[6] : v[2],
    a.w = first ? v[7] : v[3];
    b.x = first ? v[0] : v[4], b.y = first ? v[1] : v[5], b.z = first ? v[2] : v[6],
    b.w = first ? v[3] : v[7];
    put_shared4(p + first, a);
    put_shared4(p + (first ^ 4), b);
  } else {
    static_assert(N == 4);
    float4 a;
    a.x = v[0], a.y = v[1], a.z = v[2], a.w = v[3];
    put_shared4(p, a);
  }
}

template <int N>
__device__ __forceinline__ void get_shared(const float* p, float (&v)[N]) {
  if constexpr (N == 8) {
    const int first = (threadIdx.x >> 2 & 1) * 4;
    const float4 a = *reinterpret_cast<const float4*>(p + first);
    const float4 b = *reinterpret_cast<const float4*>(p + (first ^ 4));
    v[0] = first ? b.x : a.x, v[1] = first ? b.y : a.y, v[2] = first ? b.z : a.z,
    v[3] = first ? b.w : a.w;
    v[4] = first ? a.x : b.x, v[5] = first ? a.y : b.y, v[6] = first ? a.z : b.z,
    v[7] = first ? a.w : b.w;
  } else {
    static_assert(N == 4);
    const float4 a = *reinterpret_cast<const float4*>(p);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
  }
}

template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));  // elements of a 128-bit access
constexpr int kGroup = 8;                                // the most that it can be

// The large kernels are compiled once for all types, which differ only where memory is read and
// written: these branches are uniform, and few beside the arithmetic. Indices in elements.
__device__ __forceinline__ float load_any(DType dtype, const void* p, int64_t i) {
  if (dtype == DType::kFloat32) return load_one(static_cast<const float*>(p) + i);
  if (dtype == DType::kBFloat16) return load_one(static_cast<const bfloat16*>(p) + i);
  return load_one(static_cast<const float16*>(p) + i);
}

__device__ __forceinline__ uint16_t to_16bit(DType dtype, float v) {
  return dtype == DType::kBFloat16 ? float_to_bfloat_bits(v) : float_to_half_bits(v);
}

__device__ __forceinline__ void store_any(DType dtype, void* p, int64_t i, float v) {
  if (dtype == DType::kFloat32)
    static_cast<float*>(p)[i] = v;
  else
    static_cast<uint16_t*>(p)[i] = to_16bit(dtype, v);
}

// 8 elements of one of the two 16-bit types.
__device__ __forceinline__ void load8_any(DType dtype, const void* p, int64_t i, float (&v)[8]) {
  const Words<16> r = load_words<16>(static_cast<const uint16_t*>(p) + i);
  SDAN_UNROLL
  for (int j = 0; j < 4; ++j) {
    if (dtype == DType::kBFloat16)
      unpack2<bfloat16>(r.w[j], v[2 * j], v[2 * j + 1]);
    else
      unpack2<float16>(r.w[j], v[2 * j], v[2 * j + 1]);
  }
}

__device__ __forceinline__ void store8_any(DType dtype, void* p, int64_t i, const float (&v)[8]) {
  Words<16> r;
  SDAN_UNROLL
  for (int j = 0; j < 4; ++j)
    r.w[j] = dtype == DType::kBFloat16 ? pack2<bfloat16>(v[2 * j], v[2 * j + 1])
                                       : pack2<float16>(v[2 * j], v[2 * j + 1]);
  store_words<16>(static_cast<uint16_t*>(p) + i, r);
}

// i = whole * n + rest, both not negative; in 32 bits where they fit, whose division is some five
// times as fast.
struct Quotient {
  int64_t whole, rest;
  __device__ __forceinline__ Quotient(int64_t i, int64_t n) {
    if ((i | n) >> 32) {
      whole = i / n, rest = i % n;
    } else {
      const auto a = static_cast<uint32_t>(i), b = static_cast<uint32_t>(n), q = a / b;
      whole = q, rest = a - q * b;
    }
  }
};

// x rounded down to a multiple of the power of two n, also below zero.
__device__ __forceinline__ int round_down(int x, int n) {
  return x & -n;
}

// Thread t of a block visits elements t, t + threads, ... of a grid of `columns` columns, without a
// division for each.
struct Walk {
  int row, column, row_step, column_step, columns;
  __device__ __forceinline__ explicit Walk(int columns_) : columns(columns_) {
    const int t = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    row = t / columns, column = t % columns;
    row_step = threads / columns, column_step = threads % columns;
  }
  __device__ __forceinline__ void advance() {
    row += row_step, column += column_step;
    if (column >= columns) ++row, column -= columns;
  }
};

__device__ __forceinline__ int round_up(int x, int n) {
  return (x + n - 1) / n * n;
}

// 4 elements, 16 or 8 bytes of memory.
__device__ __forceinline__ void load4_any(DType dtype, const void* p, int64_t i, float (&v)[4]) {
  if (dtype == DType::kFloat32) return load<4>(static_cast<const float*>(p) + i, v);
  if (dtype == DType::kBFloat16) return load<4>(static_cast<const bfloat16*>(p) + i, v);
  load<4>(static_cast<const float16*>(p) + i, v);
}

__device__ __forceinline__ void store4_any(DType dtype, void* p, int64_t i, const float (&v)[4]) {
  if (dtype == DType::kFloat32) return store<4>(static_cast<float*>(p) + i, v);
  if (dtype == DType::kBFloat16) return store<4>(static_cast<bfloat16*>(p) + i, v);
  store<4>(static_cast<float16*>(p) + i, v);
}

}  // namespace sdan_fast::cuda
