// Multiply-adds on registers, enough independent ones to fill the pipelines: the rate that no
// kernel of this instruction set exceeds.
#include "fma_rate.h"

#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

void fma_loop(int64_t rounds, float* sink) {
  // Twelve chains: latency (4 or 5 cycles) times two units, and the registers of AVX2 still hold
  // them. Slowly decaying values, so that nothing overflows or becomes subnormal.
  constexpr int kChains = 12;
  constexpr int kPerRound = kFmaRoundFlops / (2 * kLanes * kChains);
  static_assert(kPerRound * 2 * kLanes * kChains == kFmaRoundFlops);
  Vec chain[kChains];
#pragma GCC unroll 12
  for (int k = 0; k < kChains; ++k) chain[k] = set1(1.0f + 0.01f * static_cast<float>(k));
  const Vec factor = set1(0.999f);
  const Vec term = set1(0.001f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 8
    for (int step = 0; step < kPerRound; ++step) {
#pragma GCC unroll 12
      for (int k = 0; k < kChains; ++k) chain[k] = fma(chain[k], factor, term);
    }
  }
  Vec sum = zero();
  for (int k = 0; k < kChains; ++k) sum = sum + chain[k];
  float lanes[kLanes];
  store(lanes, sum);
  *sink = lanes[0];
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
