// The second stage of every gradient that is a sum: adds the partial sums that the blocks of a
// first stage left, in a fixed order.
#pragma once

#include "conv_tile.cuh"

namespace sdan_fast::cuda {

constexpr int kSumThreads = 256;
constexpr int kSumsPerBlock = 8, kManySums = 16;  // of a block: where sums are few, and many

// A block takes `Sums` sums, 256 / Sums threads each, which add up every so many terms, images x
// splits. A thread's neighbour has the next term of the same sum if Along, else the next sum:
// whichever lies next to it.
template <bool Along, int Sums>
__device__ __forceinline__ void sum_block(const float* __restrict__ parts, const SumParams& p) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  static_assert(!Along || Sums == kSumThreads / 32);
  const int which = Along ? warp : lane % Sums,
            group = Along ? lane : warp * (32 / Sums) + lane / Sums;
  const Quotient i(static_cast<int64_t>(blockIdx.x) * Sums + which, p.inner);
  const int64_t row = i.whole, column = i.rest;
  const bool there = row < p.outer;
  CarefulSum total;
  if (there) {
    const float* from = parts + row * p.outer_stride + column * p.inner_stride;
    if (p.term_stride) {
      int64_t left = (p.images * p.splits - group + kSumThreads / Sums - 1) / (kSumThreads / Sums);
      from += group * p.term_stride;
      for (; left >= 4; left -= 4) {
        float v[4];
        SDAN_UNROLL
        for (int k = 0; k < 4; ++k) v[k] = *from, from += p.on;
        SDAN_UNROLL
        for (int k = 0; k < 4; ++k) total.add(v[k]);
      }
      for (; left > 0; --left) total.add(*from), from += p.on;
    } else {
      int64_t image = group / p.splits;
      int split = group % p.splits;
      from += image * p.image_stride + split * p.split_stride;
      while (image < p.images) {
        total.add(*from);
        image += p.images_on, split += p.splits_on, from += p.on;
        if (split >= p.splits) split -= p.splits, ++image, from += p.wrap;
      }
    }
  }
  const auto keep = [&](float sum) {
    SDAN_UNROLL
    for (int k = 0; k < kSumOutputs; ++k)
      if (p.to[k] && column >= p.first[k] && column < p.first[k + 1])
        store_any(p.dtype, p.to[k], row * (p.first[k + 1] - p.first[k]) + column - p.first[k], sum);
  };
  if constexpr (Along) {
    const float sum = warp_sum(total);
    if (there && lane == 0) keep(sum);
  } else {
    SDAN_SHARED(float, sums, [kSumThreads / 32][Sums][2]);
    SDAN_UNROLL
    for (int d = 16; d >= Sums; d >>= 1) total.merge(d);
    if (lane < Sums) sums[warp][lane][0] = total.sum, sums[warp][lane][1] = total.lost;
    __syncthreads();
    if (warp > 0 || lane >= Sums || !there) return;
    CarefulSum all;
    SDAN_UNROLL
    for (int w = 0; w < kSumThreads / 32; ++w) {
      all.add(sums[w][lane][0]);
      all.add(-sums[w][lane][1]);
    }
    keep(all.sum - all.lost);
  }
}

template <bool Along, int Sums>
__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(const float* __restrict__ parts, const SumParams p) {
  sum_block<Along, Sums>(parts, p);
}

// Several of them in one launch. grid: (blocks of the one that has the most, jobs).
struct SumJobs {
  SumJob job[kSumJobs];
};

template <int Sums>
__global__ void __launch_bounds__(kSumThreads) sum_parts_together_kernel(const SumJobs jobs) {
  SDAN_UNROLL  // parameters would need addresses for an index that is no constant
      for (unsigned i = 0; i < kSumJobs; ++i) if (blockIdx.y == i)
          sum_block<false, Sums>(jobs.job[i].parts, jobs.job[i].sums);
}

}  // namespace sdan_fast::cuda
