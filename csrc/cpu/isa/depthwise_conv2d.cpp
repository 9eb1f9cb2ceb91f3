// Depth-wise convolution, tile by tile: what needs padding or conversion is staged as float32 and
// then convolved, the rest is read in place.
#include "depthwise_conv2d.h"

#include "by_dtype.h"
#include "plane_conv.h"
#include "row_lanes.h"
#include "tile_conv.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

constexpr int kMaxBlocks = kGroupChannels / 8;

struct ConstantBias {
  Vec value;
  template <int R, int V>
  SDAN_INLINE void add(Vec (&sums)[R][V], int64_t, int64_t, int64_t) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = sums[r][v] + value;
    }
  }
};

SDAN_INLINE int64_t round_up(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

// Output pixels [h0, h1) x [w0, w1) of the image.
struct Rect {
  int64_t h0, h1, w0, w1;
};

template <typename T>
constexpr bool is_float() {
  return false;
}
template <>
constexpr bool is_float<float>() {
  return true;
}

// One group of channels of one image.
template <bool kLanewise, typename T>
struct Plane {
  const DepthwiseArgs& a;
  const T* x;
  T* y;
  int64_t pixel;  // elements from one pixel to the next
  int64_t pad_h, pad_w;
  int channels;
  int count;  // blocks of one vector of channels
  const float* weights;
  int64_t weight_floats;
  Vec bias[kLanewise ? kMaxBlocks : 1];
};

// Convolves a rectangle from a tile whose pixel (0, 0) is the first tap of the first output.
template <bool kLanewise, typename T, typename Prepare>
SDAN_INLINE void run_blocks(const Plane<kLanewise, T>& p, const Rect& rect, const float* tile,
                            ptrdiff_t row_floats, int step, const Prepare& prepare) {
  const DepthwiseArgs& a = p.a;
  const int64_t columns = rect.w1 - rect.w0;
  const int64_t row = a.w * p.pixel;
  // The rows that enter the window one group of four on.
  const int64_t ahead = p.pad_h + (a.kh_used == 1 ? 2 : 4 * a.dh);
  ConvBlock<kLanewise, ConstantBias, GridSink<kLanewise, T>, Fetch<kLanewise, T>>
      blocks[kLanewise ? kMaxBlocks : 1];
  const int count = kLanewise ? p.count : 1;
  for (int b = 0; b < count; ++b) {
    const int left = p.channels - b * kLanes;
    const int64_t first = rect.h0 * row + rect.w0 * p.pixel + b * kLanes;
    blocks[b] = {
        tile + b * kLanes,
        {p.weights + b * p.weight_floats, static_cast<int>(a.kh_used), static_cast<int>(a.kw_used),
         static_cast<int>(a.dh), static_cast<int>(a.dw), step},
        {p.bias[b]},
        {p.y + first, row, p.pixel, columns, left < kLanes ? left : kLanes},
        {p.x + first + ahead * row, p.y + first, row, p.pixel}};
  }
  const int64_t rows = rect.h1 - rect.h0;
  if constexpr (kLanewise) {
    if (a.kh_used == 1 && a.kw_used > 1) {
      // A horizontal strip with channels as lanes is a vertical one with the axes exchanged, a few
      // image rows wide: a vector of the input then serves several taps.
      for (int64_t r = 0; r < rows; r += kConvVecs) {
        const int64_t n = rows - r < kConvVecs ? rows - r : kConvVecs;
        prepare(r + n);
        for (int b = 0; b < count; ++b) {
          auto block = blocks[b];
          block.x += r * row_floats;
          block.taps = {block.taps.weights,          block.taps.kw, 1, block.taps.dw, 1,
                        static_cast<int>(row_floats)};
          block.sink = {block.sink.out + r * row, p.pixel, row, n, block.sink.channels};
          block.fetch = {p.x + (block.fetch.out - p.y) + (r + kConvVecs) * row,
                         block.fetch.out + r * row, p.pixel, row};
          conv_tile(&block, 1, step, columns, n, [](int64_t) __attribute__((always_inline)) {});
        }
      }
      return;
    }
  }
  conv_tile(blocks, count, row_floats, rows, columns, prepare);
}

// A rectangle by way of a zero-padded float32 copy of its input.
template <bool kLanewise, typename T>
void run_staged(const Plane<kLanewise, T>& p, const Rect& rect, float* staged) {
  const DepthwiseArgs& a = p.a;
  const int64_t columns = rect.w1 - rect.w0;
  if (columns <= 0 || rect.h1 <= rect.h0) return;
  const int step = kLanewise ? p.count * kLanes : 1;
  const int64_t in_columns = columns + 2 * p.pad_w;
  const ptrdiff_t row_floats = round_up(in_columns * step) + kLanes;
  const int64_t row = a.w * p.pixel;
  int64_t staged_rows = 0;
  const auto prepare = [&](int64_t wanted) __attribute__((always_inline)) {
    for (; staged_rows < wanted; ++staged_rows) {
      const int64_t h = rect.h0 - p.pad_h + staged_rows;
      float* out = staged + staged_rows * row_floats;
      if (h < 0 || h >= a.h) {
        fill_zero(out, in_columns * step);
      } else {
        stage_row<kLanewise>(out, p.x + h * row, rect.w0 - p.pad_w, in_columns, a.w, p.pixel,
                             p.channels, step);
      }
    }
  };
  run_blocks<kLanewise>(p, rect, staged, row_floats, step, prepare);
}

// A channels_last rectangle whose taps all lie in the image, read in place.
void run_direct(const Plane<true, float>& p, const Rect& rect) {
  const DepthwiseArgs& a = p.a;
  const int64_t row = a.w * p.pixel;
  const float* x = p.x + (rect.h0 - p.pad_h) * row + (rect.w0 - p.pad_w) * p.pixel;
  const auto prepare = [](int64_t) __attribute__((always_inline)) {};
  run_blocks<true>(p, rect, x, static_cast<ptrdiff_t>(row), static_cast<int>(p.pixel), prepare);
}

SDAN_INLINE int64_t clamp(int64_t v, int64_t low, int64_t high) {
  return v < low ? low : (v > high ? high : v);
}

template <bool kLanewise, typename T>
void run_tile(const DepthwiseArgs& a, int64_t n, int64_t group, int64_t tile) {
  const int64_t h0 = tile / a.grid.tiles_w * a.grid.tile_h;
  const int64_t w0 = tile % a.grid.tiles_w * a.grid.tile_w;
  const Rect whole = {h0, a.h - h0 < a.grid.tile_h ? a.h : h0 + a.grid.tile_h, w0,
                      a.w - w0 < a.grid.tile_w ? a.w : w0 + a.grid.tile_w};
  const int64_t c0 = group * a.lanes;
  const int64_t plane = kLanewise ? n * a.h * a.w * a.c + c0 : (n * a.c + c0) * a.h * a.w;
  const int channels = static_cast<int>(a.c - c0 < a.lanes ? a.c - c0 : a.lanes);
  const int count = kLanewise ? (channels + kLanes - 1) / kLanes : 1;
  const int step = kLanewise ? count * kLanes : 1;
  const int64_t pad_h = (a.kh_used - 1) / 2 * a.dh;
  const int64_t pad_w = (a.kw_used - 1) / 2 * a.dw;

  // A staged row's length is a multiple of a vector, plus one so that rows do not share cache sets.
  const int64_t row_floats = round_up((whole.w1 - whole.w0 + 2 * pad_w) * step) + kLanes;
  const int64_t weight_floats = round_up(a.kh_used * a.kw_used * pixel_floats<kLanewise>());
  // Horizontal strips of channels read kConvVecs rows where only one less is left (conv_rows).
  const int64_t spare_rows = kLanewise && a.kh_used == 1 ? 1 : 0;
  const int64_t total = count * weight_floats +
                        (whole.h1 - whole.h0 + 2 * pad_h + spare_rows) * row_floats +
                        kConvSlack * (kLanewise ? step : kLanes);
  float* weights = static_cast<float*>(thread_scratch(static_cast<size_t>(total) * sizeof(float)));
  float* staged = weights + count * weight_floats;

  Plane<kLanewise, T> p = {a,
                           static_cast<const T*>(a.x) + plane,
                           static_cast<T*>(a.y) + plane,
                           kLanewise ? a.c : 1,
                           pad_h,
                           pad_w,
                           channels,
                           count,
                           weights,
                           weight_floats,
                           {}};
  for (int b = 0; b < count; ++b) {
    const int64_t first = c0 + b * kLanes;
    const int left = channels - b * kLanes;
    const int lanes = left < kLanes ? left : kLanes;
    stage_weights<kLanewise>(weights + b * weight_floats,
                             static_cast<const T*>(a.weight) + first * a.kh * a.kw, a.kh * a.kw,
                             static_cast<int>(a.kw), static_cast<int>(a.i0), static_cast<int>(a.j0),
                             static_cast<int>(a.kh_used), static_cast<int>(a.kw_used), lanes);
    p.bias[b] = zero();
    if (a.bias != nullptr) {
      const T* bias = static_cast<const T*>(a.bias) + first;
      p.bias[b] = kLanewise ? load_n(bias, lanes) : set1(to_float(*bias));
    }
  }

  if constexpr (kLanewise && is_float<T>()) {
    // What needs no padding is read in place where the taps are few. (In NCHW a copy pays anyway:
    // narrow borders would fill vectors badly.) The kernel reads up to a pixel and a vector past
    // its last column; leaving the image's last row alone keeps that inside the tensor.
    const int64_t spare = a.c + kLanes;
    if (a.kh_used * a.kw_used <= 12 && a.w * p.pixel >= spare && a.w * p.pixel < (1 << 30)) {
      const Rect inner = {clamp(pad_h, whole.h0, whole.h1),
                          clamp(a.h - 1 - pad_h, whole.h0, whole.h1),
                          clamp(pad_w, whole.w0, whole.w1), clamp(a.w - pad_w, whole.w0, whole.w1)};
      const int64_t height = inner.h1 - inner.h0;
      const int64_t width = inner.w1 - inner.w0;
      if (height > 0 && width > 0 &&
          2 * height * width > (whole.h1 - whole.h0) * (whole.w1 - whole.w0)) {
        run_staged<kLanewise>(p, {whole.h0, inner.h0, whole.w0, whole.w1}, staged);
        run_staged<kLanewise>(p, {inner.h0, inner.h1, whole.w0, inner.w0}, staged);
        run_direct(p, inner);
        run_staged<kLanewise>(p, {inner.h0, inner.h1, inner.w1, whole.w1}, staged);
        run_staged<kLanewise>(p, {inner.h1, whole.h1, whole.w0, whole.w1}, staged);
        return;
      }
    }
  }
  run_staged<kLanewise>(p, whole, staged);
}

// Tasks [begin, end) of NCHW planes that are read in place.
template <typename T>
void run_in_place(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  const int kh = static_cast<int>(a.kh_used);
  const int kw = static_cast<int>(a.kw_used);
  RowEdges edges = edges_of(a.w, (a.kw_used - 1) / 2 * a.dw);
  const int64_t weight_floats = round_up(a.kh_used * a.kw_used);
  float* weights = static_cast<float*>(
      thread_scratch(static_cast<size_t>(weight_floats) * sizeof(float) +
                     static_cast<size_t>(edges.count() * kw) * sizeof(LaneBits)));
  edges.masks = reinterpret_cast<LaneBits*>(weights + weight_floats);
  fill_masks(edges, a.w, kw, a.dw);
  const bool single = a.order == RowOrder::kSingle;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t plane = t / a.grid.tiles_h;
    const int64_t c = plane % a.c;
    stage_weights<false>(weights, static_cast<const T*>(a.weight) + c * a.kh * a.kw, 0,
                         static_cast<int>(a.kw), static_cast<int>(a.i0), static_cast<int>(a.j0), kh,
                         kw, 1);
    const float bias = a.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(a.bias)[c]);
    const int64_t first = plane * a.h * a.w;
    const T* x = static_cast<const T*>(a.x);
    const PlaneConv<T> conv = {
        x,          x + a.n * a.c * a.h * a.w,
        x + first,  static_cast<T*>(a.y) + first,
        a.h,        a.w,
        a.w,        {weights, kh, kw, static_cast<int>(a.dh), static_cast<int>(a.dw), 1},
        set1(bias), edges};
    const int64_t h0 = t % a.grid.tiles_h * a.grid.tile_h;
    const int64_t h1 = a.h - h0 < a.grid.tile_h ? a.h : h0 + a.grid.tile_h;
    if (kh == 1) {
      plane_conv<1>(conv, h0, h1, single);
    } else if (kh == 3) {
      plane_conv<3>(conv, h0, h1, single);
    } else if (kh == 5) {
      plane_conv<5>(conv, h0, h1, single);
    } else {
      plane_conv<0>(conv, h0, h1, single);
    }
  }
}

// Tasks [begin, end) of NCHW planes whose rows are lanes.
template <typename T>
void run_lanes(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  const int kw = static_cast<int>(a.kw_used);
  LaneRows<T> p = {};
  p.x_row = p.y_row = p.w = a.w;
  p.taps = {nullptr, 1, kw, 1, static_cast<int>(a.dw), 1};
  const int64_t floats = p.vectors() * kLanes;
  p.columns = static_cast<float*>(thread_scratch(static_cast<size_t>(floats + kw) * sizeof(float)));
  float* weights = p.columns + floats;
  p.taps.weights = weights;
  fill_lane_pads(p);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t plane = t / a.grid.tiles_h;
    const int64_t c = plane % a.c;
    stage_weights<false>(weights, static_cast<const T*>(a.weight) + (c * a.kh + a.i0) * a.kw, 0,
                         static_cast<int>(a.kw), 0, static_cast<int>(a.j0), 1, kw, 1);
    p.bias = set1(a.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(a.bias)[c]));
    const int64_t h0 = t % a.grid.tiles_h * a.grid.tile_h;
    const int64_t h1 = a.h - h0 < a.grid.tile_h ? a.h : h0 + a.grid.tile_h;
    for (int64_t r = h0; r < h1; r += kLanes) {
      const int64_t first = (plane * a.h + r) * a.w;
      p.x = static_cast<const T*>(a.x) + first;
      p.y = static_cast<T*>(a.y) + first;
      p.rows = lanes_of(h1 - r);
      lane_rows(p);
    }
  }
}

}  // namespace

void depthwise_conv2d_run(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    if (args.order == RowOrder::kLanes) {
      run_lanes<T>(args, begin, end);
      return;
    }
    if (args.order != RowOrder::kTiles) {
      run_in_place<T>(args, begin, end);
      return;
    }
    for_each_tile(args, begin, end, [&](auto lanewise, int64_t n, int64_t group, int64_t tile) {
      run_tile<decltype(lanewise)::value, T>(args, n, group, tile);
    });
  });
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
