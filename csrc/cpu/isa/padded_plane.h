// A plane of an image in the zero-padded buffer of a depth-wise convolution and of its gradients.
#pragma once

#include "branch_conv.h"

namespace sdan_fast {
namespace SDAN_ISA {

// Beyond its last row a buffer is read as far as strips and moved gradients may reach.
SDAN_INLINE int64_t buffer_floats(const PaddedBuffer& b) {
  return b.rows * b.stride + round_up(b.pad_x + 2 * kLanes + kStripVecs * kLanes, 16);
}

SDAN_INLINE void zero_vectors(float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(p + i, zero());
}

// Zeroes the buffer around its height x width plane and what completes the plane's last vectors,
// and returns where the plane begins.
static inline float* clear_around(const PaddedBuffer& b, int64_t height, int64_t width,
                                  float* data) {
  zero_vectors(data, b.pad_y * b.stride);
  float* inner = data + b.pad_y * b.stride + b.left;
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t y = 0; y < height; ++y) {
    float* row = inner + y * b.stride;
    zero_vectors(row - b.left, b.left);
    zero_vectors(row + whole, b.stride - b.left - whole);
  }
  const int64_t rest = (b.pad_y + height) * b.stride;
  zero_vectors(data + rest, buffer_floats(b) - rest);
  return inner;
}

static inline void load_plane(const ImageView& view, int64_t n, int c, int64_t height,
                              int64_t width, float* out, ptrdiff_t stride) {
  for (int64_t y = 0; y < height; ++y) {
    load_tile(view, n, y, 0, c, 1, width, out + y * stride, 0);
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
