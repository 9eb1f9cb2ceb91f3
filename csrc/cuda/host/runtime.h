// Runs CUDA C++ kernels on the CPU, one fiber per CUDA thread, to test them where there is no GPU.
//
// A kernel is an ordinary function here. `launch` calls it once per thread; a thread runs until it
// reaches a barrier, a warp-wide exchange or its end, then the next one goes on. In which order the
// threads take their turns is chosen at run time (normal, reversed, shuffled), so that a kernel
// with a missing barrier gives a different answer. Shared memory starts as NaN in every block and
// sits between guard bytes; the target of a cp.async reads as NaN until its wait. Whatever a GPU
// would forbid (a diverged barrier, a misaligned access, a grid that is too large) is an exception
// that names the thread.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace sdan_fast::cuda_host {

inline constexpr int kWarpSize = 32;

enum class Order : int { kNormal = 0, kReversed = 1, kShuffled = 2 };

// The order in which threads (and blocks) take their turns from the next launch on. `seed` is used
// by kShuffled.
void set_order(Order order, uint64_t seed);

// Runs body() for every thread of the grid, block after block. Throws std::runtime_error, with the
// kernel's name and the thread concerned, for a launch that a GPU refuses, a deadlock, a diverged
// barrier, a write outside shared memory, or whatever the kernel itself throws.
void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& body);

// What a kernel calls, through the CUDA names below.
void sync_block();
void sync_warp(uint32_t mask);
uint64_t exchange(uint32_t mask, uint64_t value,
                  int source_lane);  // value of another lane; own value if out of the warp
uint32_t ballot(uint32_t mask, bool predicate);
int lane_id();
void* static_shared(const void* key, size_t bytes, size_t align);
void* dynamic_shared();
void copy_async(void* shared, const void* global, int bytes, int source_bytes);
void copy_async_commit();
void copy_async_wait(int groups_left);
[[noreturn]] void fail(const char* message);
inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned access");
}

extern uint3 thread_index, block_index;
extern dim3 block_dim, grid_dim;

template <typename T>
T shuffle(uint32_t mask, T value, int source_lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source_lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace sdan_fast::cuda_host

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::sdan_fast::cuda_host::thread_index)
#define blockIdx (::sdan_fast::cuda_host::block_index)
#define blockDim (::sdan_fast::cuda_host::block_dim)
#define gridDim (::sdan_fast::cuda_host::grid_dim)

inline void __syncthreads() {
  ::sdan_fast::cuda_host::sync_block();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  ::sdan_fast::cuda_host::sync_warp(mask);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const int self = ::sdan_fast::cuda_host::lane_id();
  return ::sdan_fast::cuda_host::shuffle(mask, value, (self & ~(width - 1)) + (lane & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int self = ::sdan_fast::cuda_host::lane_id(), from = self ^ lane_mask;
  return ::sdan_fast::cuda_host::shuffle(mask, value,
                                         (from | (width - 1)) > (self | (width - 1)) ? self : from);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int self = ::sdan_fast::cuda_host::lane_id(), from = self + static_cast<int>(delta);
  return ::sdan_fast::cuda_host::shuffle(mask, value, from > (self | (width - 1)) ? self : from);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int self = ::sdan_fast::cuda_host::lane_id(), from = self - static_cast<int>(delta);
  return ::sdan_fast::cuda_host::shuffle(mask, value, from < (self & ~(width - 1)) ? self : from);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return ::sdan_fast::cuda_host::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, !predicate) == 0;
}

inline float __expf(float x) {
  return std::exp(x);
}
inline float __fdividef(float x, float y) {
  return x / y;
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
