// 1x1 convolutions of pairs of bfloat16 (pairs.h) by a processor's matrix tiles (AMX): eight
// registers of up to 16 rows of 64 bytes, of which one instruction multiplies two and adds the
// product to a third.
//
// A tile of pixels as pointwise.h reads it is such a matrix already: rows of 16 pixels, each of 32
// bits two channels. So outputs x inputs weights times inputs x pixels make outputs x pixels, from
// and to where they lie. Products of two groups of outputs and two vectors of pixels are under way
// at a time; each waits for itself alone.
//
// What is configured is asked of the processor, not remembered: other libraries use the tiles of
// the same threads.
#pragma once

#include "pairs.h"
#include "prefetch.h"

namespace sdan_fast {
namespace SDAN_ISA {

// `count` rows of input, `stride` floats from one to the next: channels, or pairs of them.
struct PointwiseInput {
  const float* x;
  ptrdiff_t stride;
  int count;
};

#if SDAN_IS_AVX512
// Assembly, as in pairs.h: no unit needs a flag for what few processors have. GCC knows none of
// these registers, so that nothing but the order of the statements matters.
#define SDAN_TILE_LOAD(TILE, P, BYTES) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #TILE : : "r"(P), "r"(BYTES) : "memory")
#define SDAN_TILE_STORE(TILE, P, BYTES) \
  asm volatile("tilestored %%tmm" #TILE ", (%0,%1,1)" : : "r"(P), "r"(BYTES) : "memory")
#define SDAN_TILE_ADD(SUM, A, B) \
  asm volatile("tdpbf16ps %%tmm" #B ", %%tmm" #A ", %%tmm" #SUM : : : "memory")

// Tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 inputs.
SDAN_INLINE void configure_tiles(const TileConfig& config) {
  alignas(64) TileConfig now;
  asm volatile("sttilecfg %0" : "=m"(now));
  if (_mm512_cmpneq_epi32_mask(_mm512_load_si512(&now), _mm512_load_si512(&config)) != 0) {
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
}

// Leaves the tiles as a thread that never used them has them, at the end of its scope.
class TileScope {
 public:
  explicit TileScope(const Pointwise& pw) : used_(pw.tiles != nullptr) {}
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
  ~TileScope() {
    if (used_) asm volatile("tilerelease");
  }

 private:
  bool used_;
};

// M groups of outputs by V vectors of pixels. `weight` is the first group's tiles, `group` floats
// before the next one's; its bias 16 floats for each output.
template <int M, int V>
static inline void tile_block(const PointwiseInput* inputs, int input_count, ptrdiff_t column,
                              const float* weight, ptrdiff_t group, const float* const* bias,
                              const TileConfig& config, float* const* out, ptrdiff_t out_bytes) {
  const int outputs = config.rows[0], rows = config.rows[6];
  constexpr ptrdiff_t kLine = 64;
  SDAN_TILE_LOAD(0, bias[0], kLine);
  if constexpr (V > 1) SDAN_TILE_LOAD(1, bias[0], kLine);
  if constexpr (M > 1) SDAN_TILE_LOAD(2, bias[1], kLine);
  if constexpr (M > 1 && V > 1) SDAN_TILE_LOAD(3, bias[1], kLine);
  for (int i = 0; i < input_count; ++i) {
    const ptrdiff_t stride = inputs[i].stride,
                    bytes = stride * static_cast<ptrdiff_t>(sizeof(float));
    const int last = inputs[i].count - rows;
    for (int begin = 0; begin < inputs[i].count; begin += rows, weight += 16 * outputs) {
      // The last rows are read with some of those before them, whose weights are zero there.
      const float* x = inputs[i].x + column + (begin < last ? begin : last) * stride;
      SDAN_TILE_LOAD(6, x, bytes);
      SDAN_TILE_LOAD(4, weight, kLine);
      if constexpr (V > 1) SDAN_TILE_LOAD(7, x + kLanes, bytes);
      if constexpr (M > 1) SDAN_TILE_LOAD(5, weight + group, kLine);
      SDAN_TILE_ADD(0, 4, 6);
      if constexpr (V > 1) SDAN_TILE_ADD(1, 4, 7);
      if constexpr (M > 1) SDAN_TILE_ADD(2, 5, 6);
      if constexpr (M > 1 && V > 1) SDAN_TILE_ADD(3, 5, 7);
    }
  }
  SDAN_TILE_STORE(0, out[0], out_bytes);
  if constexpr (V > 1) SDAN_TILE_STORE(1, out[0] + kLanes, out_bytes);
  if constexpr (M > 1) SDAN_TILE_STORE(2, out[1], out_bytes);
  if constexpr (M > 1 && V > 1) SDAN_TILE_STORE(3, out[1] + kLanes, out_bytes);
}
#undef SDAN_TILE_LOAD
#undef SDAN_TILE_STORE
#undef SDAN_TILE_ADD

SDAN_INLINE int tile_groups(const Pointwise& pw) {
  return (pw.co + pw.tiles->rows[0] - 1) / pw.tiles->rows[0];
}

// Into how many blocks tile_products cuts two vectors' outputs.
SDAN_INLINE int tile_blocks(const Pointwise& pw) {
  return (tile_groups(pw) + 1) / 2;
}

// As pointwise_block (pointwise.h) does it. After each block `lines` cache lines are taken from the
// queue.
static inline void tile_products(const PointwiseInput* inputs, int input_count, ptrdiff_t column,
                                 const Pointwise& pw, float* out, ptrdiff_t out_stride, int vecs,
                                 PrefetchQueue* queue, int lines) {
  configure_tiles(*pw.tiles);
  const int outputs = pw.tiles->rows[0], rows = pw.tiles->rows[6];
  const int groups = tile_groups(pw);
  int steps = 0;
  for (int i = 0; i < input_count; ++i) steps += (inputs[i].count + rows - 1) / rows;
  const ptrdiff_t group = ptrdiff_t{16} * outputs * steps;
  const ptrdiff_t bytes = out_stride * static_cast<ptrdiff_t>(sizeof(float));
  for (int v = 0; v < vecs; v += 2) {
    const ptrdiff_t at = column + v * kLanes;
    for (int g = 0; g < groups; g += 2) {
      // The last group computes some outputs of the one before it again.
      const float* bias[2];
      float* o[2];
      for (int i = 0; i < 2; ++i) {
        const int m = (g + i) * outputs < pw.co - outputs ? (g + i) * outputs : pw.co - outputs;
        bias[i] = pw.bias + 16 * m;
        o[i] = out + m * out_stride + v * kLanes;
      }
      const float* w = pw.weight + g * group;
      if (g + 1 < groups) {
        if (v + 1 < vecs) {
          tile_block<2, 2>(inputs, input_count, at, w, group, bias, *pw.tiles, o, bytes);
        } else {
          tile_block<2, 1>(inputs, input_count, at, w, group, bias, *pw.tiles, o, bytes);
        }
      } else if (v + 1 < vecs) {
        tile_block<1, 2>(inputs, input_count, at, w, group, bias, *pw.tiles, o, bytes);
      } else {
        tile_block<1, 1>(inputs, input_count, at, w, group, bias, *pw.tiles, o, bytes);
      }
      if (queue != nullptr) queue->step(lines);
    }
  }
}

#else
// Nowhere else is a Pointwise with tiles made.
struct TileScope {
  explicit TileScope(const Pointwise&) {}
};
#endif

}  // namespace SDAN_ISA
}  // namespace sdan_fast
