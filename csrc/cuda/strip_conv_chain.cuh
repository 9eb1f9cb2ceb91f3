// One or two 1-D depth-wise convolutions along the same axis, in one pass over memory: a strip by
// itself, or half of two stages of a strip chain.
//
// On a zero-padded grid a horizontal convolution acts on the W axis alone and a vertical one on the
// H axis alone, so they commute, and the chain H1, V1, H2, V2 is a horizontal pass (H1, H2) and a
// vertical one (V1, V2). The biases of H1, and of H2 and V2 where they stand last, are added where
// they belong; that of V1 has H2 behind it, which spreads it to b2 times the sum of those taps of
// H2 that lie within the row: a field over the columns (`edge_bias`, `edge_weight`), exact at the
// borders. Between two convolutions what lies outside the image counts as zero.
//
// A block owns a stripe of lines that run along the strips' axis, whole or a segment of them. It
// stages them in shared memory as float32 with zeros around, [position][line], four lines a `quad`.
// A thread takes a quad and computes 5 or 9 outputs, a dilation apart, of its four lines: one
// 128-bit read of shared memory then serves up to 20 or 36 multiply-adds, and neither borders nor
// types nor layouts are in its way. Two convolutions are this twice, with a second tile
// in between.
//
//   conv_row     the axis is W of contiguous tensors; lines are rows, transposed on their way.
//   conv_column  the axis runs over memory at a distance, lines are columns: H of contiguous
//                tensors; with Last, H or W of channels_last ones, where the taps differ from line
//                to line.
//
// K is the number of taps of every convolution of the pass; K = 0 takes any numbers.
#pragma once

#include "quad_tile.cuh"

namespace sdan_fast::cuda {

struct StripStep {
  int32_t weight_taps, taps;  // all, and those in the middle that can meet the image
  int32_t dilation, halo;     // halo: positions to either side
  int32_t outputs;            // of a thread at a time
  uint32_t inverse;           // of the dilation, for dilated(); 0 where that is 1
};

// Sizes in elements; strip_plan.h chooses the tiles. Blocks are quads x threads along the axis.
struct StripParams {
  int64_t planes;
  DType dtype;
  int32_t steps, channels;
  int32_t length, width;  // of a plane: along the strips' axis; across it
  int32_t flip;           // 1: correlate with the taps reversed (input gradient)
  int32_t wide;           // 1: rows of the tensors begin at multiples of 4 elements
  StripStep step[2];
  int32_t edge_taps, edge_dilation;
  int32_t stripes;            // of a plane
  int32_t segment, segments;  // outputs of a block along the axis; blocks along it
  int32_t positions[2];       // of the two tiles
  // Where things begin in shared memory, in floats: the second convolution's taps, the offsets of
  // conv_column, the tiles.
  int32_t taps1, offsets, tile[2];
  int32_t restage;  // conv_column: the outputs go through shared memory, for whole sectors
};

// Outputs of a thread along the axis, a dilation apart: kFewOutputs or kManyOutputs. Both are 1
// modulo 4, which keeps neighbours off each other's banks where a stripe has 2, 4 or 8 quads, and
// the second is 1 modulo 8, which does whatever it has. With Last taps are read beside the tile, so
// that many outputs have to share them; else what a plan chooses, where the taps are few enough for
// two loops to be worth their code.
constexpr int kFewOutputs = 5, kManyOutputs = 9;
constexpr int kFewTaps = 11;  // stay in registers, too
__host__ __device__ __forceinline__ constexpr bool strip_chooses(int taps, bool last) {
  return !last && taps >= 3 && taps <= kFewTaps;
}
__host__ __device__ __forceinline__ constexpr int strip_threads(bool last) {
  return last ? 128 : 256;  // of a block, at most: what leaves the registers that it takes
}
constexpr int kRowAlign = 16;  // columns: where they begin, a sector of 32 bytes does in all types

// The bytes of a word in the order that the four lower digits of `selector` say.
__device__ __forceinline__ uint32_t byte_permutation(uint32_t word, uint32_t selector) {
#if SDAN_DEVICE_PASS
  return __byte_perm(word, 0, selector);
#else
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= (word >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return r;
#endif
}

// Position 0, 1, ... of the axis cut into groups of `outputs` positions, a dilation apart, that are
// one thread's: the first position of group g. Exact, as g and the dilation are below 2^16.
__host__ __device__ __forceinline__ int dilated(int g, const StripStep& s, int outputs) {
#if SDAN_DEVICE_PASS
  const int whole = static_cast<int>(__umulhi(static_cast<unsigned>(g), s.inverse));
#else
  const int whole = static_cast<int>(static_cast<uint64_t>(g) * s.inverse >> 32);
#endif
  return g + (s.inverse ? whole : g) * ((outputs - 1) * s.dilation);
}

// What a block computes: positions along the axis, in the image.
struct StripBlock {
  int64_t plane;
  int channel;         // of the plane, in contiguous tensors
  int line;            // first of its lines
  int begin, end;      // its outputs
  int middle, beyond;  // outputs of its first convolution, if there are two: with the second's halo
};

__device__ __forceinline__ StripBlock strip_block(const StripParams& p, int lines) {
  StripBlock b;
  const auto per_plane = static_cast<unsigned>(p.segments * p.stripes);
  const unsigned plane = blockIdx.x / per_plane;  // 64-bit remainders are slow
  b.plane = plane, b.channel = static_cast<int>(plane % static_cast<unsigned>(p.channels));
  const int in_plane = static_cast<int>(blockIdx.x % per_plane);
  b.line = in_plane % p.stripes * lines;
  b.begin = in_plane / p.stripes * p.segment;
  b.end = p.length - b.begin < p.segment ? p.length : b.begin + p.segment;
  const int h1 = p.step[1].halo;
  b.middle = b.begin > h1 ? b.begin - h1 : 0;
  b.beyond = p.length - b.end > h1 ? b.end + h1 : p.length;
  return b;
}

template <int K>
struct Taps {
  static constexpr int value = K;
};

// Calls f(Taps<some>, the first of them) for all `taps`: K at once; for K = 0 eight at a time and
// then the rest.
template <int K, typename F>
__device__ __forceinline__ void each_taps(int taps, F&& f) {
  if constexpr (K > 0) {
    f(Taps<K>{}, 0);
  } else {
    int k = 0;
    for (; k + 8 <= taps; k += 8) f(Taps<8>{}, k);
    const int rest = taps - k;
    if (rest == 1) f(Taps<1>{}, k);
    if (rest == 3) f(Taps<3>{}, k);
    if (rest == 5) f(Taps<5>{}, k);
    if (rest == 7) f(Taps<7>{}, k);
  }
}

// The taps that can meet the image, as float32: one for all lines, in whole accesses of 4; with
// Last one for each line, [tap][line], with an odd number of quads from one tap to the next, for
// the banks.
template <int K, bool Last, typename T, typename F>
__device__ __forceinline__ void stage_taps(const T* weight, float* to, const StripStep& s, int flip,
                                           int thread, int threads, int lines, F&& channel) {
  const int taps = K ? K : s.taps, skipped = (s.weight_taps - taps) / 2,
            first = flip ? s.weight_taps - 1 - skipped : skipped, next = flip ? -1 : 1;
  const int quads = static_cast<int>(blockDim.x), across = 4 * quads;
  const int count = Last ? taps * across : round_up(taps, 4);
  for (int m = thread; m < count; m += threads) {
    const int line = Last ? m / taps : 0, k = Last ? m - line * taps : m;
    float tap = 0;
    if ((Last || k < taps) && line < lines)
      tap =
          load_one(weight + static_cast<int64_t>(channel(line)) * s.weight_taps + first + next * k);
    to[Last ? k * 4 * (quads | 1) + line : k] = tap;
  }
}

// Taps k0, ... of a convolution from shared memory: four of them in each, with Last one.
template <int N, bool Last>
__device__ __forceinline__ void get_taps(const float* taps, int k0,
                                         float4 (&w)[Last ? N : (N + 3) / 4]) {
  const int quads = static_cast<int>(blockDim.x), quad = static_cast<int>(threadIdx.x);
  const auto* from = reinterpret_cast<const float4*>(Last ? taps : taps + k0) +
                     (Last ? k0 * (quads | 1) + quad : 0);
  SDAN_UNROLL
  for (int k = 0; k < (Last ? N : (N + 3) / 4); ++k) w[k] = from[Last ? k * (quads | 1) : k];
}

// One convolution's outputs [0, n) from a tile whose first position is the first tap of output 0.
// Calls done(position, outputs) for the R of them that a thread has at a time, a dilation apart;
// those from n on are none.
template <int K, bool Last, int R, typename F>
__device__ __forceinline__ void strip_outputs(const float4* tile, const float* taps, float4 offset,
                                              const StripStep& s, int n, F&& done) {
  const int quad = static_cast<int>(threadIdx.x), quads = static_cast<int>(blockDim.x),
            d = s.dilation, step = d * quads;
  constexpr bool kHeld = K > 0 && K <= kFewTaps;
  float4 held[!kHeld ? 1 : Last ? K : (K + 3) / 4];
  if constexpr (kHeld) get_taps<K, Last>(taps, 0, held);
  for (int g = static_cast<int>(threadIdx.y);; g += static_cast<int>(blockDim.y)) {
    const int at = dilated(g, s, R);
    if (at >= n) break;
    float acc[R][4];
    SDAN_UNROLL
    for (int j = 0; j < R; ++j)
      acc[j][0] = offset.x, acc[j][1] = offset.y, acc[j][2] = offset.z, acc[j][3] = offset.w;
    each_taps<K>(s.taps, [&](auto some, int k0) {
      constexpr int N = decltype(some)::value;
      const float4* from = tile + (at + k0 * d) * quads + quad;
      float4 w[Last ? N : (N + 3) / 4];
      if constexpr (kHeld) {
        SDAN_UNROLL
        for (int k = 0; k < (Last ? N : (N + 3) / 4); ++k) w[k] = held[k];
      } else if constexpr (!Last) {
        get_taps<N, Last>(taps, k0, w);
      }
      SDAN_UNROLL
      for (int q = 0; q < R + N - 1; ++q) {
        if constexpr (Last && !kHeld)
          if (q < N) w[q] = reinterpret_cast<const float4*>(taps)[(k0 + q) * (quads | 1) + quad];
        const float4 v = *from;
        from += step;
        SDAN_UNROLL
        for (int j = 0; j < R; ++j) {
          const int k = q - j;
          if (k < 0 || k >= N) continue;
          float4 t;
          if constexpr (Last) {
            t = w[k];
          } else {
            const float4 four = w[k / 4];
            t.x = k % 4 == 0 ? four.x : k % 4 == 1 ? four.y : k % 4 == 2 ? four.z : four.w;
            t.y = t.x, t.z = t.x, t.w = t.x;
          }
          acc[j][0] = fmaf(t.x, v.x, acc[j][0]);
          acc[j][1] = fmaf(t.y, v.y, acc[j][1]);
          acc[j][2] = fmaf(t.z, v.z, acc[j][2]);
          acc[j][3] = fmaf(t.w, v.w, acc[j][3]);
        }
      }
    });
    done(at, acc);
  }
}

template <int K, bool Last, typename F>
__device__ __forceinline__ void strip_step(const float4* tile, const float* taps, float4 offset,
                                           const StripStep& s, int n, F&& done) {
  if constexpr (Last) {
    strip_outputs<K, Last, kManyOutputs>(tile, taps, offset, s, n, done);
  } else {
    if constexpr (strip_chooses(K, Last))
      if (s.outputs == kManyOutputs)
        return strip_outputs<K, Last, kManyOutputs>(tile, taps, offset, s, n, done);
    strip_outputs<K, Last, kFewOutputs>(tile, taps, offset, s, n, done);
  }
}

// Zeros at those of a tile's positions [0, count) that are not in [first, end).
__device__ __forceinline__ void clear_around(float4* tile, int count, int first, int end) {
  const int quads = static_cast<int>(blockDim.x);
  clear_quads(tile + threadIdx.x, quads, 0, first);
  clear_quads(tile + threadIdx.x, quads, end, count);
}

// A thread's outputs to a tile, the first of them to `to`; `left` positions are in range.
template <int R>
__device__ __forceinline__ void put_outputs(float4* to, int d, int left, const float (&v)[R][4]) {
  const int step = d * static_cast<int>(blockDim.x) * static_cast<int>(sizeof(float4));
  SharedAddress at = shared_address(to);
  if ((R - 1) * d < left) {
    SDAN_UNROLL
    for (int j = 0; j < R; ++j) {
      put_shared4(at, v[j]);
      at += step;
    }
    return;
  }
  SDAN_UNROLL
  for (int j = 0; j < R; ++j) {
    if (j * d < left) put_shared4(at, v[j]);
    at += step;
  }
}

// Where a thread stands in its block, and where the block's taps and tiles lie.
struct StripThread {
  int quads, quad, thread, threads;
  float *taps0, *taps1, *offsets;
  float4 *a, *b;  // the tiles
  __device__ __forceinline__ StripThread(const StripParams& p, void* raw)
      : quads(static_cast<int>(blockDim.x)),
        quad(static_cast<int>(threadIdx.x)),
        thread(static_cast<int>(threadIdx.y) * quads + quad),
        threads(static_cast<int>(blockDim.y) * quads),
        taps0(static_cast<float*>(raw)),
        taps1(taps0 + p.taps1),
        offsets(taps0 + p.offsets),
        a(reinterpret_cast<float4*>(taps0 + p.tile[0])),
        b(reinterpret_cast<float4*>(taps0 + p.tile[1])) {}
};

// ---- columns

// The bias field of V1 at a column: its bias times the sum of H2's taps that meet the row.
template <typename T>
__device__ __forceinline__ float edge_offset(const StripParams& p, const T* bias, const T* weight,
                                             int64_t c, int column, int columns) {
  float sum = 0;
  int at = column - (p.edge_taps - 1) / 2 * p.edge_dilation;
  const T* tap = weight + c * p.edge_taps;
  SDAN_UNROLL_BY(4)
  for (int k = 0; k < p.edge_taps; ++k) {
    if (static_cast<unsigned>(at) < static_cast<unsigned>(columns)) sum += load_one(tap);
    at += p.edge_dilation, ++tap;
  }
  return load_one(bias + c) * sum;
}

// A thread's outputs to y (times the gate, if there is one), d positions and `next` bytes apart;
// `left` positions are in range.
template <bool Wide, int R, typename T>
__device__ __forceinline__ void store_columns(T* y, const T* gate, int64_t next, int d, int left,
                                              int there, float (&v)[R][4]) {
  if (gate) {
    SDAN_UNROLL
    for (int j = 0; j < R; ++j) {
      float g[4];
      load_quad<Wide>(gate, j * d < left ? there : 0, g);
      SDAN_UNROLL
      for (int e = 0; e < 4; ++e) v[j][e] *= g[e];
      gate = bytes_on(gate, next);
    }
  }
  store_quads<Wide>(y, next, left, there, v, d);
}

// grid: (plane, segment, stripe). Dynamic shared memory: each convolution's taps, then for each a
// quad of offsets for each of the stripe's, then the tiles.
template <int K, bool Last>
__global__ void __launch_bounds__(strip_threads(Last), Last ? 3 : 2)
    conv_column_kernel(const void* __restrict__ x, const void* __restrict__ weight0,
                       const void* __restrict__ bias0, const void* __restrict__ weight1,
                       const void* __restrict__ bias1, const void* __restrict__ edge_bias,
                       const void* __restrict__ edge_weight, const void* __restrict__ gate,
                       void* __restrict__ y, const StripParams p) {
  SDAN_DYNAMIC_SHARED(raw);
  const StripThread me(p, raw);
  const StripStep s0 = p.step[0], s1 = p.step[1];
  const StripBlock block = strip_block(p, 4 * me.quads);
  const int64_t base = block.plane * p.length * p.width + block.line;
  const int columns = p.width - block.line < 4 * me.quads ? p.width - block.line : 4 * me.quads,
            there = columns - 4 * me.quad;
  const int n = block.end - block.begin;
  const auto channel = [&](int column) {
    return Last ? (block.line + column) % p.channels : block.channel;
  };
  const int low = block.middle > s0.halo ? block.middle - s0.halo : 0,
            high = p.length - block.beyond > s0.halo ? block.beyond + s0.halo : p.length,
            first = low - (block.middle - s0.halo), before = block.middle - block.begin + s1.halo;
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const T* from =
        static_cast<const T*>(x) + base + static_cast<int64_t>(low) * p.width + 4 * me.quad;
    if (p.wide)
      stage_quads<true>(from, p.width, me.a + first * me.quads + me.quad, me.quads, high - low,
                        there);
    else
      stage_quads<false>(from, p.width, me.a + first * me.quads + me.quad, me.quads, high - low,
                         there);
    const auto stage = [&](const void* weight, float* taps, const void* bias, float* offsets,
                           const StripStep& step, bool edge) {
      stage_taps<K, Last>(static_cast<const T*>(weight), taps, step, p.flip, me.thread, me.threads,
                          columns, channel);
      for (int column = me.thread; column < 4 * me.quads; column += me.threads) {
        float offset = 0;
        if (column < columns) {
          const int c = channel(column), at = block.line + column;
          if (bias) offset = load_one(static_cast<const T*>(bias) + c);
          if (edge)
            offset +=
                edge_offset(p, static_cast<const T*>(edge_bias), static_cast<const T*>(edge_weight),
                            c, Last ? at / p.channels : at, Last ? p.width / p.channels : p.width);
        }
        offsets[column] = offset;
      }
    };
    stage(weight0, me.taps0, bias0, me.offsets, s0, edge_bias != nullptr);
    if (p.steps == 2) stage(weight1, me.taps1, bias1, me.offsets + 4 * me.quads, s1, false);
  });
  clear_around(me.a, p.positions[0], first, first + high - low);
  if (p.steps == 2)
    clear_around(me.b, p.positions[1], before, before + block.beyond - block.middle);
  __syncthreads();
  float4* out = p.steps == 2 ? me.a : me.b;
  const int64_t corner = base + static_cast<int64_t>(block.begin) * p.width + 4 * me.quad;
  StripStep s = s0;  // in turn, not by index: parameters would need addresses for that
  SDAN_UNROLL_BY(1)
  for (int i = 0; i < p.steps; ++i) {
    const bool last_one = i == p.steps - 1;
    const int outputs = last_one ? n : block.beyond - block.middle;
    strip_step<K, Last>(
        i ? me.b : me.a, i ? me.taps1 : me.taps0,
        reinterpret_cast<const float4*>(me.offsets)[i * me.quads + me.quad], s, outputs,
        [&](int at, auto& v) {
          const int left = outputs - at;
          if (!last_one || (Last && p.restage))
            return put_outputs(
                (last_one ? out + at * me.quads : me.b + (before + at) * me.quads) + me.quad,
                s.dilation, left, v);
          with_element(p.dtype, [&](auto element) {
            using T = decltype(element);
            const int64_t i = corner + static_cast<int64_t>(at) * p.width,
                          next = int64_t{s.dilation} * p.width * static_cast<int>(sizeof(T));
            T* to = static_cast<T*>(y) + i;
            const T* u = gate ? static_cast<const T*>(gate) + i : nullptr;
            if (p.wide)
              store_columns<true>(to, u, next, s.dilation, left, there, v);
            else
              store_columns<false>(to, u, next, s.dilation, left, there, v);
          });
        });
    __syncthreads();
    s = s1;
  }
  if constexpr (Last) {
    if (!p.restage) return;
    with_element(p.dtype, [&](auto element) {
      using T = decltype(element);
      SDAN_UNROLL_BY(1)
      for (int at = static_cast<int>(threadIdx.y); at < n; at += static_cast<int>(blockDim.y)) {
        const float4 q = out[at * me.quads + me.quad];
        float v[1][4] = {{q.x, q.y, q.z, q.w}};
        const int64_t i = corner + static_cast<int64_t>(at) * p.width;
        T* to = static_cast<T*>(y) + i;
        const T* u = gate ? static_cast<const T*>(gate) + i : nullptr;
        if (p.wide)
          store_columns<true>(to, u, 0, 0, 1, there, v);
        else
          store_columns<false>(to, u, 0, 0, 1, there, v);
      }
    });
  }
}

// ---- rows

// A thread stages four columns of a quad of rows, one by one, and so do its neighbours, which are
// four columns apart: they would meet at the same banks if all began with the first. `Turn` says in
// which order a thread takes them: element i ^ turn is the i-th. It stays the same, as a thread's
// groups of columns are 32 / quads or a multiple of it apart.
struct Turn {
  int turn;         // below 4; of 8 quads, which are all the banks, 0
  bool pairs;       // it may have the bit that swaps pairs: of 2 quads only
  uint32_t halves;  // that swaps a word's halves or does not: a selector of byte_permutation
  __device__ __forceinline__ Turn()
      : turn(static_cast<int>(threadIdx.y & (8 / blockDim.x - 1))),
        pairs(blockDim.x < 4),
        halves(turn & 1 ? 0x1032 : 0x3210) {}

  __device__ __forceinline__ void operator()(float (&v)[4]) const {
    float u[4];
    SDAN_UNROLL
    for (int i = 0; i < 4; ++i) u[i] = turn & 1 ? v[i ^ 1] : v[i];
    SDAN_UNROLL
    for (int i = 0; i < 4; ++i) v[i] = pairs && turn & 2 ? u[i ^ 2] : u[i];
  }
  __device__ __forceinline__ void operator()(Words<8>& r) const {
    const uint32_t a = byte_permutation(r.w[0], halves), b = byte_permutation(r.w[1], halves);
    r.w[0] = a, r.w[1] = b;
    if (pairs) r.w[0] = turn & 2 ? b : a, r.w[1] = turn & 2 ? a : b;
  }

  // As load_quad and store_quad, with elements in this thread's order.
  template <bool Wide, typename T>
  __device__ __forceinline__ void load(const T* p, int there, float (&v)[4]) const {
    if constexpr (Wide && is_16bit<T>) {
      Words<8> r = {};
      if (there > 0) r = load_words<8>(p);
      (*this)(r);
      unpack2<T>(r.w[0], v[0], v[1]);
      unpack2<T>(r.w[1], v[2], v[3]);
    } else {
      load_quad<Wide>(p, there, v);
      (*this)(v);
    }
  }
  template <bool Wide, typename T>
  __device__ __forceinline__ void store(T* p, int there, float (&v)[4]) const {
    if constexpr (Wide && is_16bit<T>) {
      Words<8> r{{pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3])}};
      (*this)(r);
      if (there > 0) store_words<8>(p, r);
    } else {
      (*this)(v);
      store_quad<Wide>(p, there, v);
    }
  }
};

// Columns from `left`, a multiple of kRowAlign, to the whole tile; zeros outside [0, high).
// `first`: the thread's first row of the plane; in place of those beyond the `height` that it has,
// which nobody stores, the last one once more.
template <bool Wide, typename T>
__device__ __forceinline__ void stage_rows(const T* plane, int length, int first, int height,
                                           float4* tile, int left, int groups, int high) {
  const int quads = static_cast<int>(blockDim.x), abreast = static_cast<int>(blockDim.y);
  const Turn turn;
  int g = static_cast<int>(threadIdx.y), column = left + 4 * g;
  const T* from[4];
  SDAN_UNROLL
  for (int r = 0; r < 4; ++r) {
    const int row = first + r < height ? first + r : height - 1;
    from[r] = plane + static_cast<int64_t>(row) * length + column;
  }
  float4* to = tile + 4 * g * quads;
  SDAN_UNROLL_BY(2)
  for (; g < groups; g += abreast) {
    const int inside = column >= 0 ? high - column : 0;
    float v[4][4];
    SDAN_UNROLL
    for (int r = 0; r < 4; ++r) {
      turn.load<Wide>(from[r], inside, v[r]);
      from[r] += 4 * abreast;
    }
    SDAN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float rows[4] = {v[0][i], v[1][i], v[2][i], v[3][i]};
      put_shared<4>(reinterpret_cast<float*>(to + (i ^ turn.turn) * quads), rows);
    }
    column += 4 * abreast, to += 4 * abreast * quads;
  }
}

// Columns [0, n) of the thread's four rows, `there` of which the image has, from a tile. `row`: the
// first of them, from the first column.
template <bool Wide, typename T>
__device__ __forceinline__ void store_rows(const float4* tile, int n, T* row, int length,
                                           int there) {
  const int quads = static_cast<int>(blockDim.x), abreast = static_cast<int>(blockDim.y);
  const int64_t next = int64_t{length} * static_cast<int>(sizeof(T));
  const Turn turn;
  const float4* from = tile + 4 * static_cast<int>(threadIdx.y) * quads;
  row += 4 * threadIdx.y;
  SDAN_UNROLL_BY(1)
  for (int left = n - 4 * static_cast<int>(threadIdx.y); left > 0; left -= 4 * abreast) {
    float v[4][4];
    SDAN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int column = i ^ turn.turn;
      float4 rows = {};
      if (Wide || column < left) rows = from[column * quads];
      v[0][i] = rows.x, v[1][i] = rows.y, v[2][i] = rows.z, v[3][i] = rows.w;
    }
    T* to = row;
    SDAN_UNROLL
    for (int r = 0; r < 4; ++r) {
      turn.store<Wide>(to, r < there ? left : 0, v[r]);
      to = bytes_on(to, next);
    }
    from += 4 * abreast * quads, row += 4 * abreast;
  }
}

// Here `length` is the image's width, `width` its height. grid: (plane, segment, stripe). Dynamic
// shared memory: each convolution's taps, two tiles.
template <int K>
__global__ void __launch_bounds__(strip_threads(false), 2)
    conv_row_kernel(const void* __restrict__ x, const void* __restrict__ weight0,
                    const void* __restrict__ bias0, const void* __restrict__ weight1,
                    const void* __restrict__ bias1, void* __restrict__ y, const StripParams p) {
  SDAN_DYNAMIC_SHARED(raw);
  const StripThread me(p, raw);
  const StripStep s0 = p.step[0], s1 = p.step[1];
  const StripBlock block = strip_block(p, 4 * me.quads);
  const int c = block.channel;
  const int row = block.line + 4 * me.quad, there = p.width - row;
  const int64_t plane = block.plane * p.length * p.width;
  const int n = block.end - block.begin, before = block.middle - block.begin + s1.halo;
  const int left = round_down(block.middle - s0.halo, kRowAlign),
            shift = block.middle - s0.halo - left;
  const int high = p.length - block.beyond > s0.halo ? block.beyond + s0.halo : p.length;
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(x) + plane;
    const int groups = p.positions[0] / 4;
    if (p.wide)
      stage_rows<true>(from, p.length, row, p.width, me.a + me.quad, left, groups, high);
    else
      stage_rows<false>(from, p.length, row, p.width, me.a + me.quad, left, groups, high);
    const auto stage = [&](const void* weight, float* taps, const StripStep& step) {
      stage_taps<K, false>(static_cast<const T*>(weight), taps, step, p.flip, me.thread, me.threads,
                           1, [&](int) { return c; });
    };
    stage(weight0, me.taps0, s0);
    if (p.steps == 2) stage(weight1, me.taps1, s1);
  });
  if (p.steps == 2)
    clear_around(me.b, p.positions[1], before, before + block.beyond - block.middle);
  __syncthreads();
  const auto offset = [&](const void* bias) {
    float4 q;
    q.x = bias ? load_any(p.dtype, bias, c) : 0.0f;
    q.y = q.x, q.z = q.x, q.w = q.x;
    return q;
  };
  const float4* in = me.a + shift * me.quads;
  float4* out = me.b;
  StripStep s = s0;  // in turn, not by index: parameters would need addresses for that
  SDAN_UNROLL_BY(1)
  for (int i = 0; i < p.steps; ++i) {
    const bool last_one = i == p.steps - 1;
    const int outputs = last_one ? n : block.beyond - block.middle, first = last_one ? 0 : before;
    strip_step<K, false>(in, i ? me.taps1 : me.taps0, offset(i ? bias1 : bias0), s, outputs,
                         [&](int at, const auto& v) {
                           put_outputs(out + (first + at) * me.quads + me.quad, s.dilation,
                                       outputs - at, v);
                         });
    __syncthreads();
    s = s1, in = me.b, out = i == p.steps - 2 ? me.a : out;
  }
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    T* to = static_cast<T*>(y) + plane + static_cast<int64_t>(row) * p.length + block.begin;
    if (p.wide)
      store_rows<true>(out + me.quad, n, to, p.length, there);
    else
      store_rows<false>(out + me.quad, n, to, p.length, there);
  });
}

}  // namespace sdan_fast::cuda
