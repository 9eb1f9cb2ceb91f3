// Small kernels for the tests of the host runtime: right ones, and each with one planted fault.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <string>

#include "device.cuh"

namespace host = sdan_fast::cuda_host;
using namespace sdan_fast::cuda;

namespace {

constexpr int kThreads = 96;

// y[i] = x[kThreads - 1 - i] through shared memory.
template <bool Barrier>
__global__ void reverse(const float* x, float* y) {
  SDAN_SHARED(float, tile, [kThreads]);
  const int i = static_cast<int>(blockIdx.x) * kThreads, t = static_cast<int>(threadIdx.x);
  tile[t] = x[i + t];
  if (Barrier) __syncthreads();
  y[i + t] = tile[kThreads - 1 - t];
}

// y[t] = x[t + 1] twice through the same buffer: the second write must not overtake the first read.
template <bool SecondBarrier>
__global__ void shift_twice(const float* x, float* y) {
  SDAN_SHARED(float, tile, [kThreads]);
  const int t = static_cast<int>(threadIdx.x), next = (t + 1) % kThreads;
  tile[t] = x[t];
  __syncthreads();
  const float once = tile[next];
  if (SecondBarrier) __syncthreads();
  tile[t] = once + 1;
  __syncthreads();
  y[t] = tile[next];
}

template <bool Barrier>
__global__ void reverse_in_warp(const float* x, float* y) {
  SDAN_SHARED(float, tile, [32]);
  const int t = static_cast<int>(threadIdx.x);
  tile[t] = x[t];
  if (Barrier) __syncwarp();
  y[t] = tile[31 - t];
}

__global__ void sums(const float* x,
                     float* y) {  // warp sums by shuffles, then all ways of moving one value
  const int t = static_cast<int>(threadIdx.x);
  float v = warp_sum(x[t]);
  v += 1000 * __shfl_sync(0xffffffffu, x[t], 3);
  v += 1000 * __shfl_down_sync(0xffffffffu, x[t], 1, 8) -
       1000 * __shfl_up_sync(0xffffffffu, x[t], 1, 8);
  if (__any_sync(0xffffffffu, t == 40)) v += 0.5f;
  if (__all_sync(0xffffffffu, t < 64)) v += 0.25f;
  y[t] = v + static_cast<float>(__ballot_sync(0xffffffffu, t % 2) & 3u) / 8;
}

__global__ void half_shuffle(const float* x, float* y) {  // the two halves of a warp part
  const int t = static_cast<int>(threadIdx.x);
  if (t < 16)
    y[t] = __shfl_xor_sync(0x0000ffffu, x[t], 1);
  else
    y[t] = __shfl_xor_sync(0xffff0000u, x[t], 2);
}

template <bool Wait>
__global__ void copy_async(const float* x, float* y) {
  SDAN_SHARED(float, tile, [2][4 * 32]);
  const int t = static_cast<int>(threadIdx.x);
  for (int s = 0; s < 2; ++s) {
    cp_async<16>(&tile[s][4 * t], x + s * 128 + 4 * t, s == 1 && t == 31 ? 8 : 16);
    cp_async_commit();
  }
  if (Wait) {
    cp_async_wait<1>();
    for (int i = 0; i < 4; ++i) y[4 * t + i] = tile[0][4 * t + i];
  } else {
    for (int i = 0; i < 4; ++i) y[4 * t + i] = tile[0][4 * t + i];
    cp_async_wait<1>();
  }
  cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) y[128 + 4 * t + i] = tile[1][127 - (4 * t + i)];
}

__global__ void never_waits(const float* x, float* y) {
  SDAN_SHARED(float, tile, [4]);
  cp_async<16>(tile, x);
  cp_async_commit();
  y[0] = 0;
}

__global__ void reads_outside(const float* x,
                              float* y) {  // the last thread reads one element too far
  const int t = static_cast<int>(threadIdx.x);
  y[t] = x[t] + x[t + 1];
}

__global__ void reads_outside_shared(const float* x, float* y) {
  SDAN_DYNAMIC_SHARED(raw);
  auto* tile = reinterpret_cast<float*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  tile[t] = x[t];
  __syncthreads();
  y[t] = tile[t + 1];
}

__global__ void writes_outside_shared(const float* x, float* y) {
  SDAN_DYNAMIC_SHARED(raw);
  auto* tile = reinterpret_cast<float*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  tile[t + 1] = x[t];
  y[t] = x[t];
}

__global__ void reads_unwritten_shared(const float* x, float* y) {
  SDAN_SHARED(float, tile, [kThreads]);
  const int t = static_cast<int>(threadIdx.x);
  if (t % 2) tile[t] = x[t];
  __syncthreads();
  y[t] = tile[t];
}

__global__ void leaves_before_barrier(const float* x, float* y) {
  const int t = static_cast<int>(threadIdx.x);
  if (t == 5) return;
  __syncthreads();
  y[t] = x[t];
}

__global__ void misaligned(const float* x, float* y) {
  float v[4];
  load<4>(x + 1, v);
  store<4>(y, v);
}

__global__ void overflows(const float* x, float* y) {  // signed overflow, which UBSan reports
  int n = 0x7fffffff;
  n += static_cast<int>(x[threadIdx.x]) + 1;
  y[threadIdx.x] = static_cast<float>(n);
}

using Kernel = void (*)(const float*, float*);
struct Case {
  Kernel kernel;
  dim3 grid, block;
  size_t shared_bytes;
};
const std::map<std::string, Case> cases = {
    {"reverse", {reverse<true>, 3, kThreads, 0}},
    {"reverse_without_barrier", {reverse<false>, 3, kThreads, 0}},
    {"shift_twice", {shift_twice<true>, 1, kThreads, 0}},
    {"shift_twice_without_second_barrier", {shift_twice<false>, 1, kThreads, 0}},
    {"reverse_in_warp", {reverse_in_warp<true>, 1, 32, 0}},
    {"reverse_in_warp_without_barrier", {reverse_in_warp<false>, 1, 32, 0}},
    {"sums", {sums, 1, 64, 0}},
    {"half_shuffle", {half_shuffle, 1, 32, 0}},
    {"copy_async", {copy_async<true>, 1, 32, 0}},
    {"copy_async_without_wait", {copy_async<false>, 1, 32, 0}},
    {"never_waits", {never_waits, 1, 1, 0}},
    {"reads_outside", {reads_outside, 1, kThreads, 0}},
    {"reads_outside_shared", {reads_outside_shared, 1, kThreads, kThreads * 4}},
    {"writes_outside_shared", {writes_outside_shared, 1, kThreads, kThreads * 4}},
    {"reads_unwritten_shared", {reads_unwritten_shared, 1, kThreads, 0}},
    {"leaves_before_barrier", {leaves_before_barrier, 1, kThreads, 0}},
    {"misaligned", {misaligned, 1, 1, 0}},
    {"overflows", {overflows, 1, 32, 0}},
    {"block_too_large", {reverse<true>, 1, dim3(33, 32), 0}},
    {"grid_too_tall", {reverse<true>, dim3(1, 65536), 32, 0}},
    {"too_much_shared", {reverse<true>, 1, 32, 228 * 1024}},
};

void run(const std::string& name, const float* x, float* y) {
  const Case& c = cases.at(name);
  host::launch(name.c_str(), c.grid, c.block, c.shared_bytes, [&] { c.kernel(x, y); });
}

}  // namespace

// Returns an empty string, or what went wrong. x and y hold 1024 floats.
extern "C" __attribute__((visibility("default"))) const char* sdan_planted_run(const char* name,
                                                                               const float* x,
                                                                               float* y) {
  static std::string error;
  try {
    run(name, x, y);
    error.clear();
  } catch (const std::exception& e) {
    error = e.what();
  }
  return error.c_str();
}

// Round trips of the 16-bit types: to float and back for all 65536 patterns, and from float for n
// values.
extern "C" __attribute__((visibility("default"))) void sdan_planted_convert(int half,
                                                                            const float* x,
                                                                            uint16_t* y,
                                                                            float* back, int n) {
  for (int i = 0; i < n; ++i) {
    y[i] = half ? float_to_half_bits(x[i]) : float_to_bfloat_bits(x[i]);
    back[i] = half ? half_bits_to_float(y[i]) : bfloat_bits_to_float(y[i]);
  }
}

#ifdef SDAN_MAIN
// Runs one kernel on arrays of exactly kThreads elements (256 for the copies), for the sanitizers
// to watch.
int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const std::string name = argv[1];
  const size_t n = name.rfind("copy", 0) == 0 ? 256 : name == "reverse" ? 3 * kThreads : kThreads;
  auto* x = static_cast<float*>(std::aligned_alloc(16, n * sizeof(float)));
  auto* y = static_cast<float*>(std::aligned_alloc(16, n * sizeof(float)));
  for (size_t i = 0; i < n; ++i) x[i] = static_cast<float>(i), y[i] = 0;
  for (int order = 0; order < 3; ++order) {
    host::set_order(static_cast<host::Order>(order), 7);
    try {
      run(name, x, y);
    } catch (const std::exception& e) {
      std::printf("%s\n", e.what());
      return 3;
    }
  }
  std::free(x);
  std::free(y);
  return 0;
}
#endif
