// Depth-wise convolution of channels_last images that are read in place.
#include "flat_conv.h"

#include "flat.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

void run(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  FlatConv conv = flat_geometry(a.h, a.w, a.c, {a.kh_used, a.kw_used, a.dh, a.dw});
  float* scratch =
      static_cast<float*>(thread_scratch(static_cast<size_t>(flat_floats(conv)) * sizeof(float)));
  stage_flat(conv, scratch, static_cast<const float*>(a.weight) + a.i0 * a.kw + a.j0, a.kh * a.kw,
             a.kw, static_cast<const float*>(a.bias));
  for (int64_t t = begin; t < end; ++t) {
    const int64_t image = t / a.grid.tiles_h * a.h * a.w * a.c;
    const int64_t h0 = t % a.grid.tiles_h * a.grid.tile_h;
    const int64_t h1 = a.h - h0 < a.grid.tile_h ? a.h : h0 + a.grid.tile_h;
    conv.x = static_cast<const float*>(a.x) + image;
    conv.y = static_cast<float*>(a.y) + image;
    flat_image_rows(conv, h0, h1);
  }
}

}  // namespace

void flat_conv_run(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  if constexpr (kHasFlat) run(args, begin, end);
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
