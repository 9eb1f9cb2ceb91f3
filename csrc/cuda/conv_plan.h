// How a depth-wise convolution is cut into blocks: tiles, shared memory, grid. Plain arithmetic,
// the same for GPU and host.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

#include "depthwise_conv2d.cuh"
#include "launch.h"

namespace sdan_fast::cuda {

// Enough for four blocks on an SM of 228 KiB; the most that every architecture from sm_75 on has.
constexpr int64_t kSharedGoal = 48 * 1024, kSharedMost = 64 * 1024;
constexpr int64_t kMostBlocks = 0x7fffffff;

struct ConvPlan {
  bool fits = false;
  ConvParams p{};
  Config config;
};

// make(), or what it made for the same call on the same kind of GPU among the last few of this
// thread: the choice of a tile takes longer than a launch.
template <typename Plan, typename F>
const Plan& remembered(DType dtype, const ConvShape& shape, F&& make) {
  struct Entry {
    DType dtype;
    ConvShape shape;
    int capability;
    Plan plan;
  };
  thread_local std::array<std::optional<Entry>, 16> entries;
  thread_local size_t next = 0;
  const int here = capability();
  for (const auto& e : entries)
    if (e && e->dtype == dtype && e->shape == shape && e->capability == here) return e->plan;
  auto& entry = entries[next++ % entries.size()];
  entry.emplace(Entry{dtype, shape, here, make()});
  return entry->plan;
}

inline int64_t round_up64(int64_t x, int64_t n) {
  return (x + n - 1) / n * n;
}

inline unsigned whole_warps(int64_t threads, int64_t most) {
  return static_cast<unsigned>(std::clamp<int64_t>(round_up64(threads, 32), 32, most));
}

inline ConvParams conv_params(const ConvShape& s) {
  ConvParams p{};
  p.planes = s.channels_last ? s.n : s.n * s.c;
  p.channels = static_cast<int32_t>(s.c), p.height = static_cast<int32_t>(s.h),
  p.width = static_cast<int32_t>(s.w);
  p.kh = s.kh, p.kw = s.kw, p.dh = s.dh, p.dw = s.dw;
  if (p.kh == 1)
    p.dh =
        1;  // a dilation along an axis with one tap means nothing, and would only widen the tiles
  if (p.kw == 1) p.dw = 1;
  p.abreast = 1;
  p.vertical = p.kh > 1;
  return p;
}

inline bool too_long(const ConvShape& s) {  // indices within an image and halos are 32 bits wide
  return s.h * s.w > kMostBlocks || s.c > kMostBlocks || int64_t{s.kh} * s.dh > (1 << 24) ||
         int64_t{s.kw} * s.dw > (1 << 24) || int64_t{s.kh} * s.kw > (1 << 20);
}

}  // namespace sdan_fast::cuda
