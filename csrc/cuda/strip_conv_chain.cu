// Which kernel a pass of strips takes.
#include "strip_launch.h"

namespace sdan_fast::cuda {

bool strips_fit(DType dtype, const StripPass& pass) {
  return plan_strips(dtype, pass).fits;
}

bool convolve_strips(DType dtype, const StripPass& pass, Stream stream) {
  if (pass.n * pass.c * pass.h * pass.w == 0) return true;
  StripPlan plan = plan_strips(dtype, pass);
  if (!plan.fits) return false;
  plan.config.stream = stream;
  const auto run = pass.channels_last ? launch_column_last
                   : pass.vertical    ? launch_column
                                      : launch_row;
  run(pass, plan);
  return true;
}

}  // namespace sdan_fast::cuda
