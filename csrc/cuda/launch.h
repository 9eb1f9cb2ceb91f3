// How the .cu files launch kernels: the same statement for a GPU and for the host runtime, every
// error raised with its place.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#ifndef SDAN_CUDA_HOST
#include <cuda_runtime.h>
#endif

#include "device.cuh"
#include "launches.h"

namespace sdan_fast::cuda {

constexpr int64_t kSms = 132;  // of a large GPU: what grids are planned for

struct Config {
  dim3 grid, block;
  size_t shared_bytes = 0;
  Stream stream = nullptr;
};

#ifdef SDAN_CUDA_HOST

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Config& c,
            Arguments... arguments) {
  cuda_host::launch(name, c.grid, c.block, c.shared_bytes, [&] { kernel(arguments...); });
}

#else

inline void check(cudaError_t error, const char* kernel, const char* what, const Config& c) {
  if (error == cudaSuccess) return;
  const auto triple = [](dim3 d) {
    std::string text = "(";
    text += std::to_string(d.x);
    for (const unsigned n : {d.y, d.z}) {
      text += ", ";
      text += std::to_string(n);
    }
    text += ")";
    return text;
  };
  int device = -1;
  cudaGetDevice(&device);
  cudaGetLastError();  // the runtime remembers it, and would blame the next launch
  std::string message = std::string("sdan_fast: ") + what + " the CUDA kernel " + kernel +
                        " failed: " + cudaGetErrorString(error) + " (grid " + triple(c.grid) +
                        ", block " + triple(c.block) + ", " + std::to_string(c.shared_bytes) +
                        " bytes of shared memory, device " + std::to_string(device) + ")";
  if (error == cudaErrorNoKernelImageForDevice)
    message +=
        "; this build has no code for that GPU: rebuild with its architecture in "
        "TORCH_CUDA_ARCH_LIST";
  throw std::runtime_error(message);
}

// Throws std::runtime_error if CUDA refuses the launch. An error that an earlier, asynchronous call
// left behind is told apart.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Config& c,
            Arguments... arguments) {
  check(cudaPeekAtLastError(), name, "an error from before", c);
  if (c.shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(c.shared_bytes)),
          name, "reserving shared memory for", c);
  std::tuple<Parameters...> values(arguments...);
  const auto addresses = std::apply(
      [](auto&... v) { return std::array<void*, sizeof...(Parameters)>{&v...}; }, values);
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), c.grid, c.block,
                         const_cast<void**>(addresses.data()), c.shared_bytes,
                         static_cast<cudaStream_t>(c.stream)),
        name, "launching", c);
}

#endif

// The major compute capability of the current GPU; on the host that of a large one.
inline int capability() {
#ifdef SDAN_CUDA_HOST
  return 9;
#else
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major;
#endif
}

// Whether the current GPU's tensor cores multiply elements of this type, of 16 bits: bfloat16 from
// sm_80 on.
inline bool tensor_cores(DType dtype) {
  return dtype == DType::kFloat16 || (dtype == DType::kBFloat16 && capability() >= 8);
}

// Of GPUs from sm_80 on, bytes of a block.
constexpr int64_t kSharedLarge = 99 * 1024;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline bool aligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}  // null is

// Calls f with a value of the element type that `dtype` names.
template <typename F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(bfloat16{});
    case DType::kFloat16:
      return f(float16{});
  }
}

}  // namespace sdan_fast::cuda
