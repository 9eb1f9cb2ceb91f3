// sdan_fast::pointwise_gate.cpu: checks, memory format, packed weights and threads.
#include "isa/pointwise_gate.h"

#include "gate.h"
#include "pixels_host.h"
#include "tensor_util.h"

namespace sdan_fast {
namespace {

const auto pack = SDAN_PICK_KERNEL(pointwise_gate_pack);
const auto kernel = SDAN_PICK_KERNEL(pointwise_gate_run);

Tensor pointwise_gate(const Tensor& u, const Tensor& x, const Tensor& weight,
                      std::optional<Tensor> bias) {
  constexpr const char* op = "pointwise_gate";
  check_cpu(u, op, "u");
  PointwiseGateArgs args{};
  args.dtype = kernel_dtype(u, op, "u");
  check_like(u, u, 4, op, "u");
  check_like(x, u, 4, op, "x");
  check_like(weight, u, 4, op, "weight");
  args.ci = x.size(1);
  args.co = u.size(1);
  STD_TORCH_CHECK(x.size(0) == u.size(0) && x.size(2) == u.size(2) && x.size(3) == u.size(3), op,
                  ": x must have the batch, height and width of u, ", shape_of(u), ", got ",
                  shape_of(x));
  STD_TORCH_CHECK(weight.size(0) == args.co && weight.size(1) == args.ci && weight.size(2) == 1 &&
                      weight.size(3) == 1,
                  op, ": weight must have shape (", args.co, ", ", args.ci, ", 1, 1), got ",
                  shape_of(weight));
  STD_TORCH_CHECK(args.ci > 0 && args.ci < (1 << 24) && args.co < (1 << 24), op,
                  ": x must have between 1 and 2^24 - 1 channels and u no more, got ", args.ci,
                  " and ", args.co);
  if (bias.has_value()) check_vector(*bias, u, args.co, op, "bias");

  const Format format = output_format(u);
  Tensor y = empty_in_format(u.sizes(), u, format);
  if (u.numel() == 0) return y;
  FloatArena arena(args.dtype);
  if (arena.pairs() && !arena.tiles() && format == Format::kContiguous) {
    // The network's own gate packs its pairs.
    GatePlan plan{};
    plan.height = u.size(2);
    plan.width = u.size(3);
    plan.gate = sdan_fast::pack(arena, weight, bias);
    plan.u = view_of(x, args.dtype);
    plan.x = view_of(u, args.dtype);
    plan.out = view_of(y, args.dtype);
    run_gate(plan, u.size(0));
    return y;
  }
  const Tensor u_dense = in_format(u, format);
  const Tensor x_dense = in_format(x, format);
  const int64_t plane = u.size(2) * u.size(3);
  // A plane of one pixel is laid out the same in both formats; only one of them has lanes to fill.
  args.channels_last = format == Format::kChannelsLast || plane == 1;
  if (arena.tiles() && (!args.channels_last || args.ci % 2 == 0)) {
    PointwiseConvPlan plan{};
    const int64_t pixels = u.size(0) * plane;
    plan.pixel_tiles = args.channels_last;
    plan.conv = plan.pixel_tiles ? pack_pixel_tiles(arena, weight, bias, pixels)
                                 : sdan_fast::pack(arena, weight, bias);
    plan.x = pixels_of(x_dense, args.dtype);
    plan.u = pixels_of(u_dense, args.dtype);
    plan.y = pixels_of(y, args.dtype);
    run_pointwise_conv(plan, pixels);
    return y;
  }
  const Tensor weight_dense = in_format(weight, Format::kContiguous);
  std::optional<Tensor> bias_dense;
  if (bias.has_value()) bias_dense = in_format(*bias, Format::kContiguous);
  args.u = u_dense.const_data_ptr();
  args.x = x_dense.const_data_ptr();
  args.weight = weight_dense.const_data_ptr();
  args.bias = bias_dense.has_value() ? bias_dense->const_data_ptr() : nullptr;
  args.y = y.mutable_data_ptr();

  args.pairs = arena.pairs() && args.channels_last && args.ci % 2 == 0;
  args.pixels = args.channels_last ? u.size(0) * plane : plane;
  // A tile of both sides stays in the second-level cache; 384 is a multiple of every chunk of it.
  // By the shape alone, so that no sum depends on the number of threads: images of few tiles have
  // smaller ones.
  constexpr int64_t kTile = 384;
  const int64_t units = 65536 / ((args.ci + args.co) * kTile);
  const int64_t images = args.channels_last ? 1 : u.size(0);
  args.tile = kTile * std::clamp<int64_t>(units, 1, 4);
  if (args.pixels * images < 16 * args.tile) args.tile = kTile / 2;
  args.tiles = (args.pixels + args.tile - 1) / args.tile;
  args.packed = static_cast<float*>(thread_scratch(
      static_cast<size_t>(pointwise_gate_packed_floats(args.ci, args.co)) * sizeof(float), 1));
  pack(args);
  const int64_t pixels = args.tile < args.pixels ? args.tile : args.pixels;
  // 16 multiply-adds a cycle: a thread's share should last some five microseconds.
  parallel_for(args.tiles * images, grain_for(pixels * args.co * (args.ci + 8) / 16),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  m.impl("pointwise_gate.cpu", TORCH_BOX(&sdan_fast::pointwise_gate));
}
