// The step from a storage type that is known at run time to one that is known at compile time.
#pragma once

#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

// f(t), t a value of the type that `dtype` names: by_dtype(d, [&](auto t) { run<decltype(t)>(); }).
template <typename F>
SDAN_INLINE void by_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(bfloat16{});
    case DType::kFloat16:
      return f(float16{});
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
