// What sums over pixels come to: the totals of all parts, and these in a tensor's own type.
#include "by_dtype.h"
#include "outer_product.h"

#include "../pixels.h"

namespace sdan_fast {
namespace SDAN_ISA {

void outer_sums_floats(int co, int ci, int64_t* floats) {
  *floats = outer_floats(co, ci);
}

void outer_totals(const PartSums* sums, int64_t parts, int co, int ci, double* totals) {
  for (int o = 0; o < co; ++o) {
    for (int i = 0; i < ci; ++i) {
      const float* p = sums->data + outer_index(ci, o, i);
      double total = 0;
      for (int64_t k = 0; k < parts; ++k, p += sums->stride) total += static_cast<double>(*p);
      *totals++ = total;
    }
  }
}

void round_totals(const double* totals, int64_t count, DType dtype, void* out) {
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t i = 0; i < count; ++i) {
      static_cast<T*>(out)[i] = from_float<T>(static_cast<float>(totals[i]));
    }
  });
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
