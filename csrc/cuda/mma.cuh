// Tensor cores: the instructions that the 16-bit convolutions and weight gradients need, and what
// they compute for the host and for what sm_75 lacks.
#pragma once

#include <type_traits>

#include "conv_tile.cuh"

namespace sdan_fast::cuda {

// Four 8 x 8 matrices of 16-bit elements, transposed on the way: lane i gets elements (2 (i % 4),
// i / 4) and (2 (i % 4) + 1, i / 4) of matrix m as r[m]. Lane 8 m + j says where row j of matrix m
// lies (Offset bytes behind `row`), 8 elements, 16-byte aligned.
template <int Offset>
__device__ __forceinline__ void load_transposed(SharedAddress row, uint32_t (&r)[4]) {
#if SDAN_DEVICE_PASS
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row), "n"(Offset)
               : "memory");
#else
#ifdef SDAN_CUDA_HOST
  const int lane = cuda_host::lane_id();
  cuda_host::check_aligned(reinterpret_cast<const void*>(row + Offset), 16);
  for (int m = 0; m < 4; ++m) {
    r[m] = 0;
    for (int half = 0; half < 2; ++half) {
      const SharedAddress from =
          __shfl_sync(0xffffffffu, row, 8 * m + 2 * (lane % 4) + half) + Offset;
      r[m] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[lane / 4]) << 16 * half;
    }
  }
#endif
#endif
}

// N = 4 or 2 such matrices, Transposed or as they are: lane i gets elements (i / 4, 2 (i % 4) +
// 0..1) of matrix m then.
template <bool Transposed, int Offset, int N>
__device__ __forceinline__ void load_matrices(SharedAddress row, uint32_t (&r)[N]) {
  static_assert(N == 4 || N == 2);
  if constexpr (Transposed && N == 4) return load_transposed<Offset>(row, r);
#if SDAN_DEVICE_PASS
  if constexpr (N == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row), "n"(Offset)
                 : "memory");
  else if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2 + %3];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row), "n"(Offset)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2 + %3];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row), "n"(Offset)
                 : "memory");
#else
#ifdef SDAN_CUDA_HOST
  const int lane = cuda_host::lane_id();
  if (lane < 8 * N) cuda_host::check_aligned(reinterpret_cast<const void*>(row + Offset), 16);
  for (int m = 0; m < N; ++m) {
    if constexpr (Transposed) {
      r[m] = 0;
      for (int half = 0; half < 2; ++half) {
        const SharedAddress from =
            __shfl_sync(0xffffffffu, row, 8 * m + 2 * (lane % 4) + half) + Offset;
        r[m] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[lane / 4])
                << 16 * half;
      }
    } else {
      const SharedAddress from = __shfl_sync(0xffffffffu, row, 8 * m + lane / 4) + Offset;
      r[m] = reinterpret_cast<const uint32_t*>(from)[lane % 4];
    }
  }
#endif
#endif
}

// c += a b for a 16 x 16 matrix a and a 16 x 8 matrix b of 16-bit elements, in float32. Lane i has
// of a the elements (i / 4 + 8 (r % 2), 2 (i % 4) + 8 (r / 2) + 0..1) as a[r], of b (2 (i % 4) + 8
// r + 0..1, i / 4) as b[r], of c (i / 4 + 8 (r / 2), 2 (i % 4) + r % 2) as c[r]. This one fetches
// the elements from the other lanes: for the host, and for bfloat16 on sm_75.
template <typename T>
__device__ __forceinline__ void multiply_add_by_shuffles(float (&c)[4], const uint32_t (&a)[4],
                                                         const uint32_t (&b)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / 4 * 4, column = lane % 4 * 8;
  SDAN_UNROLL
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 4; ++k) {  // pairs of columns of a
      float x[2][2], y[2][2];
      SDAN_UNROLL
      for (int i = 0; i < 2; ++i) {
        unpack2<T>(__shfl_sync(0xffffffffu, a[2 * half + i], row + k), x[i][0], x[i][1]);
        unpack2<T>(__shfl_sync(0xffffffffu, b[half], column + 4 * i + k), y[i][0], y[i][1]);
      }
      SDAN_UNROLL
      for (int r = 0; r < 4; ++r)
        c[r] = fmaf(x[r / 2][1], y[r % 2][1], fmaf(x[r / 2][0], y[r % 2][0], c[r]));
    }
  }
}

template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
#if SDAN_DEVICE_PASS && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif SDAN_DEVICE_PASS
  if constexpr (std::is_same_v<T, bfloat16>) {
    multiply_add_by_shuffles<T>(c, a, b);
  } else {
    SDAN_UNROLL
    for (int half = 0; half < 2; ++half)
      asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, "
          "%1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
#else
  multiply_add_by_shuffles<T>(c, a, b);
#endif
}

}  // namespace sdan_fast::cuda
