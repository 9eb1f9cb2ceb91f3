// What every op's torch side shares: checks with clear messages, memory formats, the device guard
// and the current stream.
//
// LibTorch's stable ABI only. Compiled twice: into _C_cuda (dispatch key CUDA, overload ".cuda")
// and, with SDAN_CUDA_HOST, into the library that the tests run on the CPU (dispatch key CPU,
// overload ".cuda_host").
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "launches.h"

#ifdef SDAN_CUDA_HOST
#define SDAN_OVERLOAD(op) op ".cuda_host"
#define SDAN_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m)
#else
#include <dlfcn.h>
#define SDAN_OVERLOAD(op) op ".cuda"
#define SDAN_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CUDA, m)
#endif

namespace sdan_fast::cuda {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline std::string shape_of(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + ")";
}

inline DType dtype_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name,
                      " must be float32, bfloat16 or float16 for the CUDA C++ kernel");
  }
  return DType::kFloat32;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

// `t` has the dtype and the device of `like`.
inline void check_kind(const Tensor& t, const Tensor& like, const char* op, const char* name,
                       const char* like_name) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ",
                  like_name);
#ifdef SDAN_CUDA_HOST
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be a CPU tensor");
#else
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name,
                  " must be on the device of ", like_name, ", cuda:", like.get_device_index());
#endif
}

inline void check_like(const Tensor& t, const Tensor& like, const char* op, const char* name,
                       const char* like_name) {
  check_kind(t, like, op, name, like_name);
  STD_TORCH_CHECK(same_shape(t, like), op, ": ", name, " must have the shape of ", like_name, ", ",
                  shape_of(like), ", got ", shape_of(t));
}

inline void check_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* op,
                        const char* name) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  std::string wanted = "(";
  int64_t i = 0;
  for (int64_t n : shape) {
    same = same && t.size(i) == n;
    wanted += (i++ ? ", " : "") + std::to_string(n);
  }
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape ", wanted, "), got ", shape_of(t));
}

// Without channels a product has no terms and a mean is 0 / 0; eager answers that in several ways.
inline void check_image(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, op, ": ", name, " must be N x C x H x W, got ", shape_of(t));
  STD_TORCH_CHECK(t.size(1) > 0, op, ": ", name, " must have at least one channel, got ",
                  shape_of(t));
}

inline void check_mask(const std::vector<bool>& mask, size_t slots, const char* op) {
  STD_TORCH_CHECK(mask.size() == slots, op, ": output_mask must have ", slots, " entries, got ",
                  mask.size());
}

// Strides of size-1 and of empty tensors do not matter.
inline bool has_format(const Tensor& t, MemoryFormat format) {
  if (t.numel() == 0) return format == MemoryFormat::Contiguous || t.dim() == 4;
  if (format == MemoryFormat::ChannelsLast && t.dim() != 4) return false;
  constexpr int64_t kChannelsLast[4] = {1, 3, 2, 0};
  int64_t expected = 1;
  for (int64_t i = 0; i < t.dim(); ++i) {
    const int64_t d = format == MemoryFormat::ChannelsLast ? kChannelsLast[i] : t.dim() - 1 - i;
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// Contiguous if x is, else channels_last if x is, else contiguous: the format of every output.
inline MemoryFormat format_of(const Tensor& x) {
  return !has_format(x, MemoryFormat::Contiguous) && has_format(x, MemoryFormat::ChannelsLast)
             ? MemoryFormat::ChannelsLast
             : MemoryFormat::Contiguous;
}

inline Tensor in_format(const Tensor& t, MemoryFormat format) {
  return has_format(t, format) ? t : torch::stable::contiguous(t, format);
}

inline Tensor empty_in(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                       MemoryFormat format, std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::empty(shape, dtype ? *dtype : like.scalar_type(), std::nullopt,
                              like.device(), std::nullopt, format);
}

inline Tensor empty_like_in(const Tensor& like, MemoryFormat format) {
  return empty_in(like, like.sizes(), format);
}

// The device of a call made current, and its current stream.
#ifdef SDAN_CUDA_HOST
class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  Stream stream() const { return nullptr; }
};
#else
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    set_device(device_);
  }

  // aoti_torch_get_current_cuda_stream is part of libtorch_cuda, which a CPU-only torch does not
  // have: it is looked up here, at the first launch, so that this module loads beside any torch.
  Stream stream() const {
    using Function = AOTITorchError (*)(int32_t, void**);
    static const Function current_stream = [] {
      const char* name = "aoti_torch_get_current_cuda_stream";
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      void* found = library ? dlsym(library, name) : nullptr;
      return reinterpret_cast<Function>(found ? found : dlsym(RTLD_DEFAULT, name));
    }();
    STD_TORCH_CHECK(current_stream != nullptr, "sdan_fast: this PyTorch has no CUDA support (no ",
                    "aoti_torch_get_current_cuda_stream), so the CUDA kernels cannot run");
    Stream s = nullptr;
    STD_TORCH_CHECK(current_stream(device_, &s) == 0,
                    "sdan_fast: PyTorch did not give its current CUDA stream");
    return s;
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

inline int activation_index(const std::string& name, const char* op, const char* argument) {
  static const std::array<const char*, 5> names = {"none", "gelu", "relu6", "relu", "silu"};
  for (size_t i = 0; i < names.size(); ++i)
    if (name == names[i]) return static_cast<int>(i);
  STD_TORCH_CHECK(false, op, ": ", argument, " must be none, gelu, relu6, relu or silu, got ",
                  name);
  return 0;
}

}  // namespace sdan_fast::cuda
