// How a square is cut into tiles for tensor cores. Plain arithmetic, the same for GPU and host.
#pragma once

#include "conv_plan.h"
#include "conv_wgrad_mma_last.cuh"

namespace sdan_fast::cuda {

struct ProductPlan {
  bool fits = false;
  ProductParams p{};
  Config config;
  int k = 0, d = 0, r = 1;  // which instance of the kernel
};

// Calls f with a Band of each square that has kernels of its own: SDAN's.
template <typename F>
void with_bands(F&& f) {
  f(Band<3, 1>{}), f(Band<5, 1>{}), f(Band<7, 1>{}), f(Band<9, 1>{});
  f(Band<5, 3>{}), f(Band<7, 4>{}), f(Band<9, 5>{});
}

// Whether a convolution is this square, in 16 bits.
template <typename B>
bool is_square_of(DType dtype, const ConvShape& s) {
  return dtype != DType::kFloat32 && s.kh == B::kTaps && s.kw == B::kTaps && s.dh == B::kDilation &&
         s.dw == B::kDilation;
}

// The tile of least cost: clocks of the SM of a large GPU that has the most blocks, for their
// instructions or their reads of shared memory, and for their bytes.
template <typename B>
ProductPlan choose_product(const ConvShape& s) {
  constexpr int K = B::kTaps, D = B::kDilation;
  ProductPlan plan;
  if (too_long(s)) return plan;
  plan.k = K, plan.d = D;
  ProductParams& p = plan.p;
  p.channels = static_cast<int32_t>(s.c), p.height = static_cast<int32_t>(s.h),
  p.width = static_cast<int32_t>(s.w);
  const int64_t planes = s.n * s.c, rows = ceil_div(s.h, D), halo = K - 1;
  constexpr int64_t kSector = 16, kClockBytes = 13;  // of DRAM, per SM
  int64_t least = 0, bytes = 0, warps = 1;
  for (const int r : {1, 3}) {
    // Instructions and reads of shared memory of a warp for 16 R rows of 8 J outputs.
    const int64_t j = products_across(r), rounds = r + K - 1,
                  products = int64_t{r} * K * j * B::kSteps,
                  unit = rounds * (B::kBlocks / 2 + j / 2 + 1) + products + r * j * 16 + 40,
                  reads = rounds * (B::kBlocks + j - 1) * 2;
    for (int64_t parts = 1; parts <= std::min<int64_t>(16, ceil_div(s.w, kSector)); ++parts) {
      const int64_t w = round_up64(ceil_div(s.w, parts), 8 * j), across = ceil_div(s.w, w);
      const int64_t quads = w + 2 * B::kMargin, pitch = round_up64(quads - 8, 16) + 8;
      const int64_t lanes = (w + 2 * round_up64(B::kMargin, kSector)) / 4;  // that copy a row
      for (int64_t h = 16 * r; h < rows + 16 * r; h += 16 * r) {
        for (int64_t images = 1; images <= D; ++images) {
          const int64_t shared = B::kTable * 4 + images * (h + halo) * pitch * 2;
          if (shared > kSharedGoal) break;
          const int64_t down = ceil_div(rows, h), groups = ceil_div(D, images),
                        blocks = planes * groups * across * down,
                        units = images * (h / (16 * r)) * (w / (8 * j));
          const auto beside = [&](int64_t n) {  // instructions of n warps beside the products
            const int64_t abreast = std::max<int64_t>(1, n * 32 / lanes);
            return n * (images * (ceil_div(h + halo, abreast) * ceil_div(lanes, n * 32) * 6 + 25) +
                        150 + 2 * K * B::kSteps + ceil_div(B::kTable, n * 32) * 40);
          };
          int64_t some = 4;  // more of them if that takes few more instructions
          for (int64_t n = 5; n <= std::min<int64_t>(units, kProductThreads / 32); ++n)
            if (beside(n) * 16 < beside(some) * (16 + n - some)) some = n;
          const int64_t read = std::min(h + halo, rows) * std::min(w + 2 * kSector, s.w),
                        moved = 2 * images * (read + std::min(h, rows) * w);
          const int64_t cost =
              ceil_div(blocks, kSms) *
              (std::max((units * unit + beside(some)) / 4, units * reads) + moved / kClockBytes);
          if (blocks > kMostBlocks || (plan.fits && cost >= least)) continue;
          least = cost, plan.fits = true, plan.r = r, bytes = shared, warps = some;
          p.tile_h = static_cast<int32_t>(h), p.tile_w = static_cast<int32_t>(w);
          p.tiles_y = static_cast<int32_t>(down), p.tiles_x = static_cast<int32_t>(across);
          p.pitch = static_cast<int32_t>(pitch), p.images = static_cast<int32_t>(images);
        }
      }
    }
  }
  plan.config.block = dim3(static_cast<unsigned>(warps * 32));
  plan.config.grid = dim3(
      static_cast<unsigned>(planes * ceil_div(D, std::max(p.images, 1)) * p.tiles_y * p.tiles_x));
  plan.config.shared_bytes = static_cast<size_t>(bytes);
  return plan;
}

inline const ProductPlan& plan_product(DType dtype, const ConvShape& s) {
  return remembered<ProductPlan>(dtype, s, [&] {
    ProductPlan plan;
    with_bands([&](auto band) {
      using B = decltype(band);
      if (is_square_of<B>(dtype, s)) plan = choose_product<B>(s);
    });
    return plan;
  });
}

// ---- channels_last

struct LastProductPlan {
  bool fits = false;
  LastProductParams p{};
  Config config;
  int k = 0, d = 0, j = 2;  // which instance of the kernel
};

// make(channels of a block) for as many of them as fit, up to 32.
template <typename F>
auto with_most_channels(const ConvShape& s, F&& make) {
  const auto of = [&](int64_t most) {
    return make(round_up64(ceil_div(s.c, ceil_div(s.c, most)), 4));
  };
  auto plan = of(32);
  for (int64_t most = 24; most >= 8 && !plan.fits; most -= 8) plan = of(most);
  return plan;
}

// Blocks of `lanes` channels, and the tile of least cost, as choose_product's.
template <typename B>
LastProductPlan choose_last_product(const ConvShape& s, int64_t lanes) {
  constexpr int K = B::kTaps, D = B::kDilation;
  constexpr int64_t S = 16, kClockBytes = 13;  // of DRAM, per SM
  LastProductPlan plan;
  if (too_long(s) || s.c % 4 || s.c < 16) return plan;
  plan.k = K, plan.d = D;
  LastProductParams& p = plan.p;
  p.channels = static_cast<int32_t>(s.c), p.height = static_cast<int32_t>(s.h),
  p.width = static_cast<int32_t>(s.w);
  const int64_t splits = ceil_div(s.c, lanes), quads = lanes / 4, rows = ceil_div(s.h, D),
                halo = K - 1;
  const int64_t pixel = round_up64(lanes / 2 - 4, 8) + 4;
  p.lanes = static_cast<int32_t>(lanes), p.pixel = static_cast<int32_t>(pixel);
  int64_t least = 0, bytes = 0;
  for (const int j : {2, 4}) {
    // Instructions and reads of shared memory of a channel for 16 rows of 8 J pixels.
    const int64_t taps = K * B::kSteps * (D == 1 ? 4 : 2),
                  unit = K * (B::kBlocks / 2 + 2 + j * B::kSteps) + taps + j * 10 + 20,
                  reads = K * (B::kBlocks + j - 1) * 2 + taps + 8 * j;
    for (int64_t w = 8 * j; w < s.w + 8 * j && w <= 8 * S; w += 8 * j) {
      const int64_t columns = w + 2 * B::kMargin, pitch = round_up64(columns - 8, 16) + 8;
      for (int64_t h = S; h < rows + S; h += S) {
        const int64_t plane = round_up64((h + halo) * pitch - 8, 16) + 8;
        const int64_t shared =
            lanes * (plane * 2 + BandTaps<K, D>::kBytes) + S * (S * pixel + 2) * 4;
        if (shared > kSharedLarge) break;
        const int64_t across = ceil_div(s.w, w), down = ceil_div(rows, h),
                      blocks = s.n * D * across * down * splits,
                      units = h / S * (w / (8 * j)) * lanes, staged = (h + halo) * columns * quads;
        const int64_t instructions = units * unit + staged * 15 / 32 +
                                     quads * (250 + ceil_div(lanes * K * K, quads * 32) * 20);
        const int64_t read = std::min(h + halo, rows) * std::min(columns, s.w),
                      moved = 2 * lanes * (read + std::min(h, rows) * w);
        const int64_t cost =
            ceil_div(blocks, kSms) *
            (std::max(instructions / 4, units * reads + staged / 8) + moved / kClockBytes);
        if (blocks > kMostBlocks || (plan.fits && cost >= least)) continue;
        least = cost, plan.fits = true, plan.j = j, bytes = shared;
        p.tile_h = static_cast<int32_t>(h), p.tile_w = static_cast<int32_t>(w);
        p.tiles_y = static_cast<int32_t>(down), p.tiles_x = static_cast<int32_t>(across);
        p.pitch = static_cast<int32_t>(pitch), p.plane = static_cast<int32_t>(plane);
      }
    }
  }
  plan.fits = plan.fits && splits <= 65535;
  plan.config.block = dim3(static_cast<unsigned>(32 * quads));
  plan.config.grid =
      dim3(static_cast<unsigned>(s.n * D * p.tiles_y * p.tiles_x), static_cast<unsigned>(splits));
  plan.config.shared_bytes = static_cast<size_t>(bytes);
  return plan;
}

// 3 x 3 is conv_last's, whose larger tiles move less.
inline const LastProductPlan& plan_last_product(DType dtype, const ConvShape& s) {
  return remembered<LastProductPlan>(dtype, s, [&] {
    LastProductPlan plan;
    with_bands([&](auto band) {
      using B = decltype(band);
      if (B::kTaps > 3 && is_square_of<B>(dtype, s))
        plan =
            with_most_channels(s, [&](int64_t lanes) { return choose_last_product<B>(s, lanes); });
    });
    return plan;
  });
}

// ---- weight gradients in channels_last

struct GradProductPlan {
  bool fits = false;
  GradProductParams p{};
  Config config;
  int k = 0, d = 0;
  int64_t partials = 0;  // rows of the partial sums
};

// Blocks of `lanes` channels, and the tile for which the SM with the most of them takes the least
// time.
template <int K, int D>
GradProductPlan choose_grad_product(const ConvShape& s, int64_t lanes) {
  using B = GradBand<K, D>;
  constexpr int64_t S = 16, kClockBytes = 13;  // of DRAM, per SM
  GradProductPlan plan;
  if (too_long(s) || s.c % 4 || s.c < 16) return plan;
  plan.k = K, plan.d = D;
  GradProductParams& p = plan.p;
  p.channels = static_cast<int32_t>(s.c), p.height = static_cast<int32_t>(s.h),
  p.width = static_cast<int32_t>(s.w), p.lanes = static_cast<int32_t>(lanes);
  const int64_t splits = ceil_div(s.c, lanes), quads = lanes / 4, rows = ceil_div(s.h, D);
  const auto odd = [](int64_t n) { return round_up64(n - 8, 16) + 8; };  // in 8 elements
  int64_t least = 0, bytes = 0;
  for (int64_t w = S; w < s.w + S && w <= 8 * S; w += S) {
    for (int64_t h = S; h < rows + S; h += S) {
      const int64_t columns = w + 2 * B::kMargin, pitch_x = odd(columns), pitch_g = odd(w),
                    plane_x = odd(h * pitch_x), plane_g = odd((h + K - 1) * pitch_g);
      const bool apart = B::kRows < K || std::min(plane_x, plane_g) * 2 < B::kFour * 4;
      const int64_t planes = lanes * (plane_x + plane_g) * 2,
                    shared = planes + (apart ? quads * 2 * B::kFour * 4 : 0);
      if (shared > kSharedLarge) break;
      const int64_t tiles = s.n * D * ceil_div(rows, h) * ceil_div(s.w, w),
                    units = h / S * (w / S) * lanes,
                    staged = (h * columns + (h + K - 1) * w) * quads;
      const int64_t instructions =
          units * (K * (B::kTiles + 2) + 20) + lanes * K * 40 + staged * 15 / 32 + quads * 300;
      const int64_t moved = 2 * lanes *
                                (std::min(h, rows) * std::min(columns, s.w) +
                                 std::min(h + K - 1, rows) * std::min(w, s.w)) +
                            lanes * (K * K + 1) * 4;
      const int64_t cost =
          ceil_div(tiles * splits, kSms) * (instructions / 3 + moved / kClockBytes);
      if (tiles > kMostBlocks || (plan.fits && cost >= least)) continue;
      least = cost, plan.fits = true, bytes = shared;
      p.scratch = apart ? static_cast<int32_t>(planes) : 0;
      p.tile_h = static_cast<int32_t>(h), p.tile_w = static_cast<int32_t>(w);
      p.tiles_y = static_cast<int32_t>(ceil_div(rows, h));
      p.tiles_x = static_cast<int32_t>(ceil_div(s.w, w)), p.tiles = static_cast<int32_t>(tiles);
      p.pitch_x = static_cast<int32_t>(pitch_x), p.plane_x = static_cast<int32_t>(plane_x);
      p.pitch_g = static_cast<int32_t>(pitch_g), p.plane_g = static_cast<int32_t>(plane_g);
    }
  }
  plan.fits = plan.fits && splits <= 65535;
  // As many blocks as SMs, or so many that none has more than 32 tiles, evenly.
  const int64_t most = std::max<int64_t>(ceil_div(p.tiles, 32), ceil_div(kSms, splits)),
                turns = std::max<int64_t>(1, ceil_div(p.tiles, most)),
                blocks = ceil_div(p.tiles, turns);
  plan.partials = blocks * s.c;
  plan.config.block = dim3(static_cast<unsigned>(32 * quads));
  plan.config.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(splits));
  plan.config.shared_bytes = static_cast<size_t>(bytes);
  return plan;
}

// 3 x 3 and strips are wgrad_last's.
inline GradProductPlan plan_grad_product(DType dtype, const ConvShape& s) {
  GradProductPlan plan;
  with_bands([&](auto band) {
    using B = decltype(band);
    if (B::kTaps > 3 && is_square_of<B>(dtype, s))
      plan = with_most_channels(
          s, [&](int64_t lanes) { return choose_grad_product<B::kTaps, B::kDilation>(s, lanes); });
  });
  return plan;
}

}  // namespace sdan_fast::cuda
