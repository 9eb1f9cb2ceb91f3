// A CUDA runtime that launches nothing and tells a callback what would have been launched.
//
// Linked with the .cu objects that nvcc made and with the torch sides compiled for the host, it
// makes the ops callable on CPU tensors: every launch is seen with its real grid, shared memory and
// arguments. `sdan-fast inspect cuda` reads that, and executes the launches' PTX.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>

struct dim3 {
  unsigned x, y, z;
};

namespace {

std::unordered_map<const void*, std::string>& names() {
  static std::unordered_map<const void*, std::string> table;
  return table;
}

using Callback = int (*)(const char* kernel, const unsigned* grid_and_block, size_t shared_bytes,
                         void** arguments);
Callback callback = nullptr;

constexpr int kSuccess = 0, kUnknownFunction = 98;  // cudaErrorInvalidDeviceFunction

int record(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes) {
  const auto found = names().find(function);
  if (found == names().end() || !callback) return kUnknownFunction;
  const unsigned shape[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  return callback(found->second.c_str(), shape, shared_bytes, arguments);
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void sdan_record_launches(Callback c) {
  callback = c;
}

// What nvcc's objects call when the library is loaded.
void** __cudaRegisterFatBinary(void* fat) {
  static void* handle;
  handle = fat;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device_name, int, void*,
                            void*, void*, void*, int*) {
  names()[host] = device_name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) {
  return 1;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) {
  return 0;
}
int __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  return kSuccess;
}
int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return kSuccess;
}
int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                       void*) {
  return record(kernel, grid, block, arguments, shared);
}

// What launches use of the runtime.
int cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                     void*) {
  return record(function, grid, block, arguments, shared);
}
int cudaFuncSetAttribute(const void*, int, int) {
  return kSuccess;
}
int cudaPeekAtLastError() {
  return kSuccess;
}
int cudaGetLastError() {
  return kSuccess;
}
const char* cudaGetErrorString(int error) {
  return error == kUnknownFunction ? "the recorder does not know this kernel"
                                   : "the recorder failed";
}
int cudaGetDevice(int* device) {
  *device = 0;
  return kSuccess;
}
int cudaSetDevice(int) {
  return kSuccess;
}
int cudaMemsetAsync(void* memory, int value, size_t bytes, void*) {
  std::memset(memory, value, bytes);
  return kSuccess;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  // Of an H100: cudaDevAttrMultiProcessorCount, ...MaxSharedMemoryPerBlockOptin,
  // ...ComputeCapability.
  switch (attribute) {
    case 16:
      *value = 132;
      break;
    case 97:
      *value = 227 * 1024;
      break;
    case 75: {
      // Plans are made for the GPU at hand, so an older one has launches of its own.
      const char* major = std::getenv("SDAN_FAST_RECORDED_MAJOR");
      *value = major != nullptr ? std::atoi(major) : 9;
      break;
    }
    case 76:
      *value = 0;
      break;
    default:
      return 1;  // cudaErrorInvalidValue
  }
  return kSuccess;
}

}  // extern "C"
