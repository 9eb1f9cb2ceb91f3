// sdan_fast::pointwise_conv2d.cpu and its backward: checks, packed weights and threads of
// activation(1x1 convolution of x).
#include "gate_backward.h"
#include "star_chain.h"
#include "tiling.h"

namespace sdan_fast {
namespace {

Tensor pointwise_conv2d(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                        std::string activation) {
  static const auto pack_kernel = SDAN_PICK_KERNEL(pack_output_products);
  constexpr const char* op = "pointwise_conv2d";
  const DType dtype = check_image(x, op);
  check_pointwise(weight, x, -1, x.size(1), op, "weight");
  const int64_t co = weight.size(0), ci = x.size(1);
  check_optional_vector(bias, x, co, op, "bias");

  Tensor y = empty_in_format({x.size(0), co, x.size(2), x.size(3)}, x, output_format(x));
  if (y.numel() == 0) return y;
  FloatArena arena(dtype);
  PointwiseConvPlan plan{};
  plan.activation = parse_activation(activation, op, "activation");
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3);
  const Tensor x_dense = dense(x);
  plan.x = pixels_of(x_dense, dtype);
  plan.y = pixels_of(y, dtype);
  const bool rows = dense_pixels(plan.x, ci, pixels) && dense_pixels(plan.y, co, pixels);
  if (rows && arena.tiles() && ci % 2 == 0) {
    plan.pixel_tiles = true;
    plan.conv = pack_pixel_tiles(arena, weight, bias, pixels);
  } else if (rows && !arena.pairs() && 2 * co >= vector_lanes()) {
    // Vectors along the outputs save turning the pixels around, unless most of their lanes are
    // empty. Pairs of bfloat16 are made from planes.
    FloatArena values(arena);
    float* packed = arena.take(output_products_floats(ci, co));
    plan.conv = {nullptr, nullptr, static_cast<int>(ci), static_cast<int>(co), false, nullptr};
    pack_kernel(values.values(weight), values.values_or(bias, co, 0.0f), plan.conv.co, plan.conv.ci,
                packed);
    plan.outputs = packed;
  } else {
    plan.conv = pack(arena, weight, bias);
  }
  run_pointwise_conv(plan, pixels);
  return y;
}

std::vector<Tensor> pointwise_conv2d_backward(const Tensor& grad_output, const Tensor& x,
                                              const Tensor& weight, std::optional<Tensor> bias,
                                              std::string activation,
                                              std::vector<bool> output_mask) {
  constexpr const char* op = "pointwise_conv2d_backward";
  check_image(x, op);
  check_pointwise(weight, x, -1, x.size(1), op, "weight");
  check_optional_vector(bias, x, weight.size(0), op, "bias");
  check_like(grad_output, x, 4, op, "grad_output");
  STD_TORCH_CHECK(grad_output.size(0) == x.size(0) && grad_output.size(1) == weight.size(0) &&
                      grad_output.size(2) == x.size(2) && grad_output.size(3) == x.size(3),
                  op, ": grad_output must have the output's shape, got ", shape_of(grad_output));
  check_mask(output_mask, 3, op);
  STD_TORCH_CHECK(bias.has_value() || !output_mask[2], op,
                  ": output_mask asks for the gradient of a bias that is not there");

  GateBackward call{grad_output,
                    std::nullopt,
                    x,
                    weight,
                    bias,
                    std::nullopt,
                    std::nullopt,
                    output_mask[1],
                    output_mask[2],
                    parse_activation(activation, op, "activation")};
  if (output_mask[0]) call.gx = empty_in_format(x.sizes(), x, output_format(x));
  const GateParameters found = run_gate_backward(call, op);
  std::vector<Tensor> grads;
  for (const auto& g : {call.gx, found.weight, found.bias}) {
    if (g.has_value()) grads.push_back(*g);
  }
  return grads;
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  m.impl("pointwise_conv2d.cpu", TORCH_BOX(&sdan_fast::pointwise_conv2d));
  m.impl("pointwise_conv2d_backward.cpu", TORCH_BOX(&sdan_fast::pointwise_conv2d_backward));
}
