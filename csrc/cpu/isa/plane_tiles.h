// u * activation(1x1 convolution of x), or without u, of planes of bfloat16 (NCHW) by matrix tiles.
//
// Planes are moved one after the other in runs of several cache lines (planes.h), the lines of the
// next few asked for meanwhile. Two groups of outputs are computed for all pixels of a tile, so
// that their sums are in the first-level cache until they are written.
//
// Of 32 neighbouring pixels those in even places make one vector, the others the next one, as
// load_split has them: pairs are then a shift and a blend.
#pragma once

#include "activate.h"
#include "matrix_tiles.h"
#include "pixel_tiles.h"

namespace sdan_fast {
namespace SDAN_ISA {

#if SDAN_IS_AVX512
// Lines of the planes to come that are asked for.
constexpr int64_t kLinesAhead = 48;

struct PlaneTileScratch {
  float *pairs, *sums;
};

// Pixels of a tile: few while its pairs and sums are in the first-level cache for that, else longer
// runs of each plane.
SDAN_INLINE int64_t plane_tile(const Pointwise& pw) {
  return pw.ci + pw.co <= 128 ? 128 : 384;
}

static inline PlaneTileScratch place_plane_tile(const Pointwise& pw, ScratchCursor* cursor) {
  const ptrdiff_t stride = tile_stride(plane_tile(pw));
  return {cursor->take(tile_rows(pw.ci, true) * stride),
          cursor->take(ptrdiff_t{2} * tile_outputs(pw).each * stride)};
}

// Asks for n pixels of each of so many planes, one plane at a time.
class PlanesAhead {
 public:
  SDAN_INLINE PlanesAhead(const bfloat16* p, ptrdiff_t plane, int planes, int64_t n)
      : p_(p), plane_(plane), left_(planes), n_(n) {}

  SDAN_INLINE void step() {
    if (left_ == 0) return;
    for (int64_t i = 0; i < n_; i += 32) __builtin_prefetch(p_ + i, 0, 2);
    p_ += plane_;
    --left_;
  }

 private:
  const bfloat16* p_;
  ptrdiff_t plane_;
  int left_;
  int64_t n_;
};

// The pairs of n pixels of two planes, or of one where b is null.
static inline void load_split_pairs(const bfloat16* a, const bfloat16* b, int64_t n, float* out) {
  const auto pairs = [](__m512i even, __m512i odd, float* to) __attribute__((always_inline)) {
    constexpr __mmask32 kOdd = 0xaaaaaaaau;
    _mm512_storeu_si512(to, _mm512_mask_blend_epi16(kOdd, even, _mm512_slli_epi32(odd, 16)));
    _mm512_storeu_si512(to + kLanes,
                        _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32(even, 16), odd));
  };
  int64_t i = 0;
  if (b != nullptr) {
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      pairs(_mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i), out + i);
    }
  }
  for (; i < n; i += 2 * kLanes) {
    const __mmask32 lanes = n - i < 2 * kLanes ? (1u << (n - i)) - 1 : ~0u;
    pairs(_mm512_maskz_loadu_epi16(lanes, a + i),
          b != nullptr ? _mm512_maskz_loadu_epi16(lanes, b + i) : _mm512_setzero_si512(), out + i);
  }
}

// y = u * activation(sums) for n pixels of a plane, of which u and the activation may be missing.
template <bool kGated, bool kActivated>
static void finish_split_sums(Activation activation, const float* sums, const bfloat16* u,
                              int64_t n, bfloat16* y) {
  const auto finish = [=](const float* from, const bfloat16* gate, bfloat16* to)
                          __attribute__((always_inline)) {
                            Vec s[2] = {load(from), load(from + kLanes)};
                            if constexpr (kActivated) activate_switch(activation, s);
                            if constexpr (kGated) {
                              Vec even, odd;
                              load_split(gate, even, odd);
                              s[0] = even * s[0];
                              s[1] = odd * s[1];
                            }
                            _mm512_storeu_ps(to, make_pairs(s[0], s[1]).v);
                          };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) finish(sums + i, kGated ? u + i : u, y + i);
  if (i == n) return;
  const size_t bytes = static_cast<size_t>(n - i) * sizeof(bfloat16);
  bfloat16 end[2 * kLanes];
  if constexpr (kGated) std::memcpy(end, u + i, bytes);
  finish(sums + i, end, end);
  std::memcpy(y + i, end, bytes);
}

// Pixels [first, last) of the batch, which do not go on from one image to the next.
static inline void run_plane_tiles(const PointwiseConvPlan& plan, int64_t first, int64_t last,
                                   const PlaneTileScratch& s) {
  const Pointwise& conv = plan.conv;
  const TileScope scope(conv);
  configure_tiles(*conv.tiles);
  const int ci = conv.ci, co = conv.co;
  const int64_t plane = plan.x.run_pixels, tile = plane_tile(conv);
  const ptrdiff_t x_plane = plan.x.stride_c, u_plane = plan.u.stride_c, y_plane = plan.y.stride_c;
  const ptrdiff_t stride = tile_stride(tile);
  const PointwiseInput pairs{s.pairs, stride, tile_rows(ci, true)};
  const TileProduct product = tile_product(&pairs, 1, conv);
  const TileOutputs& outputs = product.outputs;
  int64_t n;
  for (int64_t i = first; i < last; i += n) {
    const int64_t image = i / plane, at = i % plane;
    n = plane - at < last - i ? plane - at : last - i;
    n = n < tile ? n : tile;
    const auto* x = static_cast<const bfloat16*>(plan.x.data) + image * plan.x.stride_run + at;
    const auto* u = static_cast<const bfloat16*>(plan.u.data);
    if (u != nullptr) u += image * plan.u.stride_run + at;
    auto* y = static_cast<bfloat16*>(plan.y.data) + image * plan.y.stride_run + at;
    const int ahead = static_cast<int>(kLinesAhead * 32 / n + 1);
    PlanesAhead next_x(x, x_plane, ci, n);
    for (int c = 0; c < ahead && c < ci; ++c) next_x.step();
    for (int c = 0; c < ci; c += 2) {
      next_x.step();
      next_x.step();
      load_split_pairs(x + c * x_plane, c + 1 < ci ? x + (c + 1) * x_plane : nullptr, n,
                       s.pairs + c / 2 * stride);
    }
    PlanesAhead next_u(u, u_plane, u != nullptr ? co : 0, n), next_y(y, y_plane, co, n);
    for (int m = 0; m < ahead && m < co; m += 2) {
      next_u.step();
      next_y.step();
    }
    int m = 0;
    for (int g = 0; g < product.groups; g += 2) {
      const int begin = outputs.begin(g), second = outputs.begin(g + 1);
      for (int64_t p = 0; p < n; p += 2 * kLanes) {
        tile_block(product, p, g, true, {s.sums + p, s.sums + (second - begin) * stride + p},
                   stride);
      }
      // The last groups may have computed some outputs again.
      for (; m < second + outputs.each; ++m) {
        next_u.step();
        next_y.step();
        const float* sums = s.sums + (m - begin) * stride;
        bfloat16* to = y + m * y_plane;
        if (u != nullptr) {
          finish_split_sums<true, false>(plan.activation, sums, u + m * u_plane, n, to);
        } else if (plan.activation == Activation::kNone) {
          finish_split_sums<false, false>(plan.activation, sums, nullptr, n, to);
        } else {
          finish_split_sums<false, true>(plan.activation, sums, nullptr, n, to);
        }
      }
    }
  }
}
#endif

}  // namespace SDAN_ISA
}  // namespace sdan_fast
