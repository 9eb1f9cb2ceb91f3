// A strip along a row: what one filter's taps add to neighbouring vectors of outputs.
//
// A vector that lies across two cache lines takes two loads, and all taps of a row but one in
// kLanes lie so: loads alone would hold multiply-adds to half their rate. Every second vector is
// therefore shifted together from aligned ones, which are loaded once for all taps that begin in
// the same line: loads, shifts and multiply-adds go to different units then.
#pragma once

#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

#if SDAN_IS_AVX512

// One tap of V vectors: `x` points at its first input, S floats behind the aligned line[0].
template <int S, int V>
SDAN_INLINE void shifted_tap(Vec (&acc)[V], const Vec (&line)[V + 1], const float* x, Vec weight) {
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    if constexpr (S == 0) {
      acc[v] = fma(line[v], weight, acc[v]);
    } else if (v % 2 == 0) {
      acc[v] = fma(lanes_from<S>(line[v], line[v + 1]), weight, acc[v]);
    } else {
      acc[v] = fma(load(x + v * kLanes), weight, acc[v]);
    }
  }
}

// acc[v] += sum over j < taps of weights[j] * x[v * kLanes + j * distance], lane by lane. May read
// whole lines, from the one that x[0] lies in to the one after the last input's.
template <int V>
SDAN_INLINE void row_sums(Vec (&acc)[V], const float* x, const float* weights, int taps,
                          ptrdiff_t distance) {
  ptrdiff_t shift = static_cast<ptrdiff_t>(reinterpret_cast<uintptr_t>(x) / sizeof(float) % kLanes);
  const float* lines = x - shift;
  for (int j = 0; j < taps;) {
    Vec line[V + 1];
#pragma GCC unroll 9
    for (int v = 0; v <= V; ++v) line[v] = load(lines + v * kLanes);
    for (; j < taps && shift < kLanes; ++j, shift += distance) {
      const Vec weight = set1(weights[j]);
      switch (shift) {
#define SDAN_SHIFT_CASE(S)                            \
  case S:                                             \
    shifted_tap<S>(acc, line, lines + shift, weight); \
    break;
        SDAN_SHIFT_CASE(0)
        SDAN_SHIFT_CASE(1)
        SDAN_SHIFT_CASE(2)
        SDAN_SHIFT_CASE(3)
        SDAN_SHIFT_CASE(4)
        SDAN_SHIFT_CASE(5)
        SDAN_SHIFT_CASE(6)
        SDAN_SHIFT_CASE(7)
        SDAN_SHIFT_CASE(8)
        SDAN_SHIFT_CASE(9)
        SDAN_SHIFT_CASE(10)
        SDAN_SHIFT_CASE(11)
        SDAN_SHIFT_CASE(12)
        SDAN_SHIFT_CASE(13)
        SDAN_SHIFT_CASE(14)
        SDAN_SHIFT_CASE(15)
#undef SDAN_SHIFT_CASE
        default:
          __builtin_unreachable();
      }
    }
    lines += shift / kLanes * kLanes;
    shift %= kLanes;
  }
}

#else

// Shorter vectors lie across two lines less than half as often: loads do not bind there.
template <int V>
SDAN_INLINE void row_sums(Vec (&acc)[V], const float* x, const float* weights, int taps,
                          ptrdiff_t distance) {
  for (int j = 0; j < taps; ++j, x += distance) {
    const Vec weight = set1(weights[j]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[v] = fma(load(x + v * kLanes), weight, acc[v]);
  }
}

#endif

#if !SDAN_IS_PORTABLE
// The same of bfloat16 whose even and odd pixels are vectors of their own (load_two), taps next to
// each other and odd in number: the even ones of a load serve the odd sums as well, one tap before.
template <int V>
SDAN_INLINE void row_sums(Vec (&acc)[V], const bfloat16* x, const float* weights, int taps) {
  const auto add = [&](int j, bool first, bool last) __attribute__((always_inline)) {
    const Vec before = first ? zero() : set1(weights[j - 1]), here = set1(weights[j]);
    const Vec after = last ? zero() : set1(weights[j + 1]);
#pragma GCC unroll 8
    for (int v = 0; v < V; v += 2) {
      Vec even, odd;
      load_split(x + v * kLanes + j, even, odd);
      acc[v] = fma(even, here, acc[v]);
      if (!last) acc[v] = fma(odd, after, acc[v]);
      if (!first) acc[v + 1] = fma(even, before, acc[v + 1]);
      acc[v + 1] = fma(odd, here, acc[v + 1]);
    }
  };
  if (taps == 1) return add(0, true, true);
  add(0, true, false);
  for (int j = 2; j + 1 < taps; j += 2) add(j, false, false);
  add(taps - 1, false, true);
}
#endif

}  // namespace SDAN_ISA
}  // namespace sdan_fast
