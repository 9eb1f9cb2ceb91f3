// What the star's kernels know at compile time, forward and backward.
#pragma once

#include <type_traits>

#include "by_dtype.h"

namespace sdan_fast {
namespace SDAN_ISA {

// f(t, activation, outer): t a value of the type that args.dtype names, the others constants of
// args.activation and of whether there is an outer activation. Which one it is, being rare, stays a
// well-predicted branch.
template <typename Args, typename F>
SDAN_INLINE void by_star_types(const Args& args, const F& f) {
  by_dtype(args.dtype, [&](auto t) {
    const auto with = [&](auto activation) {
      if (args.outer == Activation::kNone) {
        f(t, activation, std::false_type{});
      } else {
        f(t, activation, std::true_type{});
      }
    };
    switch (args.activation) {
      case Activation::kGelu:
        return with(std::integral_constant<Activation, Activation::kGelu>{});
      case Activation::kRelu6:
        return with(std::integral_constant<Activation, Activation::kRelu6>{});
      case Activation::kRelu:
        return with(std::integral_constant<Activation, Activation::kRelu>{});
      case Activation::kSilu:
        return with(std::integral_constant<Activation, Activation::kSilu>{});
      default:
        return with(std::integral_constant<Activation, Activation::kNone>{});
    }
  });
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
