// The star's torch side: checks, layouts, registration.
#include "torch_side.h"

namespace sdan_fast::cuda {
namespace {

Tensor star_op(Tensor a, Tensor b, std::string activation, std::string outer) {
  const DType dtype = dtype_of(a, "star", "a");
  check_like(b, a, "star", "b", "a");
  const int act = activation_index(activation, "star", "activation"),
            out = activation_index(outer, "star", "outer");
  const MemoryFormat format = format_of(a);
  const OnDevice on(a);
  a = in_format(a, format);
  b = in_format(b, format);
  Tensor y = empty_like_in(a, format);
  if (a.numel() > 0)
    star_forward(dtype, a.data_ptr(), b.data_ptr(), y.data_ptr(), a.numel(), act, out, on.stream());
  return y;
}

std::vector<Tensor> star_backward_op(Tensor grad_output, Tensor a, Tensor b, std::string activation,
                                     std::string outer, std::vector<bool> output_mask) {
  const DType dtype = dtype_of(a, "star_backward", "a");
  check_like(b, a, "star_backward", "b", "a");
  check_like(grad_output, a, "star_backward", "grad_output", "a");
  check_mask(output_mask, 2, "star_backward");
  const int act = activation_index(activation, "star_backward", "activation");
  const int out = activation_index(outer, "star_backward", "outer");
  const MemoryFormat format = format_of(a), format_of_b = format_of(b);
  const OnDevice on(a);
  a = in_format(a, format);
  b = in_format(b, format);
  grad_output = in_format(grad_output, format);
  std::vector<Tensor> grads;
  void* target[2] = {nullptr, nullptr};
  for (size_t i = 0; i < 2; ++i) {
    if (!output_mask[i]) continue;
    grads.push_back(empty_like_in(a, format));
    target[i] = grads.back().data_ptr();
  }
  if (a.numel() > 0 && !grads.empty())
    star_backward(dtype, grad_output.data_ptr(), a.data_ptr(), b.data_ptr(), target[0], target[1],
                  a.numel(), act, out, on.stream());
  if (output_mask[1]) grads.back() = in_format(grads.back(), format_of_b);
  return grads;
}

}  // namespace

SDAN_LIBRARY_IMPL(m) {
  m.impl(SDAN_OVERLOAD("star"), TORCH_BOX(&star_op));
  m.impl(SDAN_OVERLOAD("star_backward"), TORCH_BOX(&star_backward_op));
}

}  // namespace sdan_fast::cuda
