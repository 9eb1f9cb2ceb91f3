// The functions that the torch side (module.cpp) calls and the .cu files define; free of torch and
// of CUDA headers.
//
// Keeping torch's headers out of the .cu files keeps nvcc, which reads each file once per
// architecture, fast. Every function works on the current device, is asynchronous on `stream`, and
// throws std::runtime_error on a launch error.
#pragma once

#include <cstdint>
#include <vector>

namespace sdan_fast::cuda {

using Stream = void*;  // a cudaStream_t

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

// Architectures in this build: {750, 800, ...} as in __CUDA_ARCH_LIST__; empty on the host.
std::vector<int> compiled_archs();

// Makes `device` current for this library's own copy of the CUDA runtime.
void set_device(int device);

// star.cu. n elements, all tensors in one dense layout. A null gradient is not wanted.
void star_forward(DType dtype, const void* a, const void* b, void* y, int64_t n, int activation,
                  int outer, Stream stream);
void star_backward(DType dtype, const void* grad, const void* a, const void* b, void* grad_a,
                   void* grad_b, int64_t n, int activation, int outer, Stream stream);

}  // namespace sdan_fast::cuda
