// The backward of one branch of depth-wise convolutions, one plane at a time.
//
// The inputs of the convolutions are computed again, each into a zero-padded buffer of its own;
// then the gradient comes back through the convolutions from the last to the first, between two
// such buffers. Everything is float32 and stays in the thread's scratch: for a patch of 64 x 64
// that is in the second-level cache, for large planes it is as many planes as there are
// convolutions, and two.
#include "branches_backward.h"

#include "by_dtype.h"
#include "padded_plane.h"
#include "tap_sums.h"

namespace sdan_fast {
namespace SDAN_ISA {

void branch_backward_scratch(const BackwardPlan* plan, int64_t* bytes) {
  int64_t inputs = 0, largest = 0;
  for (int i = 0; i < plan->conv_count; ++i) {
    const int64_t size =
        buffer_floats(padded_buffer(plan->convs[i].conv, plan->height, plan->width));
    if (i < plan->used_inputs) inputs += size;
    if (size > largest) largest = size;
  }
  const int64_t row = round_up(plan->width, 16);
  *bytes = (inputs + 2 * largest + row) * static_cast<int64_t>(sizeof(float));
}

void branch_backward_run(const BackwardPlan* plan, int64_t n, int channel, void* scratch) {
  const int64_t height = plan->height, width = plan->width;
  const int c = plan->first_channel + channel;
  const auto weight_of = [&](const BranchConv& conv, const float* weights) {
    return weights + static_cast<int64_t>(channel) * conv.kh * conv.kw;
  };

  float* input = static_cast<float*>(scratch);  // of convolution i, in the loops over i
  PaddedBuffer before{};
  for (int i = 0; i < plan->used_inputs; ++i) {
    const PaddedBuffer b = padded_buffer(plan->convs[i].conv, height, width);
    float* inner = clear_around(b, height, width, input);
    if (i == 0) {
      load_plane(plan->x, n, c, height, width, inner, b.stride);
    } else {
      const BranchConv& conv = plan->convs[i - 1].conv;
      const float* from = input - buffer_floats(before) + before.left - before.pad_x;
      conv_region(conv, weight_of(conv, conv.weight), conv.bias[channel], from, before.stride,
                  inner, b.stride, height, width);
    }
    input += buffer_floats(b);
    before = b;
  }

  int64_t largest = 0;
  for (int i = 0; i < plan->conv_count; ++i) {
    const int64_t size = buffer_floats(padded_buffer(plan->convs[i].conv, height, width));
    if (size > largest) largest = size;
  }
  float* grad = input;
  float* next = grad + largest;
  float* row = next + largest;
  int i = plan->conv_count - 1;
  PaddedBuffer b = padded_buffer(plan->convs[i].conv, height, width);
  float* inner = clear_around(b, height, width, grad);
  load_plane(plan->grad, n, c, height, width, inner, b.stride);
  for (;; --i) {
    const BackwardConv& at = plan->convs[i];
    const int64_t plane = n * plan->channels + channel;
    if (at.bias_sums != nullptr) at.bias_sums[plane] = plane_sum(inner, b.stride, height, width);
    if (i < plan->used_inputs) {
      input -= buffer_floats(b);
      if (at.weight_sums != nullptr) {
        const TapPlanes planes{
            inner, input + b.pad_y * b.stride + b.left, b.stride, b.stride, height, width};
        filter_sums(at.conv, planes, at.weight_sums + plane * at.conv.kh * at.conv.kw);
      }
    }
    if (i == plan->first_grad) break;
    const PaddedBuffer to = padded_buffer(plan->convs[i - 1].conv, height, width);
    inner = clear_around(to, height, width, next);
    conv_region(at.conv, weight_of(at.conv, at.flipped), 0.0f, grad + b.left - b.pad_x, b.stride,
                inner, to.stride, height, width);
    float* swap = grad;
    grad = next;
    next = swap;
    b = to;
  }
  if (plan->grad_x.data == nullptr) return;

  const BackwardConv& at = plan->convs[0];
  const ImageView& out = plan->grad_x;
  const float* from = grad + b.left - b.pad_x;
  const float* flipped = weight_of(at.conv, at.flipped);
  if (out.dtype == DType::kFloat32 && out.stride_w == 1 && plan->addend.data == nullptr) {
    float* p = static_cast<float*>(out.data) + n * out.stride_n + c * out.stride_c;
    conv_region(at.conv, flipped, 0.0f, from, b.stride, p, out.stride_h, height, width);
    return;
  }
  conv_region(at.conv, flipped, 0.0f, from, b.stride, next, b.stride, height, width);
  for (int64_t y = 0; y < height; ++y) {
    float* p = next + y * b.stride;
    if (plan->addend.data != nullptr) {
      load_tile(plan->addend, n, y, 0, c, 1, width, row, 0);
      for (int64_t x = 0; x < width; x += kLanes) store(p + x, load(p + x) + load(row + x));
    }
    store_tile(out, n, y, 0, c, 1, width, p, 0);
  }
}

void add_up_images(const SumsPlan* plan) {
  const int64_t taps = plan->kh * plan->kw, image = plan->channels * taps;
  by_dtype(plan->dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t c = 0; c < plan->channels; ++c) {
      T* out = static_cast<T*>(plan->out) + (c * plan->full_h + plan->i0) * plan->full_w + plan->j0;
      const double* sums = plan->sums + c * taps;
      for (int64_t i = 0; i < plan->kh; ++i) {
        for (int64_t j = 0; j < plan->kw; ++j, ++sums) {
          double sum = 0.0;
          for (int64_t n = 0; n < plan->images; ++n) sum += sums[n * image];
          out[i * plan->full_w + j] = from_float<T>(static_cast<float>(sum));
        }
      }
    }
  });
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
