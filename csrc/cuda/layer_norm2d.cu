// Launches of the LayerNorm's kernels.
#include "layer_norm2d.cuh"

#include <algorithm>
#include <type_traits>

#include "launch.h"

namespace sdan_fast::cuda {
namespace {

constexpr int64_t kNormBlocks = 1056;  // that leave partial sums: 8 for each SM of a large GPU
// Pixels of a thread in contiguous tensors: few enough for the registers of several blocks.
constexpr int kPixels = 4;

template <int N>
using Number = std::integral_constant<int, N>;

// Calls f(V, R): V pixels at once if the tensors allow it, R channels of a warp in registers if
// there are no more.
template <int Wide, typename F>
void with_norm(bool wide, int channels, F&& f) {
  const bool cached = channels <= kNormCached * kNormWarps;
  if (wide)
    cached ? f(Number<Wide>{}, Number<kNormCached>{}) : f(Number<Wide>{}, Number<0>{});
  else
    cached ? f(Number<1>{}, Number<kNormCached>{}) : f(Number<1>{}, Number<0>{});
}

int64_t norm_tiles(const NormShape& s, int v) {
  return s.n * ceil_div(s.pixels / v, 32);
}

Config norm_config(int64_t tiles, int64_t most, size_t shared_bytes, Stream stream) {
  Config c;
  c.block = dim3(kNormThreads);
  c.grid = dim3(static_cast<unsigned>(std::clamp<int64_t>(tiles, 1, most)));
  c.shared_bytes = shared_bytes;
  c.stream = stream;
  return c;
}

// Lanes of a warp that share a pixel of a channels_last tensor, V channels each.
int norm_lanes(int channels, int v) {
  int lanes = 1;
  while (lanes < 32 && lanes * v < channels) lanes *= 2;
  return lanes;
}

NormParams norm_params(const NormShape& s, float eps) {
  return NormParams{s.n, s.pixels, s.channels, eps};
}

}  // namespace

void norm_forward(DType dtype, const void* x, const void* weight, const void* bias, void* y,
                  const NormShape& s, float eps, Stream stream) {
  if (s.n * s.pixels == 0 || s.channels == 0) return;
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidest = 16 / sizeof(T);
    const auto *tx = static_cast<const T*>(x), *tw = static_cast<const T*>(weight),
               *tb = static_cast<const T*>(bias);
    auto* ty = static_cast<T*>(y);
    const bool apart = aligned(x, 16) && aligned(y, 16);
    if (!s.channels_last) {
      const bool wide = apart && s.pixels % kPixels == 0;
      with_norm<kPixels>(wide, s.channels, [&](auto v, auto r) {
        constexpr int V = decltype(v)::value;
        launch("norm_forward", norm_forward_kernel<T, V, decltype(r)::value>,
               norm_config(norm_tiles(s, V), 0x7fffffff, 0, stream), tx, tw, tb, ty,
               norm_params(s, eps));
      });
      return;
    }
    const auto run = [&](auto v, auto r) {
      constexpr int V = decltype(v)::value;
      const int lanes = norm_lanes(s.channels, V);
      const int64_t blocks = ceil_div(s.n * s.pixels, kNormThreads / lanes);
      launch("norm_last", norm_last_kernel<T, V, decltype(r)::value>,
             norm_config(blocks, 0x7fffffff, 0, stream), tx, tw, tb, ty, norm_params(s, eps),
             lanes);
    };
    const bool wide = apart && s.channels % kWidest == 0;
    const bool cached = s.channels <= 32 * kNormLastCached * (wide ? kWidest : 1);
    if (wide && s.channels <= 32 * kWidest)  // one vector of each lane
      run(Number<kWidest>{}, Number<1>{});
    else if (wide)
      cached ? run(Number<kWidest>{}, Number<kNormLastCached>{})
             : run(Number<kWidest>{}, Number<0>{});
    else
      cached ? run(Number<1>{}, Number<kNormLastCached>{}) : run(Number<1>{}, Number<0>{});
  });
}

bool norm_backward_fits(const NormShape& s) {
  return !s.channels_last || s.channels <= kNormLastMost;
}

int64_t norm_partial_floats(const NormShape& s) {
  return 2 * kNormBlocks * s.channels;
}

void norm_backward(DType dtype, const void* grad, const void* x, const void* weight, void* grad_x,
                   float* partial, void* grad_weight, void* grad_bias, const NormShape& s,
                   float eps, Stream stream) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto *tg = static_cast<const T*>(grad), *tx = static_cast<const T*>(x),
               *tw = static_cast<const T*>(weight);
    auto* gx = static_cast<T*>(grad_x);
    const bool apart = aligned(grad, 16) && aligned(x, 16) && aligned(grad_x, 16);
    Config config;
    if (s.channels_last) {
      const auto run = [&](auto v, auto r) {
        constexpr int V = decltype(v)::value;
        const int lanes = norm_lanes(s.channels, V), pixels = kNormThreads / lanes;
        config = norm_config(ceil_div(s.n * s.pixels, pixels), kNormBlocks,
                             static_cast<size_t>(pixels) * s.channels * 8, stream);
        launch("norm_backward_last", norm_backward_last_kernel<T, V, decltype(r)::value>, config,
               tg, tx, tw, gx, partial, norm_params(s, eps), lanes);
      };
      const bool wide = apart && s.channels % 4 == 0;
      if (wide && s.channels <= 32 * 4)  // one vector of each lane
        run(Number<4>{}, Number<1>{});
      else if (wide)
        run(Number<4>{}, Number<kNormLastMost / 32 / 4>{});
      else
        run(Number<1>{}, Number<kNormLastMost / 32>{});
    } else {
      const bool wide = apart && s.pixels % kPixels == 0;
      with_norm<kPixels>(wide, s.channels, [&](auto v, auto r) {
        constexpr int V = decltype(v)::value;
        config =
            norm_config(norm_tiles(s, V), kNormBlocks, static_cast<size_t>(s.channels) * 8, stream);
        launch("norm_backward", norm_backward_kernel<T, V, decltype(r)::value>, config, tg, tx, tw,
               gx, partial, norm_params(s, eps));
      });
    }
    if (!partial) return;
    sum_parts(partial,
              weight_sums(dtype, grad_weight, grad_bias, s.channels, 1, 1, config.grid.x, 0, 1,
                          s.channels),
              stream);
  });
}

}  // namespace sdan_fast::cuda
