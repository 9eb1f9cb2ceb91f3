// Which kernel a depth-wise convolution takes.
#include "conv_launch.h"

namespace sdan_fast::cuda {
namespace {

// A strip as a pass of one convolution; `vertical` also for a single tap.
StripPass strip_of(const ConvShape& s) {
  StripPass pass;
  pass.n = s.n, pass.c = s.c, pass.h = s.h, pass.w = s.w;
  pass.channels_last = s.channels_last, pass.vertical = s.kw == 1;
  pass.strip[0].taps = pass.vertical ? s.kh : s.kw;
  pass.strip[0].dilation = pass.vertical ? s.dh : s.dw;
  return pass;
}

bool is_strip(const ConvShape& s) {
  return s.kh == 1 || s.kw == 1;
}

}  // namespace

bool conv_fits(DType dtype, const ConvShape& shape) {
  return (is_strip(shape) && strips_fit(dtype, strip_of(shape))) ||
         (shape.channels_last ? plan_last<1>(dtype, shape).fits : plan_square(dtype, shape).fits);
}

void conv_forward(DType dtype, const void* x, const void* weight, const void* bias, void* y,
                  const ConvShape& shape, bool flip, Stream stream) {
  if (shape.n * shape.c * shape.h * shape.w == 0) return;
  if (is_strip(shape)) {
    StripPass pass = strip_of(shape);
    pass.x = x, pass.y = y, pass.flip = flip;
    pass.strip[0].weight = weight, pass.strip[0].bias = bias;
    if (convolve_strips(dtype, pass, stream)) return;
  }
  const ConvArguments a{x, weight, bias, y};
  // sm_75 has tensor cores for fp16, but too little shared memory for channels_last tiles of it.
  if (shape.channels_last && capability() >= 8 && aligned(x, 8) && aligned(y, 8)) {
    if (LastProductPlan plan = plan_last_product(dtype, shape); plan.fits) {
      plan.p.flip = flip;
      plan.config.stream = stream;
      return launch_conv_mma_last(dtype, a, plan);
    }
  }
  if (shape.channels_last) return launch_conv_last(dtype, a, shape, flip, stream);
  if (tensor_cores(dtype)) {
    if (ProductPlan plan = plan_product(dtype, shape); plan.fits) {
      plan.p.flip = flip;
      plan.p.wide = aligned_rows(dtype, shape, x, y, 4);
      plan.config.stream = stream;
      return launch_conv_mma(dtype, a, plan);
    }
  }
  SquarePlan plan = plan_square(dtype, shape);
  plan.p.flip = flip;
  plan.p.wide = aligned_rows(dtype, shape, x, y, 4);
  plan.config.stream = stream;
  launch_conv_square(a, plan);
}

}  // namespace sdan_fast::cuda
