// Mean and deviation over the channels of a pixel, in both memory formats.
//
// Two passes, the second one also summing the deviations: what the first mean lost to rounding is
// then known and put back, so a large common offset of the channels costs no accuracy.
#pragma once

#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

// A channel's normalized value is ((x - mean) - rest) * rstd.
template <int V>
struct Statistics {
  Vec mean[V], rest[V], rstd[V];
};

SDAN_INLINE Vec reciprocal_std(Vec mean_square, Vec rest, float eps) {
  const Vec variance = max(zero(), fnma(rest, rest, mean_square));
  return set1(1.0f) / sqrt(variance + set1(eps));
}

// Chains of additions over the channels are cut after this many: one long chain would lose the
// square root of its length.
constexpr int64_t kChainChannels = 32;

// Of V vectors of pixels, whose channels are `stride` floats apart. first(c) and second(c) are
// called for each channel of the first and of the second pass, to ask for memory.
template <int V, typename First, typename Second>
SDAN_INLINE void statistics_of_planes(Statistics<V>& s, const float* x, int64_t stride,
                                      int64_t channels, float eps, const First& first,
                                      const Second& second) {
  const Vec scale = set1(1.0f / static_cast<float>(channels));
  Vec square[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) s.mean[v] = square[v] = s.rest[v] = zero();
  const float* p = x;
  for (int64_t c = 0; c < channels;) {
    const int64_t end = c + kChainChannels < channels ? c + kChainChannels : channels;
    Vec part[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) part[v] = zero();
    for (; c < end; ++c, p += stride) {
      first(c);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) part[v] = part[v] + load(p + v * kLanes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) s.mean[v] = s.mean[v] + part[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) s.mean[v] = s.mean[v] * scale;
  p = x;
  for (int64_t c = 0; c < channels;) {
    const int64_t end = c + kChainChannels < channels ? c + kChainChannels : channels;
    Vec part[V], part_square[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) part[v] = part_square[v] = zero();
    for (; c < end; ++c, p += stride) {
      second(c);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec d = load(p + v * kLanes) - s.mean[v];
        part[v] = part[v] + d;
        part_square[v] = fma(d, d, part_square[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      s.rest[v] = s.rest[v] + part[v];
      square[v] = square[v] + part_square[v];
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    s.rest[v] = s.rest[v] * scale;
    s.rstd[v] = reciprocal_std(square[v] * scale, s.rest[v], eps);
  }
}

// The last, partial vector of a pixel's channels: how many lanes hold one, and ones in these lanes,
// zeros in the others, which must not count as deviations.
struct ChannelTail {
  int lanes;
  Vec valid;
};

SDAN_INLINE ChannelTail channel_tail(int64_t channels) {
  const int tail = static_cast<int>(channels % kLanes);
  float lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = l < tail ? 1.0f : 0.0f;
  return {tail, load(lanes)};
}

// Of G neighbouring pixels in channels_last, whose sums are independent chains; each vector has the
// same number in all lanes.
template <typename T, int G>
SDAN_INLINE void statistics_of_pixels(Statistics<G>& s, const T* x, int64_t channels, float eps,
                                      ChannelTail tail) {
  const float scale = 1.0f / static_cast<float>(channels);
  const int64_t whole = channels - tail.lanes;
  Vec square[G];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) s.mean[g] = square[g] = s.rest[g] = zero();
  for (int64_t c = 0; c < whole; c += kLanes) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) s.mean[g] = s.mean[g] + load(x + g * channels + c);
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
    if (tail.lanes != 0) s.mean[g] = s.mean[g] + load_n(x + g * channels + whole, tail.lanes);
    s.mean[g] = set1(hsum(s.mean[g]) * scale);
  }
  for (int64_t c = 0; c < whole; c += kLanes) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const Vec d = load(x + g * channels + c) - s.mean[g];
      s.rest[g] = s.rest[g] + d;
      square[g] = fma(d, d, square[g]);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
    if (tail.lanes != 0) {
      const Vec d = (load_n(x + g * channels + whole, tail.lanes) - s.mean[g]) * tail.valid;
      s.rest[g] = s.rest[g] + d;
      square[g] = fma(d, d, square[g]);
    }
    s.rest[g] = set1(hsum(s.rest[g]) * scale);
    s.rstd[g] = reciprocal_std(set1(hsum(square[g]) * scale), s.rest[g], eps);
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
