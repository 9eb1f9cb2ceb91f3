// Which kernel a depth-wise convolution takes, and the launches of its weight gradient.
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

bool takes_strips(DType dtype, const ConvShape& s) {
  return (s.kh == 1 || s.kw == 1) && strips_fit(dtype, strip_of(s));
}

// Whether every row of every tensor begins at a multiple of `elements`, and these at one of bytes.
bool aligned_rows(DType dtype, const ConvShape& s, const void* a, const void* b, int64_t elements) {
  const size_t bytes = static_cast<size_t>(elements) * (dtype == DType::kFloat32 ? 4 : 2);
  return s.w % elements == 0 && aligned(a, bytes) && aligned(b, bytes);
}

// 16 bytes.
bool wide_rows(DType dtype, const ConvShape& s, const void* a, const void* b) {
  return aligned_rows(dtype, s, a, b, dtype == DType::kFloat32 ? 4 : 8);
}

}  // namespace

bool conv_fits(DType dtype, const ConvShape& shape, bool weight_gradient) {
  if (weight_gradient) return plan_weight_gradient(shape).fits;
  return takes_strips(dtype, shape) ||
         (shape.channels_last ? plan_last(shape, 1).fits : plan_square(dtype, shape).fits);
}

void conv_forward(DType dtype, const void* x, const void* weight, const void* bias, void* y,
                  const ConvShape& shape, bool flip, Stream stream) {
  if (shape.n * shape.c * shape.h * shape.w == 0) return;
  if (takes_strips(dtype, shape)) {
    StripPass pass = strip_of(shape);
    pass.x = x, pass.y = y, pass.flip = flip;
    pass.strip[0].weight = weight, pass.strip[0].bias = bias;
    return convolve_strips(dtype, pass, stream);
  }
  const ConvArguments a{x, weight, bias, y};
  if (shape.channels_last) return launch_conv_last(dtype, a, shape, flip, stream);
  SquarePlan plan = plan_square(dtype, shape);
  plan.p.flip = flip;
  plan.p.wide = aligned_rows(dtype, shape, x, y, 4);
  plan.config.stream = stream;
  launch_conv_square(a, plan);
}

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
