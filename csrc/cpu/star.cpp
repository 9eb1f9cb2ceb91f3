// sdan_fast::star.cpu: checks, memory format and threads of outer(activation(a) * b).
#include "isa/star.h"

#include "tensor_util.h"

namespace sdan_fast {
namespace {

const auto kernel = SDAN_PICK_KERNEL(star_run);

Tensor star(const Tensor& a, const Tensor& b, std::string activation, std::string outer) {
  check_cpu(a, "star", "a");
  StarArgs args{};
  args.dtype = kernel_dtype(a, "star", "a");
  check_same(b, a, "star", "b");
  args.activation = parse_activation(activation, "star", "activation");
  args.outer = parse_activation(outer, "star", "outer");

  const Format format = output_format(a);
  const Tensor a_dense = in_format(a, format);
  const Tensor b_dense = in_format(b, format);
  Tensor y = empty_in_format(a.sizes(), a, format);
  args.a = a_dense.const_data_ptr();
  args.b = b_dense.const_data_ptr();
  args.y = y.mutable_data_ptr();
  // A thread is worth about 10 us, 16k elements; blocks of 64 keep every thread on whole cache
  // lines.
  constexpr int64_t kBlock = 64;
  const int64_t n = a.numel();
  parallel_for((n + kBlock - 1) / kBlock, 256, [&](int64_t begin, int64_t end) {
    kernel(args, begin * kBlock, end * kBlock < n ? end * kBlock : n);
  });
  return y;
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  m.impl("star.cpu", TORCH_BOX(&sdan_fast::star));
}
