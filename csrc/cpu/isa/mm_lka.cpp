// The depth-wise half of MM-LKA: its branches, one channel of a region at a time. The point-wise
// half is gate.cpp.
//
// A branch runs its convolutions one after the other between two zero-padded buffers that hold the
// region and its halo. A convolution computes kRows output rows at once, taken `dilation` apart, so
// that a row loaded for one of them serves the taps of all: kh x kw multiply-adds cost (kRows + kh
// - 1) x kw loads for kRows outputs, dilated or not, and nothing is gathered.
#include "band.h"
#include "row_conv.h"

namespace sdan_fast {
namespace SDAN_ISA {

namespace {

#if SDAN_IS_AVX512
constexpr int kRows = 8;
constexpr int kVecs = 2;
constexpr int kRowVecs = 8;
#elif SDAN_IS_AVX2
constexpr int kRows = 8;
constexpr int kVecs = 1;
constexpr int kRowVecs = 8;
#else
constexpr int kRows = 4;
constexpr int kVecs = 1;
constexpr int kRowVecs = 4;
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
void conv_full(const ConvBlock& block, int64_t width) {
  ConvBlock at = block;
  int64_t x = 0;
  for (; x + kVecs * kLanes <= width; x += kVecs * kLanes) {
    Vec acc[R][kVecs];
    at.in = block.in + x;
    conv_sums<KH, R, kVecs>(at, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v)
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
void conv_rows(int rows, const ConvBlock& block, int64_t width) {
#define SDAN_CONV_CASE(R)                                     \
  case R:                                                     \
    if constexpr (R <= kRows) conv_full<KH, R>(block, width); \
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

void conv_strip(int rows, const ConvBlock& block, int64_t width) {
  for (int r = 0; r < rows; ++r) {
    int64_t x = 0;
    while (x < width) {
      const int64_t left = width - x;
      if (left > (kRowVecs - 2) * kLanes) {
        strip_vectors<kRowVecs>(block, r, x, left);
        x += kRowVecs * kLanes;
      } else if (left > 2 * kLanes) {
        strip_vectors<kRowVecs / 2>(block, r, x, left);
        x += kRowVecs / 2 * kLanes;
      } else {
        strip_vectors<2>(block, r, x, left);
        x += 2 * kLanes;
      }
    }
  }
}

void conv_any_rows(int rows, const ConvBlock& block, int64_t width) {
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
void conv_region(const BranchConv& conv, const float* weight, float bias, const float* in,
                 ptrdiff_t in_stride, float* out, ptrdiff_t out_stride, int64_t height,
                 int64_t width) {
  // Rows y, y + dh, y + 2 dh, ... share their input rows.
  const int64_t step = conv.kh > 1 ? conv.dh : 1;
  for (int64_t phase = 0; phase < step && phase < height; ++phase) {
    const int64_t count = (height - phase + step - 1) / step;
    const int64_t groups = (count + kRows - 1) / kRows;
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

SDAN_INLINE int64_t clip(int64_t v, int64_t low, int64_t high) {
  return v < low ? low : (v > high ? high : v);
}

// The buffer that a convolution reads: its output region with the padding around it.
struct PaddedBuffer {
  int64_t pad_y, pad_x, left, stride, rows;
};

PaddedBuffer padded_buffer(const BranchConv& conv, int64_t height, int64_t width) {
  PaddedBuffer b;
  b.pad_y = static_cast<int64_t>(conv.dh) * (conv.kh / 2);
  b.pad_x = static_cast<int64_t>(conv.dw) * (conv.kw / 2);
  b.left = round_up(b.pad_x, 16);
  // The last vector of outputs may start inside the width and read kLanes from each of its taps.
  b.stride = tile_stride(b.left + round_up(width, kLanes) + b.pad_x);
  b.rows = height + 2 * b.pad_y;
  return b;
}

constexpr int kMaxConvs = 16;

}  // namespace

void branch_scratch(const BranchPlan* plan, int branch, int64_t height, int64_t width,
                    int64_t* bytes) {
  const Branch& br = plan->branches[branch];
  int64_t largest = height * tile_stride(round_up(width, kLanes));
  for (int i = br.conv_count - 1; i >= 0; --i) {
    const BranchConv& conv = plan->convs[br.first_conv + i];
    const PaddedBuffer b = padded_buffer(conv, height, width);
    if (b.rows * b.stride > largest) largest = b.rows * b.stride;
    height = height + 2 * b.pad_y < plan->height ? height + 2 * b.pad_y : plan->height;
    width = width + 2 * b.pad_x < plan->width ? width + 2 * b.pad_x : plan->width;
  }
  // Strips along rows may read as many floats beyond the last row.
  const int64_t slack = kRowVecs * kLanes;
  *bytes = (2 * round_up(largest, 16) + slack) * static_cast<int64_t>(sizeof(float));
}

void branch_run(const BranchPlan* plan, int branch, int channel, const Region* region,
                void* scratch) {
  const Branch& br = plan->branches[branch];
  const BranchConv* convs = plan->convs + br.first_conv;
  // Output regions of the convolutions, from the last one's back to the input's.
  int64_t y0[kMaxConvs + 1], y1[kMaxConvs + 1], x0[kMaxConvs + 1], x1[kMaxConvs + 1];
  PaddedBuffer buffers[kMaxConvs];
  const int n = br.conv_count;
  y0[n] = region->y0;
  y1[n] = region->y1;
  x0[n] = region->x0;
  x1[n] = region->x1;
  int64_t largest = (y1[n] - y0[n]) * tile_stride(round_up(x1[n] - x0[n], kLanes));
  for (int i = n - 1; i >= 0; --i) {
    buffers[i] = padded_buffer(convs[i], y1[i + 1] - y0[i + 1], x1[i + 1] - x0[i + 1]);
    const int64_t size = buffers[i].rows * buffers[i].stride;
    if (size > largest) largest = size;
    y0[i] = clip(y0[i + 1] - buffers[i].pad_y, 0, plan->height);
    y1[i] = clip(y1[i + 1] + buffers[i].pad_y, 0, plan->height);
    x0[i] = clip(x0[i + 1] - buffers[i].pad_x, 0, plan->width);
    x1[i] = clip(x1[i + 1] + buffers[i].pad_x, 0, plan->width);
  }
  float* area[2];
  area[0] = static_cast<float*>(scratch);
  area[1] = area[0] + round_up(largest, 16);

  // Zeroes what the inner part [y0[i], y1[i]) x [x0[i], x1[i]) of buffer i does not cover; the
  // inner part begins `inner` floats into it.
  auto clear_margins = [&](int i, float* data, float** inner) {
    const PaddedBuffer& b = buffers[i];
    const int64_t top = y0[i] - (y0[i + 1] - b.pad_y);
    const int64_t rows = y1[i] - y0[i];
    const int64_t left = b.left - (x0[i + 1] - x0[i]);
    const int64_t width = x1[i] - x0[i];
    fill_zero(data, top * b.stride);
    for (int64_t y = top; y < top + rows; ++y) {
      fill_zero(data + y * b.stride, left);
      fill_zero(data + y * b.stride + left + width, b.stride - left - width);
    }
    fill_zero(data + (top + rows) * b.stride, (b.rows - top - rows) * b.stride);
    *inner = data + top * b.stride + left;
  };

  const int c = br.first_channel + channel;
  float* inner;
  clear_margins(0, area[0], &inner);
  for (int64_t y = y0[0]; y < y1[0]; ++y) {
    // load_tile pads to whole vectors with zeros, which is what belongs there.
    load_tile(plan->x, region->n, y, x0[0], c, 1, x1[0] - x0[0],
              inner + (y - y0[0]) * buffers[0].stride, 0);
  }
  for (int i = 0; i < n; ++i) {
    const PaddedBuffer& b = buffers[i];
    const int64_t height = y1[i + 1] - y0[i + 1], width = x1[i + 1] - x0[i + 1];
    const float* in = area[i & 1] + b.left - b.pad_x;
    const float* weight =
        convs[i].weight + static_cast<int64_t>(channel) * convs[i].kh * convs[i].kw;
    const float bias = convs[i].bias[channel];
    float* data = area[(i + 1) & 1];
    if (i + 1 < n) {
      clear_margins(i + 1, data, &inner);
      conv_region(convs[i], weight, bias, in, b.stride, inner, buffers[i + 1].stride, height,
                  width);
      continue;
    }
    const ImageView& out = plan->out;
    if (out.dtype == DType::kFloat32 && out.stride_w == 1) {
      float* p = static_cast<float*>(out.data) + region->n * out.stride_n + c * out.stride_c +
                 region->y0 * out.stride_h + region->x0;
      conv_region(convs[i], weight, bias, in, b.stride, p, out.stride_h, height, width);
    } else {
      const int64_t stride = tile_stride(round_up(width, kLanes));
      conv_region(convs[i], weight, bias, in, b.stride, data, stride, height, width);
      for (int64_t y = 0; y < height; ++y) {
        store_tile(out, region->n, region->y0 + y, region->x0, c, 1, width, data + y * stride, 0);
      }
    }
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
