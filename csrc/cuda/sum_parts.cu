// The launch of sum_parts.
#include "sum_parts.cuh"

#include <algorithm>

#include "launch.h"

namespace sdan_fast::cuda {

SumParams flat_sums(DType dtype, std::initializer_list<void*> outputs, int64_t count,
                    int64_t images, int64_t splits, int64_t image_stride, int64_t sum_stride,
                    int64_t split_stride) {
  SumParams p{};
  p.dtype = dtype, p.splits = static_cast<int32_t>(splits);
  p.outer = 1, p.inner = count * static_cast<int64_t>(outputs.size()), p.images = images;
  p.inner_stride = sum_stride, p.image_stride = image_stride, p.split_stride = split_stride;
  std::copy(outputs.begin(), outputs.end(), p.to);
  for (int k = 0; k <= kSumOutputs; ++k) p.first[k] = std::min(k * count, p.inner);
  return p;
}

SumParams weight_sums(DType dtype, void* grad_weight, void* grad_bias, int64_t channels,
                      int64_t taps, int64_t images, int64_t splits, int64_t image_stride,
                      int64_t channel_stride, int64_t split_stride) {
  const int64_t row = taps + 1;
  SumParams p{};
  p.dtype = dtype, p.splits = static_cast<int32_t>(splits);
  p.outer = channels, p.inner = row, p.images = images;
  p.outer_stride = channel_stride * row, p.inner_stride = 1;
  p.image_stride = image_stride * row, p.split_stride = split_stride * row;
  p.to[0] = grad_weight, p.to[1] = grad_bias;
  p.first[1] = taps;
  std::fill(p.first + 2, std::end(p.first), row);
  return p;
}

namespace {

// Which kernel sums take.
enum class Kind { kNone, kAlong, kMany, kFew };

// Chooses it, and fills in what follows from it.
Kind prepare(SumParams& p) {
  const int64_t count = p.outer * p.inner;
  if (count == 0 || std::none_of(p.to, p.to + kSumOutputs, [](const void* t) { return t; }))
    return Kind::kNone;
  const bool along = p.split_stride == 1 && p.splits > 1,
             many = !along && count >= kSms * kManySums;
  const int groups = kSumThreads / (many ? kManySums : kSumsPerBlock);
  p.images_on = groups / p.splits, p.splits_on = groups % p.splits;
  p.wrap = p.image_stride - p.splits * p.split_stride;
  p.term_stride = p.splits == 1                  ? p.image_stride
                  : p.images == 1 || p.wrap == 0 ? p.split_stride
                                                 : 0;
  p.on = p.term_stride ? groups * p.term_stride
                       : p.images_on * p.image_stride + p.splits_on * p.split_stride;
  return along ? Kind::kAlong : many ? Kind::kMany : Kind::kFew;
}

unsigned blocks_of(const SumParams& p, Kind kind) {
  return static_cast<unsigned>(
      ceil_div(p.outer * p.inner, kind == Kind::kMany ? kManySums : kSumsPerBlock));
}

Config sum_config(dim3 grid, Stream stream) {
  Config c;
  c.block = dim3(kSumThreads);
  c.grid = grid;
  c.stream = stream;
  return c;
}

}  // namespace

void sum_parts(const float* parts, SumParams p, Stream stream) {
  const Kind kind = prepare(p);
  if (kind == Kind::kNone) return;
  launch("sum_parts",
         kind == Kind::kAlong  ? sum_parts_kernel<true, kSumsPerBlock>
         : kind == Kind::kMany ? sum_parts_kernel<false, kManySums>
                               : sum_parts_kernel<false, kSumsPerBlock>,
         sum_config(dim3(blocks_of(p, kind)), stream), parts, p);
}

void sum_parts_together(const std::vector<SumJob>& jobs, Stream stream) {
  for (const Kind kind : {Kind::kMany, Kind::kFew}) {
    SumJobs some{};
    unsigned count = 0, blocks = 0;
    const auto flush = [&] {
      if (count == 1)
        sum_parts(some.job[0].parts, some.job[0].sums, stream);
      else if (count > 1)
        launch("sum_parts_together",
               kind == Kind::kMany ? sum_parts_together_kernel<kManySums>
                                   : sum_parts_together_kernel<kSumsPerBlock>,
               sum_config(dim3(blocks, count), stream), some);
      count = blocks = 0;
    };
    for (SumJob job : jobs) {
      if (prepare(job.sums) != kind) continue;
      blocks = std::max(blocks, blocks_of(job.sums, kind));
      some.job[count++] = job;
      if (count == kSumJobs) flush();
    }
    flush();
  }
  for (SumJob job : jobs)  // a sum's terms beside each other: by themselves
    if (prepare(job.sums) == Kind::kAlong) sum_parts(job.parts, job.sums, stream);
}

}  // namespace sdan_fast::cuda
