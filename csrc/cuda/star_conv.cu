// Launches of star_conv's own kernels.
#include "star_conv.cuh"

#include <algorithm>
#include <utility>

#include "launch.h"

namespace sdan_fast::cuda {
namespace {

// Of the backward's partial sums: at most 8 blocks for each SM of a large GPU.
constexpr int64_t kSumBlocks = 8 * kSms;

// Warps that hide a large GPU's memory from one another, of the forward with v elements a thread.
constexpr int64_t enough_warps(int v) {
  return kSms * (v > 4 ? 6 : 12);
}

constexpr int kGradVector = 4;  // wider ones would cost the backward its occupancy

// What a step of the channels_last backward takes besides its warps' instructions, in warps': the
// wait for what it loads.
constexpr int64_t kStepWarps = 3;

StarConvParams star_conv_params(const StarConvShape& s, int outer) {
  StarConvParams p{};
  p.images = s.n, p.step = s.step;
  p.channels = s.channels, p.height = s.height, p.width = s.width;
  p.splits = p.columns = p.vectors = p.bands = 1;
  p.outer = outer;
  return p;
}

Config star_conv_config(dim3 grid, size_t shared_bytes, Stream stream) {
  Config c;
  c.block = dim3(kStarConvThreads);
  c.grid = grid;
  c.shared_bytes = shared_bytes;
  c.stream = stream;
  return c;
}

unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, 0x7fffffff));
}

// Whether vectors of v elements can be read and written: of pixels, or of channels.
bool takes(const StarConvShape& s, int v) {
  return (s.channels_last ? s.channels : s.width) % v == 0 && s.step % v == 0;
}

struct BackwardPlan {
  StarConvParams p;
  dim3 grid;
  unsigned threads = kStarConvThreads;
  int64_t splits;  // partial sums of a channel (of an image, for contiguous tensors)
};

struct Launch {
  int64_t blocks, warps;
};

// Output rows of a thread, which reads and computes `more` than these: those with which the SM of a
// large GPU that has the most blocks does the fewest, of those that make at least so many warps, if
// any do. `launch` says what so many groups of rows make.
template <typename F>
int rows_of(int64_t height, int64_t more, int64_t least_warps, F&& launch) {
  constexpr int64_t kMost = 32;
  std::pair<bool, int64_t> least{};
  int64_t best = 0;
  for (int64_t rows = 1; rows <= std::min(kMost, height); ++rows) {
    const Launch l = launch(ceil_div(height, rows));
    const std::pair cost{l.warps < least_warps,
                         ceil_div(l.blocks, kSms) * ceil_div(l.warps, l.blocks) * (rows + more)};
    if (best && cost >= least) continue;
    least = cost, best = rows;
  }
  return static_cast<int>(best);
}

// A tile for each block, which reads two columns and rows more of p on each side, and one of b and
// of the gradient. Of the tiles with which a large GPU has least to do, or of those that cost it up
// to a third more where these add at most 9/40 to what is read, the one that has least to do.
void plan_tiles(BackwardPlan& plan, const StarConvShape& s, int v, int most_threads) {
  constexpr int64_t kTries = 6, kMostRows = 32, kFewRows = 24;
  StarConvParams& p = plan.p;
  const int64_t vectors = s.channels / v, across = ceil_div(vectors, most_threads / 16),
                bx = ceil_div(vectors, across);
  // At least 16 columns, of which 14 are outputs.
  const int64_t least_x = ceil_div(s.width, most_threads / bx - 2),
                least_y = ceil_div(s.height, kMostRows), h = s.height, w = s.width;
  using Cost = std::pair<int64_t, int64_t>;  // work, and what is read
  struct Tile {
    Cost cost{};
    int64_t columns = 0, rows = 0;
    void keep(const Tile& other) {
      if (!columns || other.cost < cost) *this = other;
    }
  } best, few;
  for (int64_t nx = least_x; nx < least_x + kTries && nx <= w; ++nx) {
    const int64_t columns = ceil_div(w, nx) + 2, warps = ceil_div(columns * bx, 32);
    if (ceil_div(w, columns - 2) < nx) continue;
    for (int64_t ny = least_y; ny < least_y + kFewRows && ny <= h; ++ny) {
      const int64_t rows = ceil_div(h, ny);
      if (ceil_div(h, rows) < ny) continue;
      const int64_t work =
          ceil_div(s.n * nx * ny * across, kSms) * (warps + kStepWarps) * (rows + 3);
      const auto with_halo = [&](int64_t more) {
        return (w + more * (nx - 1)) * (h + more * (ny - 1));
      };
      const Tile tile{{work, with_halo(4) + 2 * with_halo(2)}, columns, rows};
      best.keep(tile);
      if (40 * tile.cost.second <= 49 * 3 * h * w) few.keep(tile);
    }
  }
  const Tile& tile = few.columns && 3 * few.cost.first <= 4 * best.cost.first ? few : best;
  p.vectors = static_cast<int32_t>(bx), p.columns = static_cast<int32_t>(tile.columns);
  p.rows = static_cast<int32_t>(tile.rows);
  plan.threads = static_cast<unsigned>(ceil_div(tile.columns * bx, 32) * 32);
  plan.splits = s.n * ceil_div(w, tile.columns - 2) * ceil_div(h, tile.rows);
  plan.grid = dim3(grid_of(plan.splits), static_cast<unsigned>(across));
}

BackwardPlan plan_backward(const StarConvShape& s, int v, int outer, int most_threads) {
  BackwardPlan plan;
  StarConvParams& p = plan.p = star_conv_params(s, outer);
  if (s.channels_last) {
    plan_tiles(plan, s, v, most_threads);
    return plan;
  }
  const int64_t planes = s.n * s.channels;
  const auto of_plane = [&](int64_t groups) {
    return ceil_div(s.width / v * groups, kStarConvWarps * kStarConvOwners);
  };
  p.rows = rows_of(s.height, 4, 0, [&](int64_t groups) {
    const int64_t blocks = planes * of_plane(groups);
    return Launch{blocks, kStarConvWarps * blocks};
  });
  plan.splits = std::clamp<int64_t>(ceil_div(2 * kSumBlocks, planes), 1,
                                    of_plane(ceil_div(s.height, p.rows)));
  p.splits = static_cast<int32_t>(plan.splits);
  plan.grid = dim3(grid_of(planes * plan.splits));
  return plan;
}

}  // namespace

void star_conv_forward(DType dtype, const void* p, const void* b, const void* weight,
                       const void* bias, void* y, const StarConvShape& s, int outer,
                       Stream stream) {
  if (s.n * s.channels * s.height * s.width == 0) return;
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidest = 16 / sizeof(T);
    // Taps of a channels_last thread are registers: 4 channels at most.
    const int widest = s.channels_last ? 4 : kWidest;
    const bool apart = aligned(p, 16) && aligned(b, widest * sizeof(T)) && aligned(y, 16) &&
                       (!s.channels_last || aligned(weight, 16));
    const int v = apart && takes(s, widest) ? widest : 1;
    StarConvParams params = star_conv_params(s, outer);
    // Where few threads are a pixel of channels_last, a block is many columns, but would be low.
    const int64_t vectors = s.channels / v;
    if (s.channels_last) params.bands = vectors <= 2 ? 4 : vectors <= 8 ? 2 : 1;
    const auto cut = [&](int64_t groups) {
      const int64_t planes = s.channels_last ? 1 : s.n * s.channels,
                    items = s.channels_last
                                ? s.n * ceil_div(groups, params.bands) * s.width * vectors
                                : s.width / v * groups;
      return Launch{ceil_div(items, kStarConvThreads / params.bands) * planes,
                    ceil_div(items * params.bands, 32) * planes};
    };
    params.rows = rows_of(s.height, 2, enough_warps(v), cut);
    const auto run = [&](auto kernel) {
      const int64_t grid = cut(ceil_div(s.height, params.rows)).blocks;
      launch("star_conv_forward", kernel, star_conv_config(dim3(grid_of(grid)), 0, stream),
             static_cast<const T*>(p), static_cast<const T*>(b), static_cast<const T*>(weight),
             static_cast<const T*>(bias), static_cast<T*>(y), params);
    };
    if (s.channels_last)
      v > 1 ? run(star_conv_last_kernel<T, 4>) : run(star_conv_last_kernel<T, 1>);
    else
      v > 1 ? run(star_conv_forward_kernel<T, kWidest>) : run(star_conv_forward_kernel<T, 1>);
  });
}

int64_t star_conv_partial_floats(const StarConvShape& s) {
  int64_t most = 0;
  for (const int v : {1, kGradVector})
    for (const int threads : {star_conv_last_threads<float>, star_conv_last_threads<bfloat16>})
      if (takes(s, v)) most = std::max(most, plan_backward(s, v, 0, threads).splits);
  return most * s.channels * kStarConvSums * (s.channels_last ? 1 : s.n);
}

void star_conv_backward(DType dtype, const void* grad, const void* p, const void* b,
                        const void* weight, const void* bias, void* grad_p, void* grad_b,
                        float* partial, void* grad_weight, void* grad_bias, const StarConvShape& s,
                        int outer, Stream stream) {
  if (s.n * s.channels * s.height * s.width == 0) return;
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr size_t kAlign = kGradVector * sizeof(T);
    bool wide = takes(s, kGradVector) && (!s.channels_last || aligned(weight, kAlign));
    for (const void* t :
         {grad, p, b, static_cast<const void*>(grad_p), static_cast<const void*>(grad_b)})
      wide = wide && aligned(t, kAlign);
    const int v = wide ? kGradVector : 1;
    const BackwardPlan plan = plan_backward(s, v, outer, star_conv_last_threads<T>);
    const auto run = [&](auto kernel) {
      const size_t shared = s.channels_last
                                ? size_t{4} * kStarConvSums * static_cast<size_t>(v) *
                                      (plan.threads + static_cast<size_t>(plan.p.vectors))
                                : 0;
      Config config = star_conv_config(plan.grid, shared, stream);
      config.block = dim3(plan.threads);
      launch("star_conv_backward", kernel, config, static_cast<const T*>(grad),
             static_cast<const T*>(p), static_cast<const T*>(b), static_cast<const T*>(weight),
             static_cast<const T*>(bias), static_cast<T*>(grad_p), static_cast<T*>(grad_b), partial,
             plan.p);
    };
    if (s.channels_last)
      wide ? run(star_conv_backward_last_kernel<T, kGradVector>)
           : run(star_conv_backward_last_kernel<T, 1>);
    else
      wide ? run(star_conv_backward_kernel<T, kGradVector>) : run(star_conv_backward_kernel<T, 1>);
    if (!partial) return;
    const int64_t c = s.channels, splits = plan.splits;
    sum_parts(partial,
              s.channels_last ? weight_sums(dtype, grad_weight, grad_bias, c, 9, 1, splits, 0, 1, c)
                              : weight_sums(dtype, grad_weight, grad_bias, c, 9, s.n, splits,
                                            c * splits, splits, 1),
              stream);
  });
}

}  // namespace sdan_fast::cuda
