// What the kernel bodies stand on: 16-bit types, wide loads and stores, shared memory, cp.async;
// for nvcc and for the host.
//
// Every kernel body of this folder compiles with nvcc and, against host/runtime.h, with g++
// (SDAN_CUDA_HOST is then defined). Kernels use only what is here and what CUDA and host/runtime.h
// both have.
#pragma once

#include <cstdint>

#ifdef SDAN_CUDA_HOST
#include "host/runtime.h"
#endif

#if defined(__CUDA_ARCH__)
#define SDAN_DEVICE_PASS 1
#else
#define SDAN_DEVICE_PASS 0
#endif

// SDAN_SHARED(float, tile, [4][33]) is `__shared__ float tile[4][33]`, 16-byte aligned.
// SDAN_DYNAMIC_SHARED(p) declares `unsigned char* p`, the dynamic shared memory of the block.
#ifdef SDAN_CUDA_HOST
#define SDAN_SHARED(type, name, ...)                                                      \
  static const char name##_key = 0;                                                       \
  using name##_array = type __VA_ARGS__;                                                  \
  name##_array& name = *static_cast<name##_array*>(::sdan_fast::cuda_host::static_shared( \
      &name##_key, sizeof(name##_array), alignof(name##_array)))
#define SDAN_DYNAMIC_SHARED(name) \
  unsigned char* name = static_cast<unsigned char*>(::sdan_fast::cuda_host::dynamic_shared())
#define SDAN_UNROLL
#define SDAN_UNROLL_BY(n)
#else
#define SDAN_SHARED(type, name, ...) __shared__ alignas(16) type name __VA_ARGS__
#define SDAN_DYNAMIC_SHARED(name)                                \
  extern __shared__ __align__(128) unsigned char sdan_dynamic[]; \
  unsigned char* name = sdan_dynamic
#define SDAN_PRAGMA(words) _Pragma(#words)
#define SDAN_UNROLL SDAN_PRAGMA(unroll)
#define SDAN_UNROLL_BY(n) SDAN_PRAGMA(unroll n)
#endif

namespace sdan_fast::cuda {

// 16-bit storage types. Arithmetic is in float32; these only say how to read and write.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename T>
constexpr bool is_16bit = sizeof(T) == 2;

// ---- conversions

__device__ __forceinline__ float bits_to_float(uint32_t bits) {
#if SDAN_DEVICE_PASS
  return __uint_as_float(bits);
#else
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
#endif
}

__device__ __forceinline__ uint32_t float_to_bits(float f) {
#if SDAN_DEVICE_PASS
  return __float_as_uint(f);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
#endif
}

__device__ __forceinline__ float half_bits_to_float(uint16_t h) {
#if SDAN_DEVICE_PASS
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
#else
  const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude < 0x0400u) {  // subnormal: a multiple of 2^-24
    const float f = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -f : f;
  }
  return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
#endif
}

__device__ __forceinline__ uint16_t float_to_half_bits(float f) {
#if SDAN_DEVICE_PASS
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
#else
  const uint32_t u = float_to_bits(f), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7fffu);
  if (magnitude >= 0x477ff000u)
    return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 2^16 or more
  if (magnitude < 0x38800000u) {                   // below 2^-14: let the adder round
    const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    return static_cast<uint16_t>(sign | rounded);
  }
  return static_cast<uint16_t>(sign |
                               (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13);
#endif
}

__device__ __forceinline__ float bfloat_bits_to_float(uint16_t b) {
  return bits_to_float(static_cast<uint32_t>(b) << 16);
}

__device__ __forceinline__ uint16_t float_to_bfloat_bits(float f) {
#if SDAN_DEVICE_PASS && __CUDA_ARCH__ >= 800
  uint16_t b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(f));
  return b;
#else
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16);
#endif
}

// Two floats as two 16-bit values in one word, `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<bfloat16>(float low, float high) {
#if SDAN_DEVICE_PASS && __CUDA_ARCH__ >= 800
  uint32_t w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  return w;
#else
  return float_to_bfloat_bits(low) | static_cast<uint32_t>(float_to_bfloat_bits(high)) << 16;
#endif
}
template <>
__device__ __forceinline__ uint32_t pack2<float16>(float low, float high) {
#if SDAN_DEVICE_PASS && __CUDA_ARCH__ >= 800
  uint32_t w;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  return w;
#else
  return float_to_half_bits(low) | static_cast<uint32_t>(float_to_half_bits(high)) << 16;
#endif
}

template <typename T>
__device__ __forceinline__ void unpack2(uint32_t word, float& low, float& high);
template <>
__device__ __forceinline__ void unpack2<bfloat16>(uint32_t word, float& low, float& high) {
  low = bits_to_float(word << 16);
  high = bits_to_float(word & 0xffff0000u);
}
template <>
__device__ __forceinline__ void unpack2<float16>(uint32_t word, float& low, float& high) {
  low = half_bits_to_float(static_cast<uint16_t>(word & 0xffffu));
  high = half_bits_to_float(static_cast<uint16_t>(word >> 16));
}

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(bfloat16 x) {
  return bfloat_bits_to_float(x.bits);
}
__device__ __forceinline__ float to_float(float16 x) {
  return half_bits_to_float(x.bits);
}
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
  return bfloat16{float_to_bfloat_bits(x)};
}
template <>
__device__ __forceinline__ float16 from_float<float16>(float x) {
  return float16{float_to_half_bits(x)};
}

// ---- loads and stores

template <int Bytes>
struct Words {
  uint32_t w[Bytes / 4];
};

// Bytes is 4, 8 or 16, and p a multiple of it. The memory must not change while the kernel runs.
template <int Bytes>
__device__ __forceinline__ Words<Bytes> load_words(const void* p) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  Words<Bytes> r;
#if SDAN_DEVICE_PASS
  if constexpr (Bytes == 16) {
    const uint4 u = __ldg(static_cast<const uint4*>(p));
    r.w[0] = u.x, r.w[1] = u.y, r.w[2] = u.z, r.w[3] = u.w;
  } else if constexpr (Bytes == 8) {
    const uint2 u = __ldg(static_cast<const uint2*>(p));
    r.w[0] = u.x, r.w[1] = u.y;
  } else {
    r.w[0] = __ldg(static_cast<const unsigned*>(p));
  }
#else
#ifdef SDAN_CUDA_HOST
  cuda_host::check_aligned(p, Bytes);
#endif
  __builtin_memcpy(r.w, p, Bytes);
#endif
  return r;
}

// p is in global memory. Written as instructions, because the compiler takes a vector store apart
// now and then.
template <int Bytes>
__device__ __forceinline__ void store_words(void* p, const Words<Bytes>& v) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
#if SDAN_DEVICE_PASS
  const size_t to = __cvta_generic_to_global(p);
  if constexpr (Bytes == 16)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.w[0]), "r"(v.w[1]),
                 "r"(v.w[2]), "r"(v.w[3]));
  else if constexpr (Bytes == 8)
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(v.w[0]), "r"(v.w[1]));
  else
    asm volatile("st.global.b32 [%0], %1;" ::"l"(to), "r"(v.w[0]));
#else
#ifdef SDAN_CUDA_HOST
  cuda_host::check_aligned(p, Bytes);
#endif
  __builtin_memcpy(p, v.w, Bytes);
#endif
}

template <typename T>
__device__ __forceinline__ float load_one(const T* p) {
#if SDAN_DEVICE_PASS
  if constexpr (is_16bit<T>)
    return to_float(T{__ldg(&p->bits)});
  else
    return __ldg(p);
#else
  return to_float(*p);
#endif
}

// N consecutive elements; p is aligned to min(16, N sizeof(T)) bytes, and N is a power of two.
template <int N, typename T>
__device__ __forceinline__ void load(const T* p, float (&v)[N]) {
  if constexpr (N * sizeof(T) < 4) {
    v[0] = load_one(p);
  } else {
    constexpr int kBytes = N * sizeof(T) < 16 ? static_cast<int>(N * sizeof(T)) : 16;
    constexpr int kPer = kBytes / static_cast<int>(sizeof(T));
    SDAN_UNROLL
    for (int i = 0; i < N; i += kPer) {
      const Words<kBytes> r = load_words<kBytes>(p + i);
      SDAN_UNROLL
      for (int j = 0; j < kBytes / 4; ++j) {
        if constexpr (is_16bit<T>)
          unpack2<T>(r.w[j], v[i + 2 * j], v[i + 2 * j + 1]);
        else
          v[i + j] = bits_to_float(r.w[j]);
      }
    }
  }
}

template <int N, typename T>
__device__ __forceinline__ void store(T* p, const float (&v)[N]) {
  if constexpr (N * sizeof(T) < 4) {
    *p = from_float<T>(v[0]);
  } else {
    constexpr int kBytes = N * sizeof(T) < 16 ? static_cast<int>(N * sizeof(T)) : 16;
    constexpr int kPer = kBytes / static_cast<int>(sizeof(T));
    SDAN_UNROLL
    for (int i = 0; i < N; i += kPer) {
      Words<kBytes> r;
      SDAN_UNROLL
      for (int j = 0; j < kBytes / 4; ++j) {
        if constexpr (is_16bit<T>)
          r.w[j] = pack2<T>(v[i + 2 * j], v[i + 2 * j + 1]);
        else
          r.w[j] = float_to_bits(v[i + j]);
      }
      store_words<kBytes>(p + i, r);
    }
  }
}

// ---- shared memory

// V floats between registers and shared memory, of which thread t has the t-th V.
template <int V>
__device__ __forceinline__ void put_vector(float* shared, int t, const float (&v)[V]) {
  if constexpr (V == 4) {
    float4 a;
    a.x = v[0], a.y = v[1], a.z = v[2], a.w = v[3];
    reinterpret_cast<float4*>(shared)[t] = a;
  } else {
    static_assert(V == 1);
    shared[t] = v[0];
  }
}

template <int V>
__device__ __forceinline__ void get_vector(const float* shared, int t, bool there, float (&v)[V]) {
  SDAN_UNROLL
  for (int e = 0; e < V; ++e) v[e] = 0;
  if (!there) return;
  if constexpr (V == 4) {
    const float4 a = reinterpret_cast<const float4*>(shared)[t];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
  } else {
    v[0] = shared[t];
  }
}

// ---- cp.async

// Copies Bytes (4, 8 or 16) from global to shared memory, of which only source_bytes are read and
// the rest is zero. The result may be read after cp_async_wait by the same thread, and after a
// barrier by the others. Before sm_80 it is a plain copy through registers.
template <int Bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global,
                                         int source_bytes = Bytes) {
#ifdef SDAN_CUDA_HOST
  cuda_host::copy_async(shared, global, Bytes, source_bytes);
#elif SDAN_DEVICE_PASS && __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                 "r"(source_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(Bytes),
                 "r"(source_bytes)
                 : "memory");
#else
  Words<Bytes> r = {};
  if (source_bytes == Bytes) {
    r = load_words<Bytes>(global);
  } else {
    for (int i = 0; i < source_bytes; ++i)
      r.w[i / 4] |= static_cast<uint32_t>(static_cast<const unsigned char*>(global)[i])
                    << 8 * (i % 4);
  }
  for (int i = 0; i < Bytes / 4; ++i) static_cast<uint32_t*>(shared)[i] = r.w[i];
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifdef SDAN_CUDA_HOST
  cuda_host::copy_async_commit();
#elif SDAN_DEVICE_PASS && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most Left of this thread's committed groups are still under way.
template <int Left>
__device__ __forceinline__ void cp_async_wait() {
#ifdef SDAN_CUDA_HOST
  cuda_host::copy_async_wait(Left);
#elif SDAN_DEVICE_PASS && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
#endif
}

// ---- sums

__device__ __forceinline__ float warp_sum(float v) {
  SDAN_UNROLL
  for (int d = 16; d > 0; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

// A sum that carries its rounding errors along (Kahan): as good as float64 for a few thousand
// terms.
struct CarefulSum {
  float sum = 0, lost = 0;
  __device__ __forceinline__ void add(float v) {
    const float y = v - lost, t = sum + y;
    lost = (t - sum) - y;
    sum = t;
  }
  // Adds the sum of the lane whose number differs in bit `d`. Sums of lanes that cancel leave
  // little, so the rounding error of adding them is carried along as well: it is found exactly.
  __device__ __forceinline__ void merge(int d) {
    const float other = __shfl_xor_sync(0xffffffffu, sum, d),
                also = __shfl_xor_sync(0xffffffffu, lost, d);
    const float t = sum + other, z = t - sum;
    lost = (lost + also) - ((sum - (t - z)) + (other - z));
    sum = t;
  }
};

// The sum over a warp.
__device__ __forceinline__ float warp_sum(CarefulSum v) {
  SDAN_UNROLL
  for (int d = 16; d > 0; d >>= 1) v.merge(d);
  return v.sum - v.lost;
}

}  // namespace sdan_fast::cuda
