// Launches of the bias gradients of a strip chain.
#include "strip_conv_chain_bias.cuh"

#include <algorithm>
#include <numeric>

#include "launch.h"

namespace sdan_fast::cuda {
namespace {

constexpr int kBiasChannels = 4;  // of a thread, in channels_last

struct SumsPlan {
  Config config;
  int64_t splits = 1, segment = 1;
  int64_t partials = 0;  // of one bias
};

// Columns of a thread, 16 bytes.
int columns_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 8;
}

// channels_last: v channels of a thread. Columns are cut such that the SM of a large GPU that has
// the most blocks has the least to do.
SumsPlan plan_sums_last(const ChainShape& s, int v, int64_t bytes) {
  SumsPlan plan;
  const int64_t lanes = ceil_div(s.c, v), across = ceil_div(lanes, 64),
                bx = ceil_div(lanes, across);
  // Whole sectors of a row, where that leaves few threads out.
  const int64_t most = kBiasThreads / bx, whole = 32 / std::gcd(s.c * bytes, int64_t{32}),
                by = most < 4 * whole ? most : most / whole * whole;
  constexpr int64_t kFixed = 2;  // what a column's segment takes besides, in groups of its rows
  int64_t least = 0, blocks = 1;
  for (int64_t cuts = 1; cuts <= ceil_div(s.h, 2 * kBiasRows); ++cuts) {
    const int64_t segment = ceil_div(ceil_div(s.h, cuts), kBiasRows) * kBiasRows;
    const int64_t turns = ceil_div(s.n * s.w * ceil_div(s.h, segment), by);
    const int64_t cost = ceil_div(turns * across, kSms) * (segment / kBiasRows + kFixed);
    if (least && cost >= least) continue;
    least = cost, plan.segment = segment, blocks = turns;
  }
  plan.splits = std::clamp<int64_t>(blocks, 1, ceil_div(2 * kSms, across));
  plan.partials = plan.splits * s.c;
  plan.config.block = dim3(static_cast<unsigned>(bx), static_cast<unsigned>(by));
  plan.config.grid = dim3(static_cast<unsigned>(plan.splits), static_cast<unsigned>(across));
  const int n = 4 * v, pitch = std::max(bias_pitch(static_cast<int>(bx * by), n),
                                        bias_pitch(static_cast<int>(bx * by), n / 2));
  plan.config.shared_bytes = static_cast<size_t>(n) * static_cast<size_t>(pitch) * 4;
  return plan;
}

SumsPlan plan_sums(DType dtype, const ChainShape& s, int v) {
  if (s.channels_last) return plan_sums_last(s, v, dtype == DType::kFloat32 ? 4 : 2);
  SumsPlan plan;
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
  int64_t most = plan_sums(dtype, s, 1).partials;
  if (s.channels_last) most = std::max(most, plan_sums(dtype, s, kBiasChannels).partials);
  return field_floats(s) + std::max(field_floats(s), 4 * most);
}

void chain_bias_gradients(DType dtype, const void* grad, const Strip* strips, float* scratch,
                          void* const* grad_biases, const ChainShape& s, Stream stream) {
  const int64_t floats = field_floats(s);
  // Those across come first: their rows of 4 columns are aligned then. The last stage's are at the
  // beginning, and the partial sums where those before were.
  float *fields = scratch, *before = scratch + floats, *partial = before;
  if (s.stages % 2) std::swap(fields, before);
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
  const bool together = s.c % kBiasChannels == 0 && aligned(grad, 16);
  SumsPlan plan = plan_sums(dtype, s, together ? kBiasChannels : 1);
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
    if (s.channels_last)
      with_type(dtype, [&](auto element) {
        using T = decltype(element);
        launch("chain_bias_sums",
               together ? chain_bias_sums_last_kernel<T, kBiasChannels>
                        : chain_bias_sums_last_kernel<T, 1>,
               plan.config, static_cast<const T*>(grad), behind, partial, p);
      });
    else
      launch("chain_bias_sums",
             dtype == DType::kFloat32 ? chain_bias_sums_kernel<4> : chain_bias_sums_kernel<8>,
             plan.config, grad, behind, partial, p);
    // A sum for each channel and bias.
    const int64_t row = 2 * stages;
    SumParams sums{};
    sums.dtype = dtype, sums.splits = static_cast<int32_t>(plan.splits);
    sums.outer = s.c, sums.inner = row, sums.images = s.channels_last ? 1 : s.n;
    sums.outer_stride = s.channels_last ? row : plan.splits;
    sums.inner_stride = s.channels_last ? 1 : plan.partials;
    sums.image_stride = s.c * plan.splits, sums.split_stride = s.channels_last ? row * s.c : 1;
    std::copy(wanted, wanted + 2 * stages, sums.to);
    for (int k = 0; k <= kSumOutputs; ++k) sums.first[k] = std::min<int64_t>(k, row);
    sum_parts(partial, sums, stream);
  }
}

}  // namespace sdan_fast::cuda
