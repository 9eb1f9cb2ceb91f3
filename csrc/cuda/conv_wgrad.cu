// Which kernel a depth-wise convolution's weight gradient takes, and its launches.
#include "conv_wgrad.cuh"

#include "conv_launch.h"
#include "wgrad_launch.h"

namespace sdan_fast::cuda {
namespace {

// The first stage of a weight gradient, by the kernel that takes it.
struct GradPlan {
  bool fits = false;
  enum { kLast, kLastMma, kMma, kTile } kind = kLast;
  WgradLastPlan last;
  GradProductPlan last_mma;
  MmaPlan mma;
  TilePlan tile;
  // Partial sums: rows of taps + 1 floats, and how many are those of one channel of one image.
  int64_t partials = 0, splits = 0;
};

GradPlan choose_plan(DType dtype, const ConvShape& s, int together) {
  GradPlan plan;
  if (s.channels_last && together == 4 && capability() >= 8) {
    plan.last_mma = plan_grad_product(dtype, s);
    plan.kind = GradPlan::kLastMma;
    plan.fits = plan.last_mma.fits, plan.partials = plan.last_mma.partials;
    plan.splits = plan.last_mma.config.grid.x;
    if (plan.fits) return plan;
  }
  if (s.channels_last) {
    plan.last = plan_wgrad_last(dtype, s, static_cast<int>(std::gcd(s.c, int64_t{together})));
    plan.kind = GradPlan::kLast;
    plan.fits = plan.last.fits, plan.partials = plan.last.partials;
    plan.splits = plan.last.config.grid.x;
    return plan;
  }
  if (dtype != DType::kFloat32) {
    plan.mma = plan_wgrad_mma(s);
    plan.kind = GradPlan::kMma;
    plan.fits = plan.mma.fits, plan.partials = plan.mma.partials;
  }
  if (!plan.fits) {
    plan.tile = plan_wgrad_tile(dtype, s);
    plan.kind = GradPlan::kTile;
    plan.fits = plan.tile.fits, plan.partials = plan.tile.partials;
  }
  plan.splits = plan.partials / std::max<int64_t>(1, s.n * s.c);
  return plan;
}

// together: how many channels of a 16-bit channels_last tensor can be read at once, 1, 2 or 4. One
// call asks seven times.
const GradPlan& plan_weight_gradient(DType dtype, const ConvShape& s, int together) {
  if (together == 4)
    return remembered<GradPlan>(dtype, s, [&] { return choose_plan(dtype, s, 4); });
  if (together == 2)
    return remembered<GradPlan>(dtype, s, [&] { return choose_plan(dtype, s, 2); });
  return remembered<GradPlan>(dtype, s, [&] { return choose_plan(dtype, s, 1); });
}

}  // namespace

bool conv_wgrad_fits(DType dtype, const ConvShape& shape) {
  for (const int together : {1, 2, 4})
    if (!plan_weight_gradient(dtype, shape, together).fits) return false;
  return true;
}

int64_t conv_partial_floats(DType dtype, const ConvShape& shape) {
  int64_t most = 0;
  for (const int together : {1, 2, 4})
    most = std::max(most, plan_weight_gradient(dtype, shape, together).partials);
  return most * (int64_t{shape.kh} * shape.kw + 1);
}

SumJob conv_weight_gradient(DType dtype, const void* grad, const void* x, float* partial,
                            void* grad_weight, void* grad_bias, const ConvShape& shape,
                            Stream stream) {
  const int together = aligned(grad, 8) && aligned(x, 8)   ? 4
                       : aligned(grad, 4) && aligned(x, 4) ? 2
                                                           : 1;
  GradPlan plan = plan_weight_gradient(dtype, shape, together);
  const WgradArguments a{grad, x, partial};
  const int wide = wide_rows(dtype, shape, grad, x);
  if (plan.kind == GradPlan::kMma) {
    plan.mma.p.wide = wide, plan.mma.config.stream = stream;
    launch_wgrad_mma(dtype, a, plan.mma);
  } else if (plan.kind == GradPlan::kTile) {
    plan.tile.p.wide = wide, plan.tile.config.stream = stream;
    launch_wgrad_tile(dtype, a, plan.tile);
  } else if (plan.kind == GradPlan::kLastMma) {
    plan.last_mma.config.stream = stream;
    launch_wgrad_mma_last(dtype, a, plan.last_mma);
  } else {
    plan.last.config.stream = stream;
    launch_wgrad_last(dtype, a, plan.last);
  }
  const int64_t taps = int64_t{shape.kh} * shape.kw, c = shape.c, splits = plan.splits;
  return {partial, shape.channels_last
                       ? weight_sums(dtype, grad_weight, grad_bias, c, taps, 1, splits, 0, 1, c)
                       : weight_sums(dtype, grad_weight, grad_bias, c, taps, shape.n, splits,
                                     c * splits, splits, 1)};
}

}  // namespace sdan_fast::cuda
