// sdan_fast::strip_conv_chain.cpu and gated_strip_conv_chain.cpu: checks, memory format, tiling and
// threads; the chain's backward is that of one branch.
#include "isa/strip_conv_chain.h"

#include <vector>

#include "branches_backward.h"
#include "flat_conv.h"
#include "isa/flat.h"
#include "tensor_util.h"
#include "tiling.h"

namespace sdan_fast {
namespace {

const auto tile_kernel = SDAN_PICK_KERNEL(strip_conv_chain_run);
const auto flat_kernel = SDAN_PICK_KERNEL(flat_chain_run);

// The rows that no dilation of the vertical strips cuts into small groups.
int64_t row_group(const std::vector<StripArgs>& vertical) {
  int64_t group = 4;
  for (const StripArgs& s : vertical) group = 4 * s.d > group ? 4 * s.d : group;
  return group;
}

// Bands of at least `least` rows.
int64_t band_of(int64_t least, int64_t group, int64_t h) {
  const int64_t band = (least + group - 1) / group * group;
  return band < h ? band : h;
}

// Whether the rows of a channels_last image are read in place, which may not depend on the number
// of threads, as these kernels' last bits differ from the others'; and if so the bands and tiles
// (each output is the same sum in any tile): columns whose windows stay in a second-level cache,
// but not of a few pixels beside what the later stages see, and at least one for each thread.
bool reads_flat(StripChainArgs* args, const std::vector<StripArgs>& vertical, int64_t work) {
  constexpr int64_t kWindow = 256 * 1024, kMost = 16 * 1024 * 1024;  // floats
  // Tiles of 16 long lanes are as fast where they are converted anyway.
  if (args->dtype != DType::kFloat32 && picked_isa() == Isa::kAvx512) return false;
  if (!loads_flat(args->dtype) || args->c < vector_lanes() || args->halo_h > args->h ||
      args->w * args->c > kMost) {
    return false;
  }
  args->band = band_of(16, row_group(vertical), args->h);
  int64_t rows = args->band;
  for (const StripArgs& s : vertical) rows += strip_level_rows(args->band, (s.used - 1) * s.d);
  const StripArgs& first = args->horizontal[0];
  const int64_t beside = args->halo_w - (first.used - 1) * first.d;
  int64_t tw = kWindow / (rows * args->c) - beside;
  const int64_t narrow = 4 * beside > 64 ? 4 * beside : 64;
  if (tw < narrow) tw = narrow;
  // Where hardly a row is read twice, whole ones move fastest.
  const bool whole = 2 * args->halo_h < args->band;
  if (whole) tw = args->w;
  if (rows * (tw + args->halo_w) * args->c > kMost) return false;
  const int64_t threads = work > (1 << 20) ? torch::stable::get_num_threads() : 1;
  const int64_t parts = (threads + args->n - 1) / args->n;
  int64_t th = args->h, tiles_w = (args->w + tw - 1) / tw;
  if (parts > 1) {
    const int64_t split = (tiles_w + parts - 1) / parts * parts;
    if (!whole && args->w >= split * (beside > 16 ? beside : 16)) {
      tiles_w = split;
    } else {
      th = (th + parts - 1) / parts;
      if (th < args->halo_h) th = args->halo_h;
      th = (th + args->band - 1) / args->band * args->band;
    }
  }
  tw = ((args->w + tiles_w - 1) / tiles_w + 3) / 4 * 4;
  args->grid = {th, tw, (args->h + th - 1) / th, (args->w + tw - 1) / tw};
  return true;
}

// Tiles as wide as the windows of all stages fit half a megabyte of a second-level cache, and as
// high as the image. In channels_last a cache line holds channels of several tasks, which follow
// each other: there a tile's input should stay in that cache too, unless halos would then be most
// of it.
void choose_tiles(StripChainArgs* args, const std::vector<StripArgs>& vertical) {
  constexpr int64_t kWindow = 128 * 1024;  // floats
  args->band = band_of(16, row_group(vertical), args->h);
  int64_t window = 0;
  int64_t halo = args->halo_h;
  for (const StripArgs& s : vertical) {
    window += strip_level_rows(args->band, halo);
    halo -= (s.used - 1) * s.d;
  }
  TileGrid& grid = args->grid;
  grid.tile_h = args->h;
  const int64_t align = args->channels_last ? 8 : 64;
  int64_t widest = kWindow / (window * args->lanes);
  if (widest < 64) widest = 64;
  if (args->channels_last && args->c > args->lanes) {
    const int64_t narrow = 2 * args->halo_w > 64 ? 2 * args->halo_w : 64;
    if (widest > narrow) widest = narrow;
  }
  const int64_t parts = (args->w + widest - 1) / widest;
  grid.tile_w = ((args->w + parts - 1) / parts + align - 1) / align * align;
  if (grid.tile_w > args->w) grid.tile_w = args->w;
  grid.tiles_w = (args->w + grid.tile_w - 1) / grid.tile_w;
  if (args->channels_last && args->c > args->lanes) {
    int64_t th = kWindow / (grid.tile_w * args->c);
    const int64_t least = 3 * args->halo_h > 16 ? 3 * args->halo_h : 16;
    if (th < least) th = least;
    if (th < grid.tile_h) grid.tile_h = th;
  }
  grid.tiles_h = (args->h + grid.tile_h - 1) / grid.tile_h;
}

// The lists hold a horizontal and a vertical strip for every stage, and their biases.
void check_strips(const char* op, const Tensor& x, const std::vector<Tensor>& weights,
                  const std::vector<Tensor>& biases, const std::vector<bool>& bias_mask,
                  const std::vector<int64_t>& dilations) {
  const size_t strips = weights.size();
  STD_TORCH_CHECK(strips >= 2 && strips % 2 == 0, op,
                  ": weights must hold a horizontal and a vertical strip per stage, got ", strips,
                  " tensors");
  STD_TORCH_CHECK(bias_mask.size() == strips && dilations.size() == strips, op,
                  ": bias_mask and dilations", " must have one entry per weight, ", strips,
                  ", got ", bias_mask.size(), " and ", dilations.size());
  size_t present = 0;
  for (const bool b : bias_mask) present += b ? 1 : 0;
  STD_TORCH_CHECK(biases.size() == present, op, ": bias_mask announces ", present, " biases, got ",
                  biases.size());
  for (size_t i = 0, b = 0; i < strips; ++i) {
    const bool horizontal = i % 2 == 0;
    const Tensor& weight = weights[i];
    check_like(weight, x, 4, op, "a weight");
    const int64_t k = weight.size(horizontal ? 3 : 2);
    STD_TORCH_CHECK(weight.size(0) == x.size(1) && weight.size(1) == 1 &&
                        weight.size(horizontal ? 2 : 3) == 1 && k % 2 == 1,
                    op, ": weight ", i, " must have shape (", x.size(1),
                    horizontal ? ", 1, 1, k)" : ", 1, k, 1)", " with odd k, got ",
                    shape_of(weight));
    STD_TORCH_CHECK(dilations[i] >= 1 && dilations[i] < (1 << 30) && k < (1 << 20), op,
                    ": dilation ", i, " must be a positive integer, got ", dilations[i]);
    if (bias_mask[i]) check_vector(biases[b++], x, x.size(1), op, "a bias");
  }
}

// The chain of x, times `gate` unless that is null.
Tensor run_chain(const char* op, const Tensor* gate, const Tensor& x,
                 const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                 const std::vector<bool>& bias_mask, const std::vector<int64_t>& dilations) {
  check_cpu(x, op, "x");
  StripChainArgs args{};
  args.dtype = kernel_dtype(x, op, "x");
  check_like(x, x, 4, op, "x");
  args.n = x.size(0);
  args.c = x.size(1);
  args.h = x.size(2);
  args.w = x.size(3);
  check_strips(op, x, weights, biases, bias_mask, dilations);
  const size_t strips = weights.size();

  args.stages = static_cast<int64_t>(strips / 2);
  std::vector<StripArgs> axes[2];
  std::vector<Tensor> kept;  // dense copies, alive until the kernel has run
  kept.reserve(2 * strips + 1);
  int64_t work_per_pixel = 8;
  int64_t halo[2] = {0, 0};
  for (size_t i = 0, b = 0; i < strips; ++i) {
    const bool horizontal = i % 2 == 0;
    const Tensor& weight = weights[i];
    const int64_t k = weight.size(horizontal ? 3 : 2);
    kept.push_back(in_format(weight, Format::kContiguous));
    StripArgs strip{};
    strip.weight = kept.back().const_data_ptr();
    if (bias_mask[i]) {
      kept.push_back(in_format(biases[b], Format::kContiguous));
      strip.bias = kept.back().const_data_ptr();
      ++b;
    }
    const UsedTaps used = used_taps(k, dilations[i], horizontal ? args.w : args.h);
    strip.k = k;
    strip.first = used.first;
    strip.used = used.count;
    strip.d = used.count == 1 ? 1 : dilations[i];
    halo[horizontal ? 0 : 1] += (strip.used - 1) * strip.d;
    work_per_pixel += strip.used;
    axes[horizontal ? 0 : 1].push_back(strip);
  }

  const Format format = output_format(gate == nullptr ? x : *gate);
  Tensor y = empty_in_format(x.sizes(), x, format);
  if (x.numel() == 0) return y;
  const Tensor x_dense = in_format(x, format);
  args.x = x_dense.const_data_ptr();
  if (gate != nullptr) {
    kept.push_back(in_format(*gate, format));
    args.gate = kept.back().const_data_ptr();
  }
  args.y = y.mutable_data_ptr();
  args.any_bias = !biases.empty();
  args.horizontal = axes[0].data();
  args.vertical = axes[1].data();
  args.halo_w = halo[0];
  args.halo_h = halo[1];
  // A plane of one pixel is laid out the same in both formats; only one of them has lanes to fill.
  args.channels_last = format == Format::kChannelsLast || args.h * args.w == 1;
  args.lanes = args.channels_last ? vector_lanes() : 1;

  const int64_t work = x.numel() * work_per_pixel;
  if (args.channels_last && reads_flat(&args, axes[1], work)) {
    const int64_t tasks = args.n * args.grid.tiles_h * args.grid.tiles_w;
    parallel_for(tasks, grain_for(work / tasks / 4),
                 [&](int64_t begin, int64_t end) { flat_kernel(args, begin, end); });
    return y;
  }
  const int64_t per_tile = args.n * ((args.c + args.lanes - 1) / args.lanes);
  choose_tiles(&args, axes[1]);
  if (work > (1 << 20)) {
    refine_tiles(&args.grid, args.h, args.halo_h, per_tile, 4 * torch::stable::get_num_threads());
  }
  const int64_t tasks = per_tile * args.grid.tiles_h * args.grid.tiles_w;
  parallel_for(tasks, grain_for(work / tasks / 4),
               [&](int64_t begin, int64_t end) { tile_kernel(args, begin, end); });
  return y;
}

Tensor strip_conv_chain(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                        std::vector<bool> bias_mask, std::vector<int64_t> dilations) {
  return run_chain("strip_conv_chain", nullptr, x, weights, biases, bias_mask, dilations);
}

Tensor gated_strip_conv_chain(const Tensor& u, const Tensor& x, std::vector<Tensor> weights,
                              std::vector<Tensor> biases, std::vector<bool> bias_mask,
                              std::vector<int64_t> dilations) {
  constexpr const char* op = "gated_strip_conv_chain";
  check_cpu(x, op, "x");
  check_like(u, x, 4, op, "u");
  STD_TORCH_CHECK(u.sizes() == x.sizes(), op, ": u must have the shape of x, ", shape_of(x),
                  ", got ", shape_of(u));
  return run_chain(op, &u, x, weights, biases, bias_mask, dilations);
}

std::vector<Tensor> strip_conv_chain_backward(const Tensor& grad_output, const Tensor& x,
                                              std::vector<Tensor> weights,
                                              std::vector<Tensor> biases,
                                              std::vector<bool> bias_mask,
                                              std::vector<int64_t> dilations,
                                              std::vector<bool> output_mask) {
  constexpr const char* op = "strip_conv_chain_backward";
  check_like(x, x, 4, op, "x");
  check_strips(op, x, weights, biases, bias_mask, dilations);
  std::vector<int64_t> pairs;
  for (size_t i = 0; i < dilations.size(); ++i) {
    pairs.push_back(i % 2 == 0 ? 1 : dilations[i]);
    pairs.push_back(i % 2 == 0 ? dilations[i] : 1);
  }
  return branches_backward({.op = op,
                            .x = x,
                            .grad = grad_output,
                            .weights = weights,
                            .biases = biases,
                            .bias_mask = bias_mask,
                            .dilations = pairs,
                            .lengths = {static_cast<int64_t>(weights.size())},
                            .output_mask = output_mask,
                            .format = output_format(x),
                            .addend = std::nullopt});
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  m.impl("strip_conv_chain.cpu", TORCH_BOX(&sdan_fast::strip_conv_chain));
  if (sdan_fast::rounds_products_once()) {
    m.impl("strip_conv_chain_backward.cpu", TORCH_BOX(&sdan_fast::strip_conv_chain_backward));
  }
  m.impl("gated_strip_conv_chain.cpu", TORCH_BOX(&sdan_fast::gated_strip_conv_chain));
}
