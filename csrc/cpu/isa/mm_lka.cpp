// MM-LKA in two halves: the depth-wise branches, one channel of a region at a time, and the
// point-wise gate with what follows it, one block of pixels at a time.
//
// A branch runs its convolutions one after the other between two zero-padded buffers that hold the
// region and its halo. A convolution computes kRows output rows at once, taken `dilation` apart, so
// that a row loaded for one of them serves the taps of all: kh x kw multiply-adds cost (kRows + kh
// - 1) x kw loads for kRows outputs, dilated or not, and nothing is gathered.
#include "band.h"

namespace sdan_fast {
namespace SDAN_ISA {

namespace {

#if SDAN_IS_AVX512
constexpr int kRows = 8;
constexpr int kVecs = 2;
#elif SDAN_IS_AVX2
constexpr int kRows = 8;
constexpr int kVecs = 1;
#else
constexpr int kRows = 4;
constexpr int kVecs = 1;
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

void conv_any_rows(int rows, const ConvBlock& block, int64_t width) {
  switch (block.kh) {
    case 1:
      return conv_rows<1>(rows, block, width);
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
  *bytes = 2 * round_up(largest * static_cast<int64_t>(sizeof(float)), 64);
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
      ImageView one = out;
      const int64_t size = out.dtype == DType::kFloat32 ? 4 : 2;
      one.data = static_cast<char*>(out.data) + c * out.stride_c * size;
      for (int64_t y = 0; y < height; ++y) {
        store_tile(one, region->n, region->y0 + y, region->x0, 1, width, data + y * stride, 0);
      }
    }
  }
}

// ---- the gate
// ------------------------------------------------------------------------------------

namespace {

struct GateScratch {
  float *u, *x, *p, *q, *r, *w;
};

int64_t place_gate(const GatePlan& plan, char* base, GateScratch* s) {
  ScratchCursor cursor{base, 0};
  s->u = cursor.take(static_cast<int64_t>(plan.gate.ci) * kBlock);
  const int widest = plan.gate.co > plan.collect.co ? plan.gate.co : plan.collect.co;
  s->x = cursor.take(static_cast<int64_t>(widest) * kBlock);
  s->p = cursor.take(static_cast<int64_t>(plan.gate.co) * kBlock);
  s->q = cursor.take(static_cast<int64_t>(plan.project.co) * kBlock);
  s->r = cursor.take(static_cast<int64_t>(plan.collect.co) * kBlock);
  s->w = cursor.take(static_cast<int64_t>(plan.collect_both ? plan.project.co : 0) * kBlock);
  return cursor.used;
}

// A block of channels x kBlock floats wherever it lies: in the image itself, or in a tile of its
// own.
struct Block {
  float* data;
  ptrdiff_t stride;
};

// The block of `view` from (y, x) on: in place if it is whole and float32 planes, else `tile`.
Block block_of(const ImageView& view, const Region& region, int64_t y, int64_t x, int64_t n,
               float* tile) {
  if (n != kBlock || view.dtype != DType::kFloat32 || view.stride_w != 1) return {tile, kBlock};
  float* data = static_cast<float*>(view.data) + region.n * view.stride_n + y * view.stride_h + x;
  return {data, static_cast<ptrdiff_t>(view.stride_c)};
}

Block load_block(const ImageView& view, const Region& region, int64_t y, int64_t x, int channels,
                 int64_t n, float* tile) {
  const Block block = block_of(view, region, y, x, n, tile);
  if (block.data == tile) load_tile(view, region.n, y, x, 0, channels, n, tile, kBlock);
  return block;
}

void finish_block(const ImageView& view, const Region& region, int64_t y, int64_t x, int channels,
                  int64_t n, const Block& block, const float* tile) {
  if (block.data == tile) store_tile(view, region.n, y, x, channels, n, tile, kBlock);
}

// out = p * x
void multiply_block(const float* p, const Block& x, const Block& out, int channels) {
  for (int c = 0; c < channels; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < kBlock; v += kLanes) {
      store(out.data + c * out.stride + v,
            load(p + c * kBlock + v) * load(x.data + c * x.stride + v));
    }
  }
}

// z = residual + z * weight + bias, written to `out` as well.
void affine_block(float* z, const Block& residual, const float* weight, const float* bias,
                  const Block& out, int channels) {
  for (int c = 0; c < channels; ++c) {
    const Vec w = set1(weight[c]), b = set1(bias[c]);
#pragma GCC unroll 8
    for (int v = 0; v < kBlock; v += kLanes) {
      const Vec y =
          fma(load(z + c * kBlock + v), w, b) + load(residual.data + c * residual.stride + v);
      store(z + c * kBlock + v, y);
      store(out.data + c * out.stride + v, y);
    }
  }
}

// out = p + r
void add_block(const float* p, const Block& r, const Block& out, int channels) {
  for (int c = 0; c < channels; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < kBlock; v += kLanes) {
      store(out.data + c * out.stride + v,
            load(p + c * kBlock + v) + load(r.data + c * r.stride + v));
    }
  }
}

// out = x, or its pairs.
void copy_block(const Block& x, int channels, bool pairs, float* out) {
  if (pairs) return pack_pairs(x.data, x.stride, channels, kBlockVecs, out, kBlock);
  for (int c = 0; c < channels; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < kBlock; v += kLanes) {
      store(out + c * kBlock + v, load(x.data + c * x.stride + v));
    }
  }
}

// out = the 1x1 convolution of a block, which is packed in place where that takes pairs.
void multiply(float* x, const Pointwise& pw, float* out, int vecs, PrefetchQueue* queue,
              int lines) {
  if (pw.pairs) pack_pairs(x, kBlock, pw.ci, vecs, x, kBlock);
  const PointwiseInput in{x, kBlock, tile_rows(pw.ci, pw.pairs)};
  pointwise_block(&in, 1, 0, pw, out, kBlock, vecs, queue, lines);
}

}  // namespace

void gate_scratch(const GatePlan* plan, int64_t* bytes) {
  GateScratch s;
  *bytes = place_gate(*plan, nullptr, &s);
}

void gate_run(const GatePlan* plan, const Region* region, void* scratch) {
  GateScratch s;
  place_gate(*plan, static_cast<char*>(scratch), &s);
  const int channels = plan->gate.co;
  alignas(64) float zeros[kBlock] = {};
  PrefetchQueue queue;
  // Lines a step, so that the products of one row have fetched the next row by their end.
  const int images = 3 + (plan->project.co > 0 ? 1 : 0) + (plan->collect.co > 0 ? 1 : 0);
  const auto steps_of = [](const Pointwise& pw, int inputs) {
    return pw.co > 0 ? prefetch_steps(pw.co, tile_rows(pw.ci / inputs, pw.pairs), inputs) : 0;
  };
  const int steps = (steps_of(plan->gate, 1) + steps_of(plan->project, 1) +
                     steps_of(plan->collect, plan->collect_both ? 2 : 1)) *
                    (kBlockVecs / kPointwiseVecs);
  const int lines = (images * channels * (kBlock / 16) + steps - 1) / steps;
  const int64_t width = region->x1 - region->x0;
  for (int64_t y = region->y0; y < region->y1; ++y) {
    queue.clear();
    if (y + 1 < region->y1) {
      queue.add(plan->u, region->n, y + 1, region->x0, plan->gate.ci, width, false);
      queue.add(plan->x, region->n, y + 1, region->x0, channels, width, false);
      if (plan->project.co > 0) {
        queue.add(plan->residual, region->n, y + 1, region->x0, plan->project.co, width, false);
      }
      if (plan->collect.co > 0) {
        queue.add(plan->collected, region->n, y + 1, region->x0, plan->collect.co, width, true);
      }
      if (plan->out.data != plan->u.data && plan->out.data != plan->residual.data) {
        queue.add(plan->out, region->n, y + 1, region->x0, channels, width, true);
      }
    }
    for (int64_t x = region->x0; x < region->x1; x += kBlock) {
      const int64_t n = region->x1 - x < kBlock ? region->x1 - x : kBlock;
      const int vecs = static_cast<int>((n + kLanes - 1) / kLanes);
      load_tile(plan->u, region->n, y, x, 0, plan->gate.ci, n, s.u, kBlock);
      multiply(s.u, plan->gate, s.p, vecs, &queue, lines);
      const Block gated = load_block(plan->x, *region, y, x, channels, n, s.x);
      if (plan->project.co == 0) {
        const Block out = block_of(plan->out, *region, y, x, n, s.p);
        multiply_block(s.p, gated, out, channels);
        finish_block(plan->out, *region, y, x, channels, n, out, s.p);
        continue;
      }
      multiply_block(s.p, gated, {s.p, kBlock}, channels);
      const int co = plan->project.co;
      multiply(s.p, plan->project, s.q, vecs, &queue, lines);
      normalise_block<false>(s.q, kBlock, co, plan->eps, s.q, kBlock, vecs);
      {
        const Block residual = load_block(plan->residual, *region, y, x, co, n, s.x);
        if (plan->collect_both) {
          copy_block(residual, co, plan->collect.pairs, s.w);  // `out` may replace it
        }
        const Block out = block_of(plan->out, *region, y, x, n, s.q);
        affine_block(s.q, residual, plan->norm_weight, plan->norm_bias, out, co);
        finish_block(plan->out, *region, y, x, co, n, out, s.q);
      }
      if (plan->collect.co == 0) continue;
      const int collected = plan->collect.co;
      const bool pairs = plan->collect.pairs;
      if (pairs) pack_pairs(s.q, kBlock, co, vecs, s.q, kBlock);
      const int rows = tile_rows(co, pairs);
      const PointwiseInput both[2] = {{s.w, kBlock, rows}, {s.q, kBlock, rows}};
      pointwise_block(plan->collect_both ? both : both + 1, plan->collect_both ? 2 : 1, 0,
                      plan->collect, s.r, kBlock, vecs, &queue, lines);
      const Block sum = block_of(plan->collected, *region, y, x, n, s.r);
      if (plan->collect_first) {
        add_block(s.r, {zeros, 0}, sum, collected);
      } else {
        add_block(s.r, load_block(plan->collected, *region, y, x, collected, n, s.x), sum,
                  collected);
      }
      finish_block(plan->collected, *region, y, x, collected, n, sum, s.r);
    }
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
