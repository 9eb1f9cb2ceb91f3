// Launches of the bias gradients of a strip chain.
#include "strip_conv_chain_bias.cuh"

#include <algorithm>

#include "launch.h"

namespace sdan_fast::cuda {
namespace {

constexpr int64_t kBiasBlocks = 1056;  // 8 for each SM of a large GPU

struct SumsPlan {
  Config config;
  int64_t splits = 1, segment = 1;
  int64_t partials = 0;  // of one bias
};

// Columns of a thread, 16 bytes.
int columns_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 8;
}

SumsPlan plan_sums(DType dtype, const ChainShape& s) {
  SumsPlan plan;
  if (s.channels_last) {
    const int64_t across = ceil_div(s.c, 64), bx = ceil_div(s.c, across), by = kBiasThreads / bx;
    // Columns are cut as far as the GPU needs it, but not into fewer than 8 rows.
    const int64_t blocks = ceil_div(kBiasBlocks, across);
    const int64_t segments =
        std::clamp<int64_t>(ceil_div(blocks * by, s.n * s.w), 1, ceil_div(s.h, 8));
    plan.segment = ceil_div(s.h, segments);
    plan.splits =
        std::clamp<int64_t>(blocks, 1, ceil_div(s.n * s.w * ceil_div(s.h, plan.segment), by));
    plan.partials = plan.splits * s.c;
    plan.config.block = dim3(static_cast<unsigned>(bx), static_cast<unsigned>(by));
    plan.config.grid = dim3(static_cast<unsigned>(plan.splits), static_cast<unsigned>(across));
    plan.config.shared_bytes = static_cast<size_t>(bx * by * 4 * 4);
    return plan;
  }
  const int64_t planes = s.n * s.c;
  // Some rows for each thread, or else its own sums would cost more than they, but work for every
  // SM of a large GPU: the cut after which the one with the most blocks has the least.
  const int64_t rows = std::max<int64_t>(1, kBiasThreads / ceil_div(s.w, columns_of(dtype)));
  constexpr int64_t kFixed = 4;  // what a block does besides, in rows of its threads
  int64_t least = 0;
  for (int64_t cuts = 1; cuts <= std::min<int64_t>(16, ceil_div(s.h, rows)); ++cuts) {
    const int64_t segment = ceil_div(s.h, cuts);
    const int64_t cost = ceil_div(planes * cuts, kSms) * (ceil_div(segment, rows) + kFixed);
    if (least && cost >= least) continue;
    least = cost, plan.segment = segment;
  }
  plan.splits = ceil_div(s.h, plan.segment);
  plan.partials = planes * plan.splits;
  plan.config.block = dim3(kBiasThreads);
  plan.config.grid = dim3(static_cast<unsigned>(plan.partials));
  return plan;
}

// Of all fields once, in whole accesses of 4.
int64_t field_floats(const ChainShape& s) {
  return ceil_div(s.stages * s.c * (s.h + s.w), 4) * 4;
}

}  // namespace

int64_t chain_bias_floats(DType dtype, const ChainShape& s) {
  return 2 * field_floats(s) + 4 * plan_sums(dtype, s).partials;
}

void chain_bias_gradients(DType dtype, const void* grad, const Strip* strips, float* scratch,
                          void* const* grad_biases, const ChainShape& s, Stream stream) {
  const int64_t floats = field_floats(s);
  // Those across come first: their rows of 4 columns are aligned then.
  float *fields = scratch, *before = scratch + floats, *partial = scratch + 2 * floats;
  for (int64_t stage = 0; stage < s.stages; ++stage) {
    const Strip &h = strips[2 * stage], &v = strips[2 * stage + 1];
    FieldParams p{dtype,
                  static_cast<int32_t>(stage),
                  static_cast<int32_t>(s.c),
                  {static_cast<int32_t>(s.w), static_cast<int32_t>(s.h)},
                  {h.taps, v.taps},
                  {h.dilation, v.dilation},
                  s.channels_last};
    Config c;
    c.block = dim3(kFieldThreads);
    c.grid = dim3(static_cast<unsigned>(std::clamp<int64_t>(
        ceil_div((stage + 1) * s.c * std::max(s.h, s.w), kFieldThreads), 1, 1 << 20)));
    c.stream = stream;
    std::swap(fields, before);
    launch("chain_fields", chain_fields_kernel, c, h.weight, v.weight,
           static_cast<const float*>(before), fields, s.stages, p);
  }
  SumsPlan plan = plan_sums(dtype, s);
  plan.config.stream = stream;
  for (int64_t first = 0; first < s.stages; first += 2) {
    const int stages = static_cast<int>(std::min<int64_t>(2, s.stages - first));
    void* const* wanted = grad_biases + 2 * first;
    if (std::none_of(wanted, wanted + 2 * stages, [](const void* g) { return g; })) continue;
    BiasFields behind{};
    for (int i = 0; i <= stages && first + i < s.stages; ++i) {
      behind.across[i] = fields + (first + i) * s.c * s.w;
      behind.down[i] = fields + s.stages * s.c * s.w + (first + i) * s.c * s.h;
    }
    const BiasParams p{s.n,
                       dtype,
                       static_cast<int32_t>(s.c),
                       static_cast<int32_t>(s.h),
                       static_cast<int32_t>(s.w),
                       stages,
                       static_cast<int32_t>(plan.segment),
                       s.w % columns_of(dtype) == 0 && aligned(grad, 16)};
    launch("chain_bias_sums",
           s.channels_last            ? chain_bias_sums_last_kernel
           : dtype == DType::kFloat32 ? chain_bias_sums_kernel<4>
                                      : chain_bias_sums_kernel<8>,
           plan.config, grad, behind, partial, p);
    // A sum for each channel and bias.
    SumParams sums{};
    sums.dtype = dtype, sums.splits = static_cast<int32_t>(plan.splits);
    sums.outer = s.c, sums.inner = 2 * stages, sums.images = s.channels_last ? 1 : s.n;
    sums.outer_stride = s.channels_last ? 1 : plan.splits, sums.inner_stride = plan.partials;
    sums.image_stride = s.c * plan.splits, sums.split_stride = s.channels_last ? s.c : 1;
    std::copy(wanted, wanted + 2 * stages, sums.to);
    for (int k = 0; k <= kSumOutputs; ++k) sums.first[k] = std::min(k, 2 * stages);
    sum_parts(partial, sums, stream);
  }
}

}  // namespace sdan_fast::cuda
