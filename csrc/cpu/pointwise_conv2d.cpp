// sdan_fast::pointwise_conv2d.cpu: checks, packed weights and threads of activation(1x1 convolution of x).
#include "pixels_host.h"

namespace sdan_fast {
namespace {

Tensor pointwise_conv2d(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                        std::string activation) {
  static const auto scratch_kernel = SDAN_PICK_KERNEL(pointwise_conv2d_scratch);
  static const auto run_kernel = SDAN_PICK_KERNEL(pointwise_conv2d_run);
  constexpr const char* op = "pointwise_conv2d";
  check_cpu(x, op, "x");
  const DType dtype = kernel_dtype(x, op, "x");
  check_like(x, x, 4, op, "x");
  check_pointwise(weight, x, weight.size(0), x.size(1), op, "weight");
  const int64_t co = weight.size(0), ci = x.size(1);
  check_optional_vector(bias, x, co, op, "bias");

  Tensor y = empty_in_format({x.size(0), co, x.size(2), x.size(3)}, x, output_format(x));
  if (y.numel() == 0) return y;
  FloatArena arena(dtype);
  PointwiseConvPlan plan{};
  plan.activation = parse_activation(activation, op, "activation");
  plan.conv = pack(arena, weight, bias);
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3);
  plan.tiling = pixel_tiling(pixels, co + ci, 0);
  const Tensor x_dense = dense(x);
  plan.x = pixels_of(x_dense, dtype);
  plan.y = pixels_of(y, dtype);
  int64_t bytes = 0;
  scratch_kernel(&plan, &bytes);
  run_tasks(threads_for(pixels * (co * ci + 8 * (co + ci))), plan.tiling.parts, [&](int64_t part) {
    run_kernel(&plan, part, thread_scratch(static_cast<size_t>(bytes)));
  });
  return y;
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  m.impl("pointwise_conv2d.cpu", TORCH_BOX(&sdan_fast::pointwise_conv2d));
}
