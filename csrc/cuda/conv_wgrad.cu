// Which kernel a depth-wise convolution's weight gradient takes, and its launches.
#include "conv_wgrad.cuh"

#include "conv_launch.h"
#include "wgrad_launch.h"

namespace sdan_fast::cuda {
namespace {

// The first stage of a weight gradient, by the kernel that takes it.
struct GradPlan {
  bool fits = false;
  enum { kLast, kMma, kTile } kind = kLast;
  WgradLastPlan last;
  MmaPlan mma;
  TilePlan tile;
  // Partial sums: rows of taps + 1 floats, and how many are those of one channel of one image.
  int64_t partials = 0, splits = 0;
};

GradPlan choose_plan(DType dtype, const ConvShape& s, bool paired) {
  GradPlan plan;
  if (s.channels_last) {
    plan.last = plan_wgrad_last(dtype, s, paired && s.c % 2 == 0);
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

// paired: two channels of a 16-bit channels_last tensor can be read at once. One call asks five
// times.
const GradPlan& plan_weight_gradient(DType dtype, const ConvShape& s, bool paired) {
  if (paired) return remembered<GradPlan>(dtype, s, [&] { return choose_plan(dtype, s, true); });
  return remembered<GradPlan>(dtype, s, [&] { return choose_plan(dtype, s, false); });
}

}  // namespace

bool conv_wgrad_fits(DType dtype, const ConvShape& shape) {
  return plan_weight_gradient(dtype, shape, true).fits &&
         plan_weight_gradient(dtype, shape, false).fits;
}

int64_t conv_partial_floats(DType dtype, const ConvShape& shape) {
  return std::max(plan_weight_gradient(dtype, shape, true).partials,
                  plan_weight_gradient(dtype, shape, false).partials) *
         (int64_t{shape.kh} * shape.kw + 1);
}

void conv_weight_gradient(DType dtype, const void* grad, const void* x, float* partial,
                          void* grad_weight, void* grad_bias, const ConvShape& shape,
                          Stream stream) {
  GradPlan plan = plan_weight_gradient(dtype, shape, aligned(grad, 4) && aligned(x, 4));
  const WgradArguments a{grad, x, partial};
  const int wide = wide_rows(dtype, shape, grad, x);
  if (plan.kind == GradPlan::kMma) {
    plan.mma.p.wide = wide, plan.mma.config.stream = stream;
    launch_wgrad_mma(dtype, a, plan.mma);
  } else if (plan.kind == GradPlan::kTile) {
    plan.tile.p.wide = wide, plan.tile.config.stream = stream;
    launch_wgrad_tile(dtype, a, plan.tile);
  } else {
    plan.last.config.stream = stream;
    launch_wgrad_last(dtype, a, plan.last);
  }
  const int64_t taps = int64_t{shape.kh} * shape.kw, c = shape.c, splits = plan.splits;
  sum_parts(partial,
            shape.channels_last
                ? weight_sums(dtype, grad_weight, grad_bias, c, taps, 1, splits, 0, 1, c)
                : weight_sums(dtype, grad_weight, grad_bias, c, taps, shape.n, splits, c * splits,
                              splits, 1),
            stream);
}

}  // namespace sdan_fast::cuda
