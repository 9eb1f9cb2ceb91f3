// The depth-wise half of MM-LKA: its branches, one channel of a region at a time. The point-wise
// half is gate.cpp.
//
// A branch runs its convolutions one after the other between two zero-padded buffers that hold the
// region and its halo.
#include "branch_conv.h"

namespace sdan_fast {
namespace SDAN_ISA {

namespace {

SDAN_INLINE int64_t clip(int64_t v, int64_t low, int64_t high) {
  return v < low ? low : (v > high ? high : v);
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
  const int64_t slack = kStripVecs * kLanes;
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
