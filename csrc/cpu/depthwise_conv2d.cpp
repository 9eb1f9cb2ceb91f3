// sdan_fast::depthwise_conv2d.cpu: checks, memory format, tiling and threads; its backward is that
// of a branch of one convolution.
#include "isa/depthwise_conv2d.h"

#include "branches_backward.h"
#include "flat_conv.h"
#include "tensor_util.h"
#include "tiling.h"

namespace sdan_fast {
namespace {

const auto kernel = SDAN_PICK_KERNEL(depthwise_conv2d_run);

// Whether rows become lanes: a strip along them with the taps that pay for two transpositions
// (measured), whose last rows leave few lanes empty and whose columns stay in a second-level cache.
bool turns_rows(const DepthwiseArgs& a) {
  constexpr int64_t kMostColumns = 8192;
  if (a.kh_used != 1 || picked_isa() == Isa::kPortable) return false;
  const bool wide = a.dtype == DType::kFloat32;
  const int64_t least = picked_isa() == Isa::kAvx512 ? (wide ? 13 : 11) : (wide ? 7 : 5);
  const int64_t lanes = vector_lanes();
  return a.kw_used >= least && 4 * a.h >= 3 * ((a.h + lanes - 1) / lanes * lanes) &&
         a.w + (a.kw_used - 1) * a.dw <= kMostColumns;
}

// Few columns of taps are read in place. Many are not: the masks of a row's ends then cost as much
// as a copy, 16-bit numbers are converted once for each of them, and tall kernels leave out little.
RowOrder row_order(const DepthwiseArgs& a) {
  const bool wide = a.dtype == DType::kFloat32;
  const int64_t rows = a.kh_used;
  const int64_t columns = a.kw_used;
  if (turns_rows(a)) return RowOrder::kLanes;
  if (columns > (rows > 5 ? 7 : (wide ? 21 : 11))) return RowOrder::kTiles;
  // What does not stay in the last cache is moved fastest as one stream in and one out, if each
  // input need not be loaded much more often for that.
  const int64_t bytes = 2 * a.n * a.c * a.h * a.w * (wide ? 4 : 2);
  const bool single = bytes > (int64_t{1} << 25) && rows <= 3 && rows * columns <= 11;
  return rows == 1 || single ? RowOrder::kSingle : RowOrder::kFours;
}

// Sets args->lanes and args->grid. A tile has half a megabyte, of a second-level cache; the rows
// being read should have 32 KB per vector of channels, of the first. In channels_last a tile of
// several vectors reads whole cache lines, but large halos want the space for pixels.
void choose_tiles(DepthwiseArgs* args, int64_t halo_h, int64_t halo_w) {
  TileProblem problem = {
      args->h, args->w, halo_h, halo_w, 1, true, 128 * 1024, halo_h + 4 * args->dh, 8 * 1024};
  double ratio = 0.0;
  if (!args->channels_last) {
    args->lanes = 1;
    args->order = row_order(*args);
    if (args->order != RowOrder::kTiles) {
      args->grid = {args->h, args->w, 1, 1};
      return;
    }
    args->grid = make_tiles(problem, &ratio);
    return;
  }
  const int64_t vec = vector_lanes();
  const int64_t vecs = (args->c + vec - 1) / vec;
  double best = 0.0;
  for (int64_t group = kGroupChannels / vec; group >= 1; group /= 2) {
    if (group > vecs && group > 1) {
      if (group / 2 >= vecs) continue;
      group = vecs;
    }
    problem.pixel_floats = group * vec;
    problem.window_budget = group * 8 * 1024;
    const TileGrid grid = make_tiles(problem, &ratio);
    if (best == 0.0 || ratio < 0.8 * best) {
      best = ratio;
      args->lanes = group * vec;
      args->grid = grid;
    }
    if (ratio <= 1.25) break;
  }
}

Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                        std::vector<int64_t> dilation) {
  constexpr const char* op = "depthwise_conv2d";
  check_cpu(x, op, "x");
  DepthwiseArgs args{};
  args.dtype = kernel_dtype(x, op, "x");
  check_like(x, x, 4, op, "x");
  check_like(weight, x, 4, op, "weight");
  args.n = x.size(0);
  args.c = x.size(1);
  args.h = x.size(2);
  args.w = x.size(3);
  args.kh = weight.size(2);
  args.kw = weight.size(3);
  STD_TORCH_CHECK(
      weight.size(0) == args.c && weight.size(1) == 1 && args.kh % 2 == 1 && args.kw % 2 == 1, op,
      ": weight must have shape (", args.c, ", 1, kh, kw) with odd kh and kw, got ",
      shape_of(weight));
  STD_TORCH_CHECK(dilation.size() == 2 && dilation[0] >= 1 && dilation[1] >= 1, op,
                  ": dilation must be two positive integers");
  STD_TORCH_CHECK(args.kh < (1 << 20) && args.kw < (1 << 20) && dilation[0] < (1 << 30) &&
                      dilation[1] < (1 << 30),
                  op, ": kernel size or dilation is too large");
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

  const UsedTaps rows = used_taps(args.kh, dilation[0], args.h);
  const UsedTaps columns = used_taps(args.kw, dilation[1], args.w);
  args.i0 = rows.first;
  args.kh_used = rows.count;
  args.dh = rows.count == 1 ? 1 : dilation[0];
  args.j0 = columns.first;
  args.kw_used = columns.count;
  args.dw = columns.count == 1 ? 1 : dilation[1];
  // A plane of one pixel is laid out the same in both formats; only one of them has lanes to fill.
  args.channels_last = format == Format::kChannelsLast || args.h * args.w == 1;

  if (args.channels_last && reads_flat(args)) {
    run_flat(args);
    return y;
  }
  const int64_t halo_h = (args.kh_used - 1) * args.dh;
  const int64_t halo_w = (args.kw_used - 1) * args.dw;
  const int64_t taps = args.kh_used * args.kw_used;
  choose_tiles(&args, halo_h, halo_w);
  const int64_t per_tile = args.n * ((args.c + args.lanes - 1) / args.lanes);
  const int64_t work = x.numel() * (taps + 8);
  if (work > (1 << 20)) {
    refine_tiles(&args.grid, args.h, halo_h, per_tile, 4 * torch::stable::get_num_threads());
  }
  if (args.order == RowOrder::kLanes) {
    const int64_t lanes = vector_lanes();
    args.grid.tile_h = (args.grid.tile_h + lanes - 1) / lanes * lanes;
    args.grid.tiles_h = (args.h + args.grid.tile_h - 1) / args.grid.tile_h;
  }
  const int64_t tasks = per_tile * args.grid.tiles_h * args.grid.tiles_w;
  // About 16 multiply-adds a nanosecond: a thread's share should last some ten microseconds.
  parallel_for(tasks, grain_for(work / tasks / 4),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

std::vector<Tensor> depthwise_conv2d_backward(const Tensor& grad_output, const Tensor& x,
                                              const Tensor& weight, std::optional<Tensor> bias,
                                              std::vector<int64_t> dilation,
                                              std::vector<bool> output_mask) {
  constexpr const char* op = "depthwise_conv2d_backward";
  STD_TORCH_CHECK(output_mask.size() == 3, op, ": output_mask must have 3 entries, got ",
                  output_mask.size());
  if (!bias.has_value()) output_mask.pop_back();
  std::vector<Tensor> biases;
  if (bias.has_value()) biases.push_back(*bias);
  return branches_backward({.op = op,
                            .x = x,
                            .grad = grad_output,
                            .weights = {weight},
                            .biases = biases,
                            .bias_mask = {bias.has_value()},
                            .dilations = dilation,
                            .lengths = {1},
                            .output_mask = output_mask,
                            .format = output_format(x),
                            .addend = std::nullopt});
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  m.impl("depthwise_conv2d.cpu", TORCH_BOX(&sdan_fast::depthwise_conv2d));
  if (sdan_fast::rounds_products_once()) {
    m.impl("depthwise_conv2d_backward.cpu", TORCH_BOX(&sdan_fast::depthwise_conv2d_backward));
  }
}
