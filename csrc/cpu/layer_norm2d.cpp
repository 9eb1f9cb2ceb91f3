// sdan_fast::layer_norm2d.cpu: checks, memory format and threads of the LayerNorm over channels.
#include "isa/layer_norm2d.h"

#include "tensor_util.h"

namespace sdan_fast {
namespace {

const auto kernel = SDAN_PICK_KERNEL(layer_norm2d_run);

Tensor layer_norm2d(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, double eps) {
  constexpr const char* op = "layer_norm2d";
  check_cpu(x, op, "x");
  LayerNormArgs args{};
  args.dtype = kernel_dtype(x, op, "x");
  check_like(x, x, 4, op, "x");
  args.c = x.size(1);
  check_vector(weight, x, args.c, op, "weight");
  if (bias.has_value()) check_vector(*bias, x, args.c, op, "bias");

  const Format format = output_format(x);
  Tensor y = empty_in_format(x.sizes(), x, format);
  if (x.numel() == 0) return y;
  const Tensor x_dense = in_format(x, format);
  const Tensor weight_dense = in_format(weight, Format::kContiguous);
  std::optional<Tensor> bias_dense;
  if (bias.has_value()) bias_dense = in_format(*bias, Format::kContiguous);
  args.x = x_dense.const_data_ptr();
  args.weight = weight_dense.const_data_ptr();
  args.bias = bias_dense.has_value() ? bias_dense->const_data_ptr() : nullptr;
  args.y = y.mutable_data_ptr();
  args.eps = static_cast<float>(eps);

  const int64_t plane = x.size(2) * x.size(3);
  // A plane of one pixel is laid out the same in both formats; only one of them has lanes to fill.
  args.channels_last = format == Format::kChannelsLast || plane == 1;
  args.pixels = args.channels_last ? x.size(0) * plane : plane;
  // Tiles in whole cache lines of pixels: of a first-level cache in NCHW, where each is staged.
  args.tile = (args.channels_last ? 16384 : 8192) / args.c / 64 * 64;
  if (args.tile < 64) args.tile = 64;
  args.tiles = (args.pixels + args.tile - 1) / args.tile;
  const int64_t tasks = args.tiles * (args.channels_last ? 1 : x.size(0));
  parallel_for(tasks, grain_for((args.tile < args.pixels ? args.tile : args.pixels) * args.c),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  m.impl("layer_norm2d.cpu", TORCH_BOX(&sdan_fast::layer_norm2d));
}
