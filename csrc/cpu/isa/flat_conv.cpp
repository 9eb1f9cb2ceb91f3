// Depth-wise convolution of channels_last images that are read in place.
#include "flat_conv.h"

#include "by_dtype.h"
#include "flat.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

template <typename T>
void run(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  FlatConv<T> conv = flat_geometry<T>(a.h, a.w, a.c, {a.kh_used, a.kw_used, a.dh, a.dw});
  float* scratch =
      static_cast<float*>(thread_scratch(static_cast<size_t>(flat_floats(conv)) * sizeof(float)));
  stage_flat<T, T>(conv, scratch,
                   {static_cast<const T*>(a.weight) + a.i0 * a.kw + a.j0, a.kh * a.kw, a.kw,
                    static_cast<const T*>(a.bias)});
  for (int64_t t = begin; t < end; ++t) {
    const int64_t image = t / a.grid.tiles_h * a.h * a.w * a.c;
    const int64_t h0 = t % a.grid.tiles_h * a.grid.tile_h;
    const int64_t h1 = a.h - h0 < a.grid.tile_h ? a.h : h0 + a.grid.tile_h;
    conv.x = static_cast<const T*>(a.x) + image;
    conv.y = static_cast<T*>(a.y) + image;
    flat_rectangle(conv, h0, h1, 0, a.w);
  }
}

}  // namespace

void flat_conv_run(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto t) { run<decltype(t)>(args, begin, end); });
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
