// Depth-wise convolution, tile by tile: stage the zero-padded input as float32, then convolve.
#include "depthwise_conv2d.h"

#include "tile_conv.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

template <bool kLanewise, typename T>
void run_tile(const DepthwiseArgs& a, int64_t n, int64_t block, int64_t tile) {
  constexpr int kStep = pixel_floats<kLanewise>();
  const int64_t h0 = tile / a.grid.tiles_w * a.grid.tile_h;
  const int64_t w0 = tile % a.grid.tiles_w * a.grid.tile_w;
  const int64_t rows = a.h - h0 < a.grid.tile_h ? a.h - h0 : a.grid.tile_h;
  const int64_t columns = a.w - w0 < a.grid.tile_w ? a.w - w0 : a.grid.tile_w;
  const int64_t c0 = block * a.lanes;
  const int channels = static_cast<int>(a.c - c0 < a.lanes ? a.c - c0 : a.lanes);
  const int64_t pad_h = (a.kh_used - 1) / 2 * a.dh;
  const int64_t pad_w = (a.kw_used - 1) / 2 * a.dw;
  const int64_t in_rows = rows + 2 * pad_h;
  const int64_t in_columns = columns + 2 * pad_w;

  // The row's length is a multiple of a vector, plus one so that rows do not share cache sets.
  const ptrdiff_t row_floats = (in_columns * kStep + kLanes - 1) / kLanes * kLanes + kLanes;
  const int64_t weight_floats = (a.kh_used * a.kw_used * kStep + kLanes - 1) / kLanes * kLanes;
  const int64_t total = weight_floats + in_rows * row_floats + kConvSlack * kLanes;
  float* weights = static_cast<float*>(thread_scratch(static_cast<size_t>(total) * sizeof(float)));
  float* staged = weights + weight_floats;

  stage_weights<kLanewise>(weights, static_cast<const T*>(a.weight) + c0 * a.kh * a.kw, a.kh * a.kw,
                           static_cast<int>(a.kw), static_cast<int>(a.i0), static_cast<int>(a.j0),
                           static_cast<int>(a.kh_used), static_cast<int>(a.kw_used), channels);
  const int64_t pixel = kLanewise ? a.c : 1;  // elements from one pixel to the next
  const int64_t plane = kLanewise ? n * a.h * a.w * a.c + c0 : (n * a.c + c0) * a.h * a.w;
  const T* x = static_cast<const T*>(a.x) + plane;
  for (int64_t r = 0; r < in_rows; ++r) {
    const int64_t h = h0 - pad_h + r;
    float* out = staged + r * row_floats;
    if (h < 0 || h >= a.h) {
      fill_zero(out, in_columns * kStep);
    } else {
      stage_row<kLanewise>(out, x + h * a.w * pixel, w0 - pad_w, in_columns, a.w, pixel, channels);
    }
  }

  Vec bias = zero();
  if (a.bias != nullptr) {
    const T* b = static_cast<const T*>(a.bias) + c0;
    bias = kLanewise ? load_n(b, channels) : set1(to_float(*b));
  }
  T* y = static_cast<T*>(a.y) + plane + (h0 * a.w + w0) * pixel;
  const auto add = [bias](int64_t, int64_t) __attribute__((always_inline)) { return bias; };
  const GridSink<kLanewise, T> sink = {y, a.w * pixel, pixel, columns, channels};
  const Taps taps = {weights, static_cast<int>(a.kh_used), static_cast<int>(a.kw_used),
                     static_cast<int>(a.dh), static_cast<int>(a.dw)};
  conv_tile<kLanewise>(staged, taps, row_floats, rows, columns, add, sink);
}

template <bool kLanewise, typename T>
void run(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  const int64_t blocks = (a.c + a.lanes - 1) / a.lanes;
  const int64_t tiles = a.grid.tiles_h * a.grid.tiles_w;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n = t / (blocks * tiles);
    const int64_t rest = t % (blocks * tiles);
    if constexpr (kLanewise) {
      run_tile<kLanewise, T>(a, n, rest % blocks, rest / blocks);
    } else {
      run_tile<kLanewise, T>(a, n, rest / tiles, rest % tiles);
    }
  }
}

template <typename T>
void run_format(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  if (a.channels_last) {
    run<true, T>(a, begin, end);
  } else {
    run<false, T>(a, begin, end);
  }
}

}  // namespace

void depthwise_conv2d_run(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return run_format<float>(args, begin, end);
    case DType::kBFloat16:
      return run_format<bfloat16>(args, begin, end);
    default:
      return run_format<float16>(args, begin, end);
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
