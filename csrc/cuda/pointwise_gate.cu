// Launches of the gate's kernels, and of the sum that ends the gradients of 1x1 convolutions.
#include "pointwise_gate.cuh"

#include <algorithm>

#include "launch.h"

namespace sdan_fast::cuda {
namespace {

constexpr int64_t kGateBlocks = 1056;  // that leave partial sums: 8 for each SM of a large GPU

// What a launch with vectors of v elements needs.
struct GatePlan {
  GateParams p;
  dim3 grid;
  int64_t splits;  // partial sums of a channel (of an image, for contiguous tensors)
};

GatePlan plan_gate(const GateShape& s, int v, bool sums) {
  GatePlan plan;
  plan.p = GateParams{s.n, s.pixels, s.channels, 1, 1};
  const int64_t vectors = s.channels / v;
  if (s.channels_last) {
    const int64_t across = ceil_div(vectors, kGateThreads / 2);
    plan.p.vectors = static_cast<int32_t>(ceil_div(vectors, across));
    const int64_t rows = kGateThreads / plan.p.vectors;
    const int64_t most = std::max<int64_t>(1, kGateBlocks / across);
    plan.splits =
        std::clamp<int64_t>(ceil_div(s.n * s.pixels, rows * 4), 1, sums ? most : int64_t{1} << 24);
    plan.grid = dim3(static_cast<unsigned>(plan.splits), static_cast<unsigned>(across));
    return plan;
  }
  const int64_t planes = s.n * s.channels, blocks = ceil_div(s.pixels / v, kGateThreads);
  // A thread of the sums takes several vectors, unless that leaves the GPU idle.
  plan.splits = sums ? std::clamp<int64_t>(ceil_div(2 * kGateBlocks, planes), 1, blocks)
                     : std::min<int64_t>(blocks, 0x7fffffff);
  plan.p.splits = static_cast<int32_t>(plan.splits);
  plan.grid = dim3(static_cast<unsigned>(std::min<int64_t>(planes * plan.splits, 0x7fffffff)));
  return plan;
}

Config gate_config(dim3 grid, Stream stream) {
  Config c;
  c.block = dim3(kGateThreads);
  c.grid = grid;
  c.stream = stream;
  return c;
}

}  // namespace

int64_t gate_partial_floats(const GateShape& s) {
  int64_t most = 0;
  for (const int v : {1, 4, 8}) {
    if ((s.channels_last ? s.channels : s.pixels) % v) continue;
    const GatePlan plan = plan_gate(s, v, true);
    most = std::max(most, plan.splits * s.channels * (s.channels_last ? 1 : s.n));
  }
  return most;
}

void gate(DType dtype, const void* a, const void* t, const void* b, const void* bias, void* y,
          void* h, float* partial, void* grad_bias, const GateShape& s, Stream stream) {
  if (s.n * s.pixels * s.channels == 0) return;
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidest = 16 / sizeof(T);
    const bool wide = aligned(a, 16) && aligned(t, 16) && aligned(b, 16) && aligned(y, 16) &&
                      aligned(h, 16) && (s.channels_last ? s.channels : s.pixels) % kWidest == 0;
    const GatePlan plan = plan_gate(s, wide ? kWidest : 1, partial != nullptr);
    const auto run = [&](auto kernel) {
      launch("gate", kernel, gate_config(plan.grid, stream), static_cast<const T*>(a),
             static_cast<const T*>(t), static_cast<const T*>(b), static_cast<const T*>(bias),
             static_cast<T*>(y), static_cast<T*>(h), partial, plan.p);
    };
    if (s.channels_last)
      wide ? run(gate_last_kernel<T, kWidest>) : run(gate_last_kernel<T, 1>);
    else
      wide ? run(gate_kernel<T, kWidest>) : run(gate_kernel<T, 1>);
    if (!partial) return;
    const int64_t c = s.channels, splits = plan.splits;
    sum_parts(partial,
              s.channels_last
                  ? flat_sums(dtype, {grad_bias}, c, 1, splits, 0, 1, c)
                  : flat_sums(dtype, {grad_bias}, c, s.n, splits, c * splits, splits, 1),
              stream);
  });
}

}  // namespace sdan_fast::cuda
