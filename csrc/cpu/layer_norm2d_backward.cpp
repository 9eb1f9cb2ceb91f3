// sdan_fast::layer_norm2d_backward.cpu: checks, memory formats and threads of LayerNorm's
// gradients.
#include "isa/layer_norm2d_backward.h"

#include <cstring>

#include "tensor_util.h"

namespace sdan_fast {
namespace {

const auto run_kernel = SDAN_PICK_KERNEL(layer_norm2d_backward_run);
const auto sum_kernel = SDAN_PICK_KERNEL(layer_norm2d_backward_sum);

// Fixed by the shape alone, so that results are the same for any number of threads.
void partition(LayerNormBackwardArgs& args, int64_t images) {
  // Tiles in whole cache lines of pixels, two of them staged in NCHW. A part's sums are chains of
  // at most 64 additions of four pixels, there of four vectors, of which a vector is kept for each
  // channel and added up at the end: so it takes several tiles.
  const int64_t most = args.channels_last ? 256 : 2048;
  args.tile = (args.channels_last ? 16384 : 8192) / args.c / 64 * 64;
  if (args.tile < 64) args.tile = 64;
  if (args.tile > most) args.tile = most;
  args.tiles = (args.pixels + args.tile - 1) / args.tile;
  args.all_tiles = args.tiles * (args.channels_last ? 1 : images);
  const int64_t pixels = args.tile < args.pixels ? args.tile : args.pixels;
  args.part = args.channels_last ? 1 : 65536 / (pixels * args.c);
  if (args.part > most / pixels) args.part = most / pixels;
  if (args.part < 1) args.part = 1;
  args.parts = (args.all_tiles + args.part - 1) / args.part;
}

std::vector<Tensor> layer_norm2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                          std::optional<Tensor> bias, double eps,
                                          std::vector<bool> output_mask) {
  constexpr const char* op = "layer_norm2d_backward";
  check_cpu(x, op, "x");
  LayerNormBackwardArgs args{};
  args.dtype = kernel_dtype(x, op, "x");
  check_like(x, x, 4, op, "x");
  args.c = x.size(1);
  check_vector(weight, x, args.c, op, "weight");
  if (bias.has_value()) check_vector(*bias, x, args.c, op, "bias");
  check_same(grad, x, op, "grad_output");
  check_mask(output_mask, 3, op);
  STD_TORCH_CHECK(bias.has_value() || !output_mask[2], op,
                  ": output_mask asks for the gradient of a bias that is not there");

  const Format format = output_format(x);
  std::vector<Tensor> grads;
  void* target[3] = {};
  for (size_t i = 0; i < 3; ++i) {
    if (!output_mask[i]) continue;
    grads.push_back(i == 0 ? empty_in_format(x.sizes(), x, format)
                           : empty_in_format(weight.sizes(), x, Format::kContiguous));
    target[i] = grads.back().mutable_data_ptr();
  }
  if (grads.empty()) return grads;
  if (x.numel() == 0) {
    const size_t bytes = static_cast<size_t>(args.c) * (args.dtype == DType::kFloat32 ? 4 : 2);
    for (size_t i = 1; i < 3; ++i) {
      if (target[i] != nullptr && bytes > 0) std::memset(target[i], 0, bytes);
    }
    return grads;
  }
  const Tensor x_dense = in_format(x, format);
  const Tensor grad_dense = in_format(grad, format);
  const Tensor weight_dense = in_format(weight, Format::kContiguous);
  args.x = x_dense.const_data_ptr();
  args.grad = grad_dense.const_data_ptr();
  args.weight = weight_dense.const_data_ptr();
  args.grad_x = target[0];
  args.grad_weight = target[1];
  args.grad_bias = target[2];
  args.eps = static_cast<float>(eps);

  const int64_t plane = x.size(2) * x.size(3);
  // A plane of one pixel is laid out the same in both formats; only one of them has lanes to fill.
  args.channels_last = format == Format::kChannelsLast || plane == 1;
  args.pixels = args.channels_last ? x.size(0) * plane : plane;
  partition(args, x.size(0));
  const bool sums = output_mask[1] || output_mask[2];
  if (sums) {
    args.partial = static_cast<float*>(
        thread_scratch(static_cast<size_t>(args.parts * 2 * args.c) * sizeof(float), 1));
  }
  const int64_t pixels = args.tile < args.pixels ? args.tile : args.pixels;
  parallel_for(args.parts, grain_for(args.part * pixels * args.c),
               [&](int64_t begin, int64_t end) { run_kernel(args, begin, end); });
  if (sums) sum_kernel(args);
  return grads;
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  m.impl("layer_norm2d_backward.cpu", TORCH_BOX(&sdan_fast::layer_norm2d_backward));
}
