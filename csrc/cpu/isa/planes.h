// A tile of neighbouring pixels of many planes (NCHW), copied into scratch and written back.
//
// What works on all channels of a pixel at once touches as many planes, at distances that are often
// multiples of a large power of two: their lines then share a few sets of every cache and evict
// each other before they are used. Copied plane by plane, in runs of several lines, they do not:
// few streams are open at a time, and the tile's own rows are spread over the cache. What is moved
// next should be prefetched while the tile is computed, when the memory would else be idle.
#pragma once

#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

// Floats from one row of a staged tile of n pixels to the next: whole vectors, and one more so that
// rows do not share cache sets.
SDAN_INLINE constexpr int64_t staged_stride(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes + kLanes;
}

// out[c][i] = x[c][i] for i < n, zero up to a whole vector.
template <typename T>
SDAN_INLINE void stage_planes(float* out, int64_t stride, const T* x, int64_t plane,
                              int64_t channels, int64_t n) {
  for (int64_t c = 0; c < channels; ++c) {
    const T* from = x + c * plane;
    float* to = out + c * stride;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    if (i < n) store(to + i, load_n(from + i, static_cast<int>(n - i)));
  }
}

// y[c][i] = value(c, i, lanes) for i < n; `lanes` of the last vector of a row exist.
template <typename T, typename Value>
SDAN_INLINE void write_planes(T* y, int64_t plane, int64_t channels, int64_t n,
                              const Value& value) {
  for (int64_t c = 0; c < channels; ++c) {
    T* to = y + c * plane;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, value(c, i, kLanes));
    if (i < n) {
      const int left = static_cast<int>(n - i);
      store_n(to + i, value(c, i, left), left);
    }
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
