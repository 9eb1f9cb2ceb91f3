// 1x1 convolutions of pairs of bfloat16 (pairs.h) by a processor's matrix tiles (AMX): eight
// registers of up to 16 rows of 64 bytes, of which one instruction multiplies two and adds the
// product to a third. Rows of the first factor and columns of the second are of 32 bits, two
// inputs; rows and columns of the sums are float32.
//
// A block of pixels as pointwise.h reads it, rows of pairs along the pixels, is such a second
// factor: outputs x inputs weights times inputs x pixels. Pixels whose channels are neighbours are
// rows of a first one: pixels x inputs times inputs x outputs. Either is loaded from where it lies.
// Four sums are under way at a time, since each product waits long for the one before it.
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
// Tiles 0 to 3 are sums, 4 and 5 first factors, 6 and 7 second ones.
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

// Up to two tiles' first rows, `bytes` from one row to the next.
struct TilePair {
  const void* at[2];
  ptrdiff_t bytes;
};

// Assembly, as in pairs.h: no unit needs a flag for what few processors have. GCC knows none of
// these registers, so that nothing but the order of the statements matters.
#define SDAN_TILE_LOAD(TILE, P, BYTES) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #TILE : : "r"(P), "r"(BYTES) : "memory")
#define SDAN_TILE_STORE(TILE, P, BYTES) \
  asm volatile("tilestored %%tmm" #TILE ", (%0,%1,1)" : : "r"(P), "r"(BYTES) : "memory")
#define SDAN_TILE_ADD(SUM, A, B) \
  asm volatile("tdpbf16ps %%tmm" #B ", %%tmm" #A ", %%tmm" #SUM : : : "memory")

// A by B sums: all those of one first factor begin alike, or all those of one second factor.
template <int A, int B>
SDAN_INLINE void begin_sums(const TilePair& bias, bool by_second) {
  SDAN_TILE_LOAD(0, bias.at[0], bias.bytes);
  if constexpr (B > 1) SDAN_TILE_LOAD(1, bias.at[by_second], bias.bytes);
  if constexpr (A > 1) SDAN_TILE_LOAD(2, bias.at[!by_second], bias.bytes);
  if constexpr (A > 1 && B > 1) SDAN_TILE_LOAD(3, bias.at[1], bias.bytes);
}

template <int A, int B>
SDAN_INLINE void add_products(const TilePair& a, const TilePair& b) {
  SDAN_TILE_LOAD(6, b.at[0], b.bytes);
  SDAN_TILE_LOAD(4, a.at[0], a.bytes);
  if constexpr (B > 1) SDAN_TILE_LOAD(7, b.at[1], b.bytes);
  if constexpr (A > 1) SDAN_TILE_LOAD(5, a.at[1], a.bytes);
  SDAN_TILE_ADD(0, 4, 6);
  if constexpr (B > 1) SDAN_TILE_ADD(1, 4, 7);
  if constexpr (A > 1) SDAN_TILE_ADD(2, 5, 6);
  if constexpr (A > 1 && B > 1) SDAN_TILE_ADD(3, 5, 7);
}

// out: [first factor][second factor].
template <int A, int B>
SDAN_INLINE void store_sums(float* const (&out)[2][2], ptrdiff_t bytes) {
  SDAN_TILE_STORE(0, out[0][0], bytes);
  if constexpr (B > 1) SDAN_TILE_STORE(1, out[0][1], bytes);
  if constexpr (A > 1) SDAN_TILE_STORE(2, out[1][0], bytes);
  if constexpr (A > 1 && B > 1) SDAN_TILE_STORE(3, out[1][1], bytes);
}
#undef SDAN_TILE_LOAD
#undef SDAN_TILE_STORE
#undef SDAN_TILE_ADD

// f.template operator()<A, B>() for one or two factors on each side.
template <typename F>
SDAN_INLINE void by_factors(bool two_a, bool two_b, const F& f) {
  if (two_a) {
    two_b ? f.template operator()<2, 2>() : f.template operator()<2, 1>();
  } else {
    two_b ? f.template operator()<1, 2>() : f.template operator()<1, 1>();
  }
}

// Groups of outputs; the last one may compute some of the one before it again.
struct TileOutputs {
  int all, each;

  SDAN_INLINE int groups() const { return (all + each - 1) / each; }
  SDAN_INLINE int begin(int group) const {
    return group * each < all - each ? group * each : all - each;
  }
};

constexpr ptrdiff_t kTileRow = 64;

SDAN_INLINE TileOutputs tile_outputs(const Pointwise& pw) {
  return {pw.co, pw.tiles->rows[0]};
}

// Into how many blocks tile_products cuts two vectors' outputs.
SDAN_INLINE int tile_blocks(const Pointwise& pw) {
  return (tile_outputs(pw).groups() + 1) / 2;
}

// What all blocks of a product have in common.
struct TileProduct {
  const PointwiseInput* inputs;
  int input_count;
  const Pointwise& pw;
  TileOutputs outputs;
  int groups, rows;  // of outputs, of input in a step
  ptrdiff_t group;   // floats from one group's weights to the next
};

SDAN_INLINE TileProduct tile_product(const PointwiseInput* inputs, int input_count,
                                     const Pointwise& pw) {
  const TileOutputs outputs = tile_outputs(pw);
  const int rows = pw.tiles->rows[6];
  int steps = 0;
  for (int i = 0; i < input_count; ++i) steps += (inputs[i].count + rows - 1) / rows;
  return {inputs,
          input_count,
          pw,
          outputs,
          outputs.groups(),
          rows,
          ptrdiff_t{16} * outputs.each * steps};
}

// For groups g and g + 1 of outputs and two vectors of pixels from `column` on, or as many of
// either as there are. out[i]: the first sums of group g + i.
static inline void tile_block(const TileProduct& product, ptrdiff_t column, int g, bool two_vectors,
                              float* const (&out)[2], ptrdiff_t out_stride) {
  constexpr ptrdiff_t kFloat = sizeof(float);
  const Pointwise& pw = product.pw;
  const PointwiseInput* inputs = product.inputs;
  const int rows = product.rows, each = product.outputs.each;
  const ptrdiff_t group = product.group;
  const int m[2] = {product.outputs.begin(g), product.outputs.begin(g + 1)};
  by_factors(g + 1 < product.groups, two_vectors, [&]<int A, int B>() {
    begin_sums<A, B>({{pw.bias + 16 * m[0], pw.bias + 16 * m[1]}, kTileRow}, false);
    const float* weight = pw.weight + g * group;
    for (int i = 0; i < product.input_count; ++i) {
      const ptrdiff_t stride = inputs[i].stride;
      const int last = inputs[i].count - rows;
      for (int begin = 0; begin < inputs[i].count; begin += rows) {
        // The last rows are read with some of those before them, whose weights are zero there.
        const float* x = inputs[i].x + column + (begin < last ? begin : last) * stride;
        add_products<A, B>({{weight, weight + group}, kTileRow},
                           {{x, x + kLanes}, stride * kFloat});
        weight += 16 * each;
      }
    }
    float* const o[2][2] = {{out[0], out[0] + kLanes}, {out[1], out[1] + kLanes}};
    store_sums<A, B>(o, out_stride * kFloat);
  });
}

// As pointwise_block (pointwise.h) does it. After each block `lines` cache lines are taken from the
// queue.
static inline void tile_products(const PointwiseInput* inputs, int input_count, ptrdiff_t column,
                                 const Pointwise& pw, float* out, ptrdiff_t out_stride, int vecs,
                                 PrefetchQueue* queue, int lines) {
  configure_tiles(*pw.tiles);
  const TileProduct product = tile_product(inputs, input_count, pw);
  const TileOutputs& outputs = product.outputs;
  for (int v = 0; v < vecs; v += 2) {
    for (int g = 0; g < product.groups; g += 2) {
      float* o = out + v * kLanes;
      tile_block(product, column + v * kLanes, g, v + 1 < vecs,
                 {o + outputs.begin(g) * out_stride, o + outputs.begin(g + 1) * out_stride},
                 out_stride);
      if (queue != nullptr) queue->step(lines);
    }
  }
}

SDAN_INLINE TileOutputs pixel_tile_outputs(const Pointwise& pw) {
  return {pw.co, pw.tiles->row_bytes[0] / 4};
}

// sums[pixel][group of outputs][16] for n pixels x, whose ci channels, an even number, are
// neighbours. n is at least the rows of a tile, which the last pixels fill with some of those
// before them. Nothing is prefetched: rows of pixels follow one another.
static inline void pixel_tile_products(const Pointwise& pw, const bfloat16* x, int64_t n,
                                       float* sums) {
  configure_tiles(*pw.tiles);
  const TileOutputs outputs = pixel_tile_outputs(pw);
  const int pixels = pw.tiles->rows[0], rows = pw.tiles->rows[6], groups = outputs.groups();
  const int steps = (pw.ci / 2 + rows - 1) / rows, last_row = pw.ci / 2 - rows;
  const ptrdiff_t x_bytes = pw.ci * static_cast<ptrdiff_t>(sizeof(bfloat16));
  const ptrdiff_t group = ptrdiff_t{16} * rows * steps;
  for (int64_t i = 0; i < n; i += 2 * pixels) {
    const int64_t at[2] = {i < n - pixels ? i : n - pixels,
                           i + pixels < n - pixels ? i + pixels : n - pixels};
    for (int g = 0; g < groups; g += 2) {
      const int m[2] = {outputs.begin(g), outputs.begin(g + 1)};
      by_factors(i + pixels < n, g + 1 < groups, [&]<int A, int B>() {
        begin_sums<A, B>({{pw.bias + m[0], pw.bias + m[1]}, 0}, true);
        const float* weight = pw.weight + g * group;
        for (int k = 0; k < steps; ++k, weight += 16 * rows) {
          const int row = k * rows < last_row ? k * rows : last_row;
          add_products<A, B>({{x + at[0] * pw.ci + 2 * row, x + at[1] * pw.ci + 2 * row}, x_bytes},
                             {{weight, weight + group}, kTileRow});
        }
        float* o[2][2];
        for (int p = 0; p < 2; ++p) {
          for (int q = 0; q < 2; ++q) o[p][q] = sums + (at[p] * groups + g + q) * 16;
        }
        store_sums<A, B>(o, groups * kTileRow);
      });
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
