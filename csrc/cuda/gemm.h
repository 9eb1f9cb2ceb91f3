// Matrix products through PyTorch's own (cuBLAS on a GPU), asked for through the dispatcher, so
// that this module links no BLAS.
//
// Always the out= overloads: autocast leaves them alone, and they write where they are told. All
// matrices are 2-D, or 3-D for one product per image.
#pragma once

#include "torch_side.h"

namespace sdan_fast::cuda {

inline void call(const char* name, const char* overload, StableIValue* stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
}

// out = a b
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  call(a.dim() == 2 ? "aten::mm" : "aten::bmm", "out", stack.data());
  torch::stable::detail::to<Tensor>(stack[0]);
}

// out = a b in float32, whatever the dtype of a and b: what a weight gradient sums over hundreds of
// thousands of pixels must not be rounded to 16 bits on the way, as cuBLAS may where it splits K.
inline void multiply_to_float(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  if (a.scalar_type() == ScalarType::Float) return multiply(a, b, out);
#ifdef SDAN_CUDA_HOST  // PyTorch has the mixed product on GPUs only
  multiply(torch::stable::to(a, ScalarType::Float), torch::stable::to(b, ScalarType::Float), out);
#else
  std::array<StableIValue, 4> stack{from(a), from(b), from(ScalarType::Float), from(out)};
  call(a.dim() == 2 ? "aten::mm" : "aten::bmm", "dtype_out", stack.data());
  torch::stable::detail::to<Tensor>(stack[0]);
#endif
}

// Both below each other.
inline void concatenate(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(std::vector<Tensor>{a, b}), from(int64_t{0}), from(out)};
  call("aten::cat", "out", stack.data());
  torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor viewed(const Tensor& t, std::initializer_list<int64_t> shape) {
  return torch::stable::view(t, {shape.begin(), shape.size()});
}

inline Tensor empty_matrix(const Tensor& like, std::initializer_list<int64_t> shape,
                           std::optional<ScalarType> dtype = std::nullopt) {
  return empty_in(like, {shape.begin(), shape.size()}, MemoryFormat::Contiguous, dtype);
}

// The 1x1 convolutions of N x C x H x W tensors as products, in either memory format. `channels` of
// an image tensor are rows of a matrix per image if contiguous, and columns of one matrix for all
// images if channels_last.
struct Pixels {
  int64_t n, pixels;
  bool channels_last;

  // The matrix, or matrices, of `channels` channels in dense memory that `t` owns.
  Tensor matrix(const Tensor& t, int64_t channels) const {
    if (channels_last) return viewed(flat(t), {n * pixels, channels});
    return n == 1 ? viewed(flat(t), {channels, pixels}) : viewed(flat(t), {n, channels, pixels});
  }

  // y = W x
  void convolve(const Tensor& weight, const Tensor& x, const Tensor& y) const {
    if (channels_last)
      multiply(x, torch::stable::transpose(weight, 0, 1), y);
    else
      multiply(per_image(weight), x, y);
  }

  // x's gradient: W^T g
  void convolve_transposed(const Tensor& weight, const Tensor& g, const Tensor& grad_x) const {
    if (channels_last)
      multiply(g, weight, grad_x);
    else
      multiply(per_image(torch::stable::transpose(weight, 0, 1)), g, grad_x);
  }

  // The weight's gradient in float32, [parts, Co, Ci], to be summed over the parts: the images, or
  // where they are one matrix equal cuts of its pixels, so that there is work for a whole GPU and
  // no sum is very long, whatever cuBLAS would do with one product of so many pixels.
  int64_t parts() const {
    if (!channels_last && n > 1) return n;
    const int64_t total = n * pixels;
    for (const int64_t multiple : {8, 1})  // rather aligned ones
      for (int64_t s = std::min<int64_t>(128, total / 256); s > 1; --s)
        if (total % (s * multiple) == 0) return s;
    return 1;
  }
  Tensor weight_parts(const Tensor& g, const Tensor& x, int64_t co, int64_t ci) const {
    const int64_t s = parts(), k = n * pixels / s;
    const auto cut = [&](const Tensor& t, int64_t c, bool transposed) {
      // [s, c, k] or [s, k, c]
      const int64_t next = channels_last ? k * c : n > 1 ? c * k : k;
      const int64_t channel = channels_last ? 1 : pixels, pixel = channels_last ? c : 1;
      return transposed ? strided(t, {s, k, c}, {next, pixel, channel})
                        : strided(t, {s, c, k}, {next, channel, pixel});
    };
    Tensor out = empty_matrix(g, {s, co, ci}, ScalarType::Float);
    multiply_to_float(cut(g, co, false), cut(x, ci, true), out);
    return out;
  }

 private:
  static Tensor strided(const Tensor& t, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
    using torch::stable::detail::from;
    std::array<StableIValue, 4> stack{from(t), from(sizes), from(strides),
                                      from(std::optional<int64_t>())};
    call("aten::as_strided", "", stack.data());
    return torch::stable::detail::to<Tensor>(stack[0]);
  }

  // The elements of a dense tensor in the order of memory.
  static Tensor flat(const Tensor& t) { return strided(t, {t.numel()}, {1}); }

  // One matrix for all images, without a copy.
  Tensor per_image(const Tensor& weight) const {
    using torch::stable::detail::from;
    if (n == 1) return weight;
    std::array<StableIValue, 3> stack{
        from(weight), from(std::vector<int64_t>{n, weight.size(0), weight.size(1)}), from(false)};
    call("aten::expand", "", stack.data());
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
};

}  // namespace sdan_fast::cuda
