// sdan_fast::star_backward.cpu: checks, memory formats and threads of the star's gradients.
#include "isa/star_backward.h"

#include "tensor_util.h"

namespace sdan_fast {
namespace {

const auto kernel = SDAN_PICK_KERNEL(star_backward_run);

std::vector<Tensor> star_backward(const Tensor& grad, const Tensor& a, const Tensor& b,
                                  std::string activation, std::string outer,
                                  std::vector<bool> output_mask) {
  constexpr const char* op = "star_backward";
  check_cpu(a, op, "a");
  StarBackwardArgs args{};
  args.dtype = kernel_dtype(a, op, "a");
  check_same(b, a, op, "b");
  check_same(grad, a, op, "grad_output");
  check_mask(output_mask, 2, op);
  args.activation = parse_activation(activation, op, "activation");
  args.outer = parse_activation(outer, op, "outer");

  const Format format = output_format(a);
  const Tensor a_dense = in_format(a, format);
  const Tensor b_dense = in_format(b, format);
  const Tensor grad_dense = in_format(grad, format);
  args.a = a_dense.const_data_ptr();
  args.b = b_dense.const_data_ptr();
  args.grad = grad_dense.const_data_ptr();
  std::vector<Tensor> grads;
  for (const bool wanted : output_mask) {
    if (wanted) grads.push_back(empty_in_format(a.sizes(), a, format));
  }
  if (grads.empty()) return grads;
  if (output_mask[0]) args.grad_a = grads.front().mutable_data_ptr();
  if (output_mask[1]) args.grad_b = grads.back().mutable_data_ptr();
  // Blocks of 64 keep every thread on whole cache lines; 8k elements are worth a thread.
  constexpr int64_t kBlock = 64;
  const int64_t n = a.numel();
  parallel_for((n + kBlock - 1) / kBlock, 128, [&](int64_t begin, int64_t end) {
    kernel(args, begin * kBlock, end * kBlock < n ? end * kBlock : n);
  });
  if (output_mask[1]) grads.back() = in_format(grads.back(), output_format(b));
  return grads;
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  m.impl("star_backward.cpu", TORCH_BOX(&sdan_fast::star_backward));
}
