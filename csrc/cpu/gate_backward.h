// The gradients of u * (1x1 convolution of x), for pointwise_gate's and mm_lka's backward, and of
// activation(1x1 convolution of x), for pointwise_conv2d's.
#pragma once

#include "pixels_host.h"

namespace sdan_fast {

// Images may have dtypes of their own; there is u, or an activation. u's and x's gradients go where
// `gu` and `gx` are, dense in either format; weight's and bias's are returned.
struct GateBackward {
  Tensor grad;
  std::optional<Tensor> u;
  Tensor x, weight;
  std::optional<Tensor> bias;
  std::optional<Tensor> gu, gx;
  bool weight_wanted, bias_wanted;
  Activation activation = Activation::kNone;
};

struct GateParameters {
  std::optional<Tensor> weight, bias;
};

inline GateParameters run_gate_backward(const GateBackward& call, const char* op) {
  static const auto scratch_kernel = SDAN_PICK_KERNEL(gate_backward_scratch);
  static const auto run_kernel = SDAN_PICK_KERNEL(gate_backward_run);
  const int64_t co = call.weight.size(0), ci = call.weight.size(1);
  const int64_t pixels = call.grad.size(0) * call.grad.size(2) * call.grad.size(3);
  const bool need_m = call.gx.has_value() || call.weight_wanted || call.bias_wanted;
  GateParameters result;
  if (!call.gu.has_value() && !need_m) return result;
  const bool need_product = call.gu.has_value() || call.activation != Activation::kNone;
  FloatArena arena(DType::kFloat32);  // 16-bit images are computed on in float32
  GateBackwardPlan plan{};
  plan.co = static_cast<int>(co);
  plan.ci = static_cast<int>(ci);
  plan.activation = call.activation;
  plan.weight = call.weight_wanted;
  plan.bias = call.bias_wanted;
  plan.tiling = pixel_tiling(pixels, co + ci, co * ci);
  const Sums sums(arena, plan.tiling, plan.bias || plan.weight ? co : 0, plan.weight ? ci : 0);
  plan.sums = sums.parts();
  std::vector<Tensor> kept;  // dense copies
  const auto view = [&](const Tensor& t, const char* name) {
    kept.push_back(dense(t));
    return pixels_of(kept.back(), kernel_dtype(t, op, name));
  };
  plan.grad = view(call.grad, "grad_output");
  if (need_m && call.u.has_value()) plan.u = view(*call.u, "u");
  if (need_product || plan.weight) plan.x = view(call.x, "x");
  if (call.gu.has_value()) plan.gu = view(*call.gu, "u's gradient");
  if (call.gx.has_value()) plan.gx = view(*call.gx, "x's gradient");
  const float* weight = arena.values(call.weight);
  int64_t products = 0;
  if (need_product) {
    plan.forward = pack(arena, weight, arena.values_or(call.bias, co, 0.0f), co, ci);
    ++products;
  }
  if (call.gx.has_value()) {
    plan.transposed = pack_transposed(arena, weight, co, ci);
    ++products;
  }
  products += plan.weight ? 1 : 0;
  int64_t bytes = 0;
  scratch_kernel(&plan, &bytes);
  const int64_t work = pixels * (co * ci * products + 8 * (co + ci));
  run_tasks(threads_for(work), plan.tiling.parts, [&](int64_t part) {
    run_kernel(&plan, part, thread_scratch(static_cast<size_t>(bytes)));
  });
  const DType dtype = kernel_dtype(call.weight, op, "weight");
  if (plan.weight) result.weight = rounded(sums.products(), call.weight, dtype);
  if (plan.bias) result.bias = rounded(sums.rows(), *call.bias, dtype);
  return result;
}

}  // namespace sdan_fast
