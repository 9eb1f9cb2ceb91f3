// Adding up partial sums, which a fixed partition of the work left in float32.
#pragma once

#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

// out[i] = the sum of partial[p * stride + i] over the parts p, i < n; in float64, and in the order
// of the parts, whichever thread made them.
template <typename T>
void sum_parts(const float* partial, int64_t stride, int64_t parts, int64_t n, T* out) {
  constexpr int64_t kBlock = 16;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = n - i < kBlock ? n - i : kBlock;
    double sum[kBlock] = {};
    for (int64_t p = 0; p < parts; ++p) {
      const float* part = partial + p * stride + i;
      for (int64_t k = 0; k < count; ++k) sum[k] += static_cast<double>(part[k]);
    }
    for (int64_t k = 0; k < count; ++k) out[i + k] = from_float<T>(static_cast<float>(sum[k]));
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
