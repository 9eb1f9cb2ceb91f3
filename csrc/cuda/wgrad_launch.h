// What the conv_wgrad*.cu files share: one for each family of kernels, so that they compile at the
// same time.
#pragma once

#include "product_plan.h"
#include "wgrad_plan.h"

namespace sdan_fast::cuda {

struct WgradArguments {
  const void *grad, *x;
  float* partial;
};

void launch_wgrad_mma(DType dtype, const WgradArguments& a, const MmaPlan& plan);
void launch_wgrad_mma_last(DType dtype, const WgradArguments& a, const GradProductPlan& plan);
void launch_wgrad_last(DType dtype, const WgradArguments& a, const WgradLastPlan& plan);
void launch_wgrad_tile(DType dtype, const WgradArguments& a, const TilePlan& plan);

}  // namespace sdan_fast::cuda
