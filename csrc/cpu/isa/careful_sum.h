// Sums over all pixels, which may come to much less than their terms: a bias's gradient.
#pragma once

#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

// The lanes, in double: their sums are as large as the result, and added in float32 would leave it
// a good part of its error.
static inline double lanes_sum(Vec a) {
  float lanes[kLanes];
  store(lanes, a);
  double even = 0.0, odd = 0.0;
  for (int i = 0; i < kLanes; i += 2) {
    even += static_cast<double>(lanes[i]);
    odd += static_cast<double>(lanes[i + 1]);
  }
  return even + odd;
}

// What the rounding of a sum takes is carried along.
struct CarefulSum {
  Vec sum = zero(), rest = zero();

  SDAN_INLINE void add(Vec term) {
    const Vec next = sum + term;
    const Vec added = next - sum;
    rest = rest + ((sum - (next - added)) + (term - added));
    sum = next;
  }

  // A row that is zero up to a whole vector.
  SDAN_INLINE void add_row(const float* row, int64_t width) {
    for (int64_t x = 0; x < width; x += kLanes) add(load(row + x));
  }

  double total() const { return lanes_sum(sum) + lanes_sum(rest); }
};

}  // namespace SDAN_ISA
}  // namespace sdan_fast
