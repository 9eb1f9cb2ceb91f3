// A depth-wise convolution of one plane, from a zero-padded float32 buffer.
//
// It computes kConvRows output rows at once, taken `dilation` apart, so that a row loaded for one
// of them serves the taps of all: kh x kw multiply-adds cost (kConvRows + kh - 1) x kw loads for
// kConvRows outputs, dilated or not, and nothing is gathered.
#pragma once

#include "band.h"
#include "row_conv.h"

namespace sdan_fast {
namespace SDAN_ISA {

#if SDAN_IS_AVX512
constexpr int kConvRows = 8;
constexpr int kConvVecs = 2;
constexpr int kStripVecs = 8;
#elif SDAN_IS_AVX2
constexpr int kConvRows = 8;
constexpr int kConvVecs = 1;
constexpr int kStripVecs = 8;
#else
constexpr int kConvRows = 4;
constexpr int kConvVecs = 1;
constexpr int kStripVecs = 4;
#endif

// One convolution over a block of R x V vectors. `in` points at the first tap of the first output;
// in_row and out_row are the distances between rows that are `dilation` apart.
struct ConvBlock {
  const float* in;
  ptrdiff_t in_row;
  float* out;
  ptrdiff_t out_row;
  const float* weight;
  float bias;
  int kh, kw, dw;
};

// KH is the kernel's height, or 0 for any height.
template <int KH, int R, int V>
SDAN_INLINE void conv_sums(const ConvBlock& block, Vec (&acc)[R][V]) {
  const Vec bias = set1(block.bias);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = bias;
  }
  if constexpr (KH == 0) {
    for (int j = 0; j < block.kw; ++j) {
      const float* in = block.in + static_cast<ptrdiff_t>(j) * block.dw;
      for (int i = 0; i < block.kh; ++i) {
        const Vec w = set1(block.weight[static_cast<ptrdiff_t>(i) * block.kw + j]);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) {
            acc[r][v] = fma(load(in + (i + r) * block.in_row + v * kLanes), w, acc[r][v]);
          }
        }
      }
    }
  } else {
    for (int j = 0; j < block.kw; ++j) {
      const float* in = block.in + static_cast<ptrdiff_t>(j) * block.dw;
      Vec w[KH];
#pragma GCC unroll 16
      for (int i = 0; i < KH; ++i) w[i] = set1(block.weight[i * block.kw + j]);
#pragma GCC unroll 32
      for (int y = 0; y < R + KH - 1; ++y) {
        Vec x[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) x[v] = load(in + y * block.in_row + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const int i = y - r;
          if (i < 0 || i >= KH) continue;
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) acc[r][v] = fma(x[v], w[i], acc[r][v]);
        }
      }
    }
  }
}

template <int KH, int R>
static void conv_full(const ConvBlock& block, int64_t width) {
  ConvBlock at = block;
  int64_t x = 0;
  for (; x + kConvVecs * kLanes <= width; x += kConvVecs * kLanes) {
    Vec acc[R][kConvVecs];
    at.in = block.in + x;
    conv_sums<KH, R, kConvVecs>(at, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kConvVecs; ++v)
        store(block.out + r * block.out_row + x + v * kLanes, acc[r][v]);
    }
  }
  for (; x < width; x += kLanes) {
    Vec acc[R][1];
    at.in = block.in + x;
    conv_sums<KH, R, 1>(at, acc);
    const int64_t left = width - x;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float* out = block.out + r * block.out_row + x;
      // What lies beyond the width is the next convolution's zero padding.
      if (left >= kLanes) {
        store(out, acc[r][0]);
      } else {
        store_n(out, acc[r][0], static_cast<int>(left));
      }
    }
  }
}

template <int KH>
static void conv_rows(int rows, const ConvBlock& block, int64_t width) {
#define SDAN_CONV_CASE(R)                                         \
  case R:                                                         \
    if constexpr (R <= kConvRows) conv_full<KH, R>(block, width); \
    break;
  switch (rows) {
    SDAN_CONV_CASE(1)
    SDAN_CONV_CASE(2)
    SDAN_CONV_CASE(3)
    SDAN_CONV_CASE(4)
    SDAN_CONV_CASE(5)
    SDAN_CONV_CASE(6)
    SDAN_CONV_CASE(7)
    SDAN_CONV_CASE(8)
    default:
      break;
  }
#undef SDAN_CONV_CASE
}

// V vectors of one row of a convolution along rows, of which `left` outputs are wanted.
template <int V>
SDAN_INLINE void strip_vectors(const ConvBlock& block, int row, int64_t x, int64_t left) {
  Vec acc[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) acc[v] = set1(block.bias);
  row_sums(acc, block.in + row * block.in_row + x, block.weight, block.kw, block.dw);
  float* out = block.out + row * block.out_row + x;
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v, left -= kLanes) {
    // What lies beyond the width is the next convolution's zero padding.
    if (left >= kLanes) {
      store(out + v * kLanes, acc[v]);
    } else if (left > 0) {
      store_n(out + v * kLanes, acc[v], static_cast<int>(left));
    }
  }
}

static inline void conv_strip(int rows, const ConvBlock& block, int64_t width) {
  for (int r = 0; r < rows; ++r) {
    int64_t x = 0;
    while (x < width) {
      const int64_t left = width - x;
      if (left > (kStripVecs - 2) * kLanes) {
        strip_vectors<kStripVecs>(block, r, x, left);
        x += kStripVecs * kLanes;
      } else if (left > 2 * kLanes) {
        strip_vectors<kStripVecs / 2>(block, r, x, left);
        x += kStripVecs / 2 * kLanes;
      } else {
        strip_vectors<2>(block, r, x, left);
        x += 2 * kLanes;
      }
    }
  }
}

static inline void conv_any_rows(int rows, const ConvBlock& block, int64_t width) {
  switch (block.kh) {
    case 1:
      return conv_strip(rows, block, width);
    case 3:
      return conv_rows<3>(rows, block, width);
    case 5:
      return conv_rows<5>(rows, block, width);
    case 7:
      return conv_rows<7>(rows, block, width);
    case 9:
      return conv_rows<9>(rows, block, width);
    case 11:
      return conv_rows<11>(rows, block, width);
    default:
      return conv_rows<0>(rows, block, width);
  }
}

// out[y][x] for a height x width region; `in` points at the first tap of out[0][0].
static inline void conv_region(const BranchConv& conv, const float* weight, float bias,
                               const float* in, ptrdiff_t in_stride, float* out,
                               ptrdiff_t out_stride, int64_t height, int64_t width) {
  // Rows y, y + dh, y + 2 dh, ... share their input rows.
  const int64_t step = conv.kh > 1 ? conv.dh : 1;
  for (int64_t phase = 0; phase < step && phase < height; ++phase) {
    const int64_t count = (height - phase + step - 1) / step;
    const int64_t groups = (count + kConvRows - 1) / kConvRows;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = count * g / groups;
      const int rows = static_cast<int>(count * (g + 1) / groups - first);
      const int64_t y = phase + first * step;
      const ConvBlock block{in + y * in_stride,
                            static_cast<ptrdiff_t>(step * in_stride),
                            out + y * out_stride,
                            static_cast<ptrdiff_t>(step * out_stride),
                            weight,
                            bias,
                            conv.kh,
                            conv.kw,
                            conv.dw};
      conv_any_rows(rows, block, width);
    }
  }
}

// The buffer that a convolution reads: its output region with the padding around it.
struct PaddedBuffer {
  int64_t pad_y, pad_x, left, stride, rows;
};

static inline PaddedBuffer padded_buffer(const BranchConv& conv, int64_t height, int64_t width) {
  PaddedBuffer b;
  b.pad_y = static_cast<int64_t>(conv.dh) * (conv.kh / 2);
  b.pad_x = static_cast<int64_t>(conv.dw) * (conv.kw / 2);
  b.left = round_up(b.pad_x, 16);
  // The last vector of outputs may start inside the width and read kLanes from each of its taps.
  b.stride = tile_stride(b.left + round_up(width, kLanes) + b.pad_x);
  b.rows = height + 2 * b.pad_y;
  return b;
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
