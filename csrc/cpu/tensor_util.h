// Memory formats, output allocation, argument checks and the parallel loop of the CPU kernels.
//
// For baseline sources only (never from a source compiled per instruction set).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "dispatch.h"

namespace sdan_fast {

using torch::stable::Tensor;

enum class Format { kContiguous, kChannelsLast };

// True if the 4-d tensor's strides are those of a dense channels_last tensor; dimensions of size
// one do not count, as in PyTorch.
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] != 1) {
      if (strides[d] != expected) return false;
      expected *= sizes[d];
    }
  }
  return true;
}

// The format rule: contiguous input gives contiguous output, else channels_last gives
// channels_last, else contiguous.
inline Format output_format(const Tensor& t) {
  if (t.is_contiguous()) return Format::kContiguous;
  return is_channels_last(t) ? Format::kChannelsLast : Format::kContiguous;
}

// t itself if it is dense in that format, else a copy that is.
inline Tensor in_format(const Tensor& t, Format format) {
  using torch::headeronly::MemoryFormat;
  if (format == Format::kContiguous) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t, MemoryFormat::Contiguous);
  }
  return is_channels_last(t) ? t : torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}

// An uninitialized tensor of t's dtype on the CPU. It is asked for by strides: `stable::empty`
// looks its operator up by name at every call, a fifth of what a small op takes.
inline Tensor empty_in_format(torch::headeronly::IntHeaderOnlyArrayRef sizes, const Tensor& t,
                              Format format) {
  const int64_t dim = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> strides(sizes.size());
  int64_t next = 1;
  const auto give = [&](int64_t d) {
    strides[d] = next;
    next *= sizes[d] > 1 || format == Format::kChannelsLast ? sizes[d] : 1;  // as PyTorch does
  };
  if (format == Format::kContiguous) {
    for (int64_t d = dim - 1; d >= 0; --d) give(d);
  } else {
    for (const int64_t d : {1, 3, 2, 0}) give(d);
  }
  int32_t dtype;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// "(1, 56, 180, 320)", for messages.
inline std::string shape_of(const Tensor& t) {
  std::string s = "(";
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (d != 0) s += ", ";
    s += std::to_string(t.size(d));
  }
  return s + ")";
}

// The kernels' name of t's dtype; refuses what they do not read.
inline DType kernel_dtype(const Tensor& t, const char* op, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return DType::kFloat32;
  if (type == ScalarType::BFloat16) return DType::kBFloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, op, ": ", name,
                  " must be float32, bfloat16 or float16 for the cpu backend, got ",
                  torch::headeronly::toString(type));
  return DType::kFloat16;
}

inline void check_cpu(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU for the cpu backend");
}

// Checks that t lies on the CPU, has x's dtype and `dim` dimensions.
inline void check_like(const Tensor& t, const Tensor& x, int64_t dim, const char* op,
                       const char* name) {
  check_cpu(t, op, name);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", name,
                  " must have the dtype of the first tensor, ",
                  torch::headeronly::toString(x.scalar_type()), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got shape ",
                  shape_of(t));
}

// Checks that t lies on the CPU and has x's dtype and shape.
inline void check_same(const Tensor& t, const Tensor& x, const char* op, const char* name) {
  check_like(t, x, x.dim(), op, name);
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(t.size(d) == x.size(d), op, ": ", name,
                    " must have the shape of the first tensor, ", shape_of(x), ", got ",
                    shape_of(t));
  }
}

// Checks a per-channel vector (a bias, a norm's weight): shape (channels,), dtype of x.
inline void check_vector(const Tensor& t, const Tensor& x, int64_t channels, const char* op,
                         const char* name) {
  check_like(t, x, 1, op, name);
  STD_TORCH_CHECK(t.size(0) == channels, op, ": ", name, " must have shape (", channels,
                  ",), got shape ", shape_of(t));
}

inline void check_mask(const std::vector<bool>& mask, size_t slots, const char* op) {
  STD_TORCH_CHECK(mask.size() == slots, op, ": output_mask must have ", slots, " entries, got ",
                  mask.size());
}

inline Activation parse_activation(const std::string& s, const char* op, const char* name) {
  if (s == "none") return Activation::kNone;
  if (s == "gelu") return Activation::kGelu;
  if (s == "relu6") return Activation::kRelu6;
  if (s == "relu") return Activation::kRelu;
  STD_TORCH_CHECK(s == "silu", op, ": ", name,
                  " must be one of none, gelu, relu6, relu, silu, got '", s, "'");
  return Activation::kSilu;
}

// f(begin, end) over [0, n) on PyTorch's threads, at least `grain` items each. What fits one grain
// runs here directly: entering the parallel runtime costs more than a small kernel.
template <typename F>
inline void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain) {
    f(int64_t{0}, n);
  } else {
    torch::stable::parallel_for(0, n, grain, f);
  }
}

// Items per task such that a task is worth a thread: about 32k units of `cost_per_item`.
inline int64_t grain_for(int64_t cost_per_item) {
  constexpr int64_t kTask = 32768;
  return cost_per_item >= kTask ? 1 : kTask / (cost_per_item > 0 ? cost_per_item : 1);
}

}  // namespace sdan_fast
