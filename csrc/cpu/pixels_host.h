// Preparing passes over the pixels of a batch, and rounding what they sum.
//
// For baseline sources only.
#pragma once

#include "fused_host.h"
#include "pixels.h"

namespace sdan_fast {

// Of images whose rows follow each other.
inline PixelView pixels_of(const ImageView& v, int64_t images, int64_t plane) {
  // Images of one pixel are one run, which is more to work on.
  if (plane == 1) return {v.data, v.dtype, images, 0, v.stride_c, v.stride_n};
  return {v.data, v.dtype, plane, v.stride_n, v.stride_c, v.stride_w};
}

// t must be dense in one of the two formats.
inline PixelView pixels_of(const Tensor& t, DType dtype) {
  const int64_t n = t.size(0), c = t.size(1), plane = t.size(2) * t.size(3);
  if (!t.is_contiguous()) return {t.data_ptr(), dtype, n * plane, 0, 1, c};
  return pixels_of(ImageView{t.data_ptr(), dtype, c * plane, plane, t.size(3), 1}, n, plane);
}

// t itself where it is dense, else a copy in its own format.
inline Tensor dense(const Tensor& t) {
  return in_format(t, output_format(t));
}

// Whether pixels lie one after another, each with its channels side by side.
inline bool dense_pixels(const PixelView& v, int64_t channels, int64_t pixels) {
  return v.stride_p == channels && (v.stride_c == 1 || channels == 1) &&
         (v.run_pixels >= pixels || v.stride_run == v.run_pixels * channels);
}

// The plan for `pixels` pixels, but for its tiling.
inline void run_pointwise_conv(PointwiseConvPlan plan, int64_t pixels) {
  static const auto scratch_kernel = SDAN_PICK_KERNEL(pointwise_conv2d_scratch);
  static const auto run_kernel = SDAN_PICK_KERNEL(pointwise_conv2d_run);
  // By the shape alone, so that no sum depends on the number of threads.
  const int64_t tile = pixels < 16 * 384 ? 192 : 384, tiles = (pixels + tile - 1) / tile;
  plan.tiling = {pixels, tile, tiles, tiles};
  int64_t bytes = 0;
  scratch_kernel(&plan, &bytes);
  const int64_t co = plan.conv.co, ci = plan.conv.ci;
  // Neighbouring tiles by one thread, which asks for each while it computes the one before.
  run_rows(threads_for(pixels * (co * ci + 8 * (co + ci))), 1, tiles, 1,
           [&](int64_t, int64_t begin, int64_t end) {
             void* scratch = thread_scratch(static_cast<size_t>(bytes));
             for (int64_t i = begin; i < end; ++i) run_kernel(&plan, i, scratch);
           });
}

// Tiles of `channels` channels that the sums over pixels are taken of: about half of a small
// second-level cache, the sums' own work being a share that falls with the tile.
inline PixelTiling pixel_tiling(int64_t pixels, int64_t channels, int64_t sums) {
  constexpr int64_t kStep = 128;
  const auto steps = [](int64_t n) { return std::max<int64_t>(1, n / kStep) * kStep; };
  const int64_t tile = std::min({steps(60'000 / channels), steps(1024), steps(pixels / 16)});
  const int64_t tiles = (pixels + tile - 1) / tile;
  const int64_t most = std::clamp<int64_t>((int64_t{1} << 22) / std::max<int64_t>(sums, 1), 8, 64);
  return {pixels, tile, tiles, std::min(tiles, most)};
}

// Zeroed sums of co x ci products and of co rows, for every part.
class Sums {
 public:
  Sums(FloatArena& arena, const PixelTiling& tiling, int64_t co, int64_t ci)
      : parts_(tiling.parts), co_(static_cast<int>(co)), ci_(static_cast<int>(ci)) {
    static const auto floats_kernel = SDAN_PICK_KERNEL(outer_sums_floats);
    floats_kernel(co_, ci_, &sums_.rows_at);
    sums_.stride = (sums_.rows_at + 2 * co + 15) / 16 * 16;
    sums_.data = arena.zeros(parts_ * sums_.stride);
  }

  const PartSums& parts() const { return sums_; }

  // co x ci
  std::vector<double> products() const {
    static const auto totals_kernel = SDAN_PICK_KERNEL(outer_totals);
    std::vector<double> totals(static_cast<size_t>(co_) * static_cast<size_t>(ci_));
    totals_kernel(&sums_, parts_, co_, ci_, totals.data());
    return totals;
  }

  std::vector<double> rows() const {
    std::vector<double> totals(static_cast<size_t>(co_));
    for (int64_t k = 0; k < parts_; ++k) {
      const float* p = sums_.data + k * sums_.stride + sums_.rows_at;
      for (double& total : totals) {
        total += static_cast<double>(*p) + static_cast<double>(p[co_]);
        ++p;
      }
    }
    return totals;
  }

 private:
  PartSums sums_{};
  int64_t parts_;
  int co_, ci_;
};

// Totals as the gradient of `like`, whose elements they are row by row: a vector or the weight of a
// 1x1 convolution.
inline Tensor rounded(const std::vector<double>& totals, const Tensor& like, DType dtype) {
  static const auto round_kernel = SDAN_PICK_KERNEL(round_totals);
  Tensor out = empty_in_format(like.sizes(), like, output_format(like));
  round_kernel(totals.data(), static_cast<int64_t>(totals.size()), dtype, out.data_ptr());
  return out;
}

// The transposed weight's product, without a bias.
inline Pointwise pack_transposed(FloatArena& arena, const float* weight, int64_t co, int64_t ci) {
  FloatArena rows(arena);
  float* t = rows.take(co * ci);
  for (int64_t o = 0; o < co; ++o) {
    for (int64_t i = 0; i < ci; ++i) t[i * co + o] = weight[o * ci + i];
  }
  return pack(arena, t, arena.zeros(ci), ci, co);
}

}  // namespace sdan_fast
