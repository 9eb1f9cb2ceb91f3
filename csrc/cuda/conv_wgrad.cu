// Launches of a depth-wise convolution's weight gradient.
#include "conv_launch.h"
#include "wgrad_plan.h"

namespace sdan_fast::cuda {

int64_t conv_partial_floats(const ConvShape& shape) {
  return plan_weight_gradient(shape).partials * (int64_t{shape.kh} * shape.kw + 1);
}

void conv_weight_gradient(DType dtype, const void* grad, const void* x, float* partial,
                          void* grad_weight, void* grad_bias, const ConvShape& shape,
                          Stream stream) {
  GradPlan plan = plan_weight_gradient(shape);
  plan.p.dtype = dtype;
  plan.p.wide = wide_rows(dtype, shape, grad, x);
  plan.config.stream = stream;
  const int taps = shape.kh * shape.kw, channels = static_cast<int>(shape.c);
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto *tg = static_cast<const T*>(grad), *tx = static_cast<const T*>(x);
    if (shape.channels_last)
      launch("wgrad_last", wgrad_last_kernel<T>, plan.config, tg, tx, partial, plan.p);
    else if (plan.p.vertical)
      launch("wgrad_tile", wgrad_tile_kernel<true>, plan.config, grad, x, partial, plan.p,
             plan.warps_per_unit);
    else
      launch("wgrad_tile", wgrad_tile_kernel<false>, plan.config, grad, x, partial, plan.p,
             plan.warps_per_unit);
    Config c;
    c.block = dim3(256);
    c.grid = dim3(
        static_cast<unsigned>(std::min<int64_t>(ceil_div(shape.c * (taps + 1), 256), kMostBlocks)));
    c.stream = stream;
    const int64_t splits = shape.channels_last ? plan.config.grid.x : plan.p.splits;
    const int64_t images = shape.channels_last ? 1 : shape.n;
    const int64_t per_channel = shape.channels_last ? 1 : splits,
                  per_split = shape.channels_last ? shape.c : 1;
    launch("wgrad_finish", wgrad_finish_kernel<T>, c, static_cast<const float*>(partial),
           static_cast<T*>(grad_weight), static_cast<T*>(grad_bias), channels, taps, images,
           static_cast<int>(splits), shape.c * splits, per_channel, per_split);
  });
}

}  // namespace sdan_fast::cuda
