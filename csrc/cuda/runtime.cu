// What the torch side asks of the CUDA runtime: which architectures were built, and which device is
// current.
#include "launch.h"

namespace sdan_fast::cuda {

std::vector<int> compiled_archs() {
#ifdef __CUDA_ARCH_LIST__
  return {__CUDA_ARCH_LIST__};
#else
  return {};
#endif
}

void set_device(int device) {
#ifndef SDAN_CUDA_HOST
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess)
    throw std::runtime_error("sdan_fast: CUDA device " + std::to_string(device) +
                             " cannot be made current: " + cudaGetErrorString(error));
#else
  (void)device;
#endif
}

}  // namespace sdan_fast::cuda
