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
//   conv_row     the axis is W of contiguous tensors. A block stages 8 rows with their halo in
//                shared memory, as pairs of rows interleaved, so that one shared-memory access
//                serves two rows; a thread computes 9 outputs of a pair, a dilation apart.
//   conv_column  the axis runs over memory at a distance: H of contiguous tensors; with Last, H or
//                W of channels_last ones, where the taps differ from element to element. A block
//                walks along the axis with a stripe of columns; rows arrive in a ring, by cp.async
//                one step ahead, the first convolution leaves its results in a second ring, and a
//                thread computes 8 outputs, a dilation apart, of 4 columns.
//
// K is the number of taps of every convolution of the pass; K = 0 takes any numbers.
#pragma once

#include "conv_tile.cuh"

namespace sdan_fast::cuda {

struct StripStep {
  int32_t weight_taps, taps;  // all, and those in the middle that can meet the image
  int32_t dilation;
};

// Sizes in elements; strip_plan.h chooses the tiles.
struct StripParams {
  int64_t planes;
  DType dtype;
  int32_t steps, channels;
  int32_t length, width;  // of a plane: along the strips' axis; across it
  int32_t flip;           // 1: correlate with the taps reversed (input gradient)
  int32_t wide;           // elements of a wide access: 0, 4 or 8
  StripStep step[2];
  int32_t edge_taps, edge_dilation;
  // conv_row: outputs of a tile in a row, tiles, outputs of the first of two convolutions, pairs of
  // floats from one pair of rows to the next.
  // conv_column: columns of a stripe, stripes, rows of a step.
  int32_t tile, tiles, rows, pitch;
  int32_t segment, segments;  // conv_column: rows of a block, blocks along the axis
  int32_t ring[2];            // conv_column: rows of the rings
  int32_t ahead;              // conv_column: the next rows are fetched during this step
  int32_t reuse;              // conv_column: one step, whose outputs take the place of its input
  int32_t before[2];  // conv_column: steps before the first output: with rows, with first results
};

constexpr int kRowOutputs = 9;  // per thread and row of conv_row; 1 modulo 4, for the banks
constexpr int kRowPairs = 4;    // pairs of rows of a conv_row tile
constexpr int kRowAlign = 16;   // columns: where they begin, a sector of 32 bytes does in all types
constexpr int kStripOutputs = 8;  // rows per thread of conv_column
constexpr int kStripThreads = 256;
// conv_column in channels_last keeps the taps of four columns: more registers, fewer threads.
constexpr int column_threads(bool last) {
  return last ? 192 : kStripThreads;
}

__device__ __forceinline__ int strip_halo(const StripStep& s) {
  return (s.taps - 1) / 2 * s.dilation;
}

// The n-th of the taps that can meet the image.
__device__ __forceinline__ float strip_tap(const StripParams& p, const StripStep& s,
                                           const void* weight, int64_t c, int n) {
  const int k = (s.weight_taps - s.taps) / 2 + n;
  return load_any(p.dtype, weight, c * s.weight_taps + (p.flip ? s.weight_taps - 1 - k : k));
}

template <int K>
struct Taps {
  static constexpr int value = K;
};

// Calls f(Taps<some>, the first of them) for all `taps`: K at once; many in two parts, or the
// compiler runs out of registers; for K = 0, Some (4 or 8) at a time and then the rest.
template <int K, int Some, typename F>
__device__ __forceinline__ void each_taps(int taps, F&& f) {
  if constexpr (K > 23) {
    int k = 0;
    SDAN_UNROLL_BY(1)
    for (; k + 20 <= taps; k += 20) f(Taps<20>{}, k);  // once; a loop keeps the parts apart
    f(Taps<K - 20>{}, k);
  } else if constexpr (K > 0) {
    f(Taps<K>{}, 0);
  } else {
    int k = 0;
    for (; k + Some <= taps; k += Some) f(Taps<Some>{}, k);
    const int rest = taps - k;
    if (rest == 1) f(Taps<1>{}, k);
    if (rest == 3) f(Taps<3>{}, k);
    if constexpr (Some == 8) {
      if (rest == 5) f(Taps<5>{}, k);
      if (rest == 7) f(Taps<7>{}, k);
    }
  }
}

// taps[0 .. K) from shared memory, 4 at a time: there are zeros behind the last.
template <int K>
__device__ __forceinline__ void get_taps(const float* taps, float (&w)[K + 3]) {
  SDAN_UNROLL
  for (int k = 0; k < K; k += 4) {
    const float4 v = *reinterpret_cast<const float4*>(taps + k);
    w[k] = v.x, w[k + 1] = v.y, w[k + 2] = v.z, w[k + 3] = v.w;
  }
}

// ---- rows

// out[column] = convolution of `in` at the columns [first, end) of [0, region), for a pair of rows.
// `region` is a multiple of kRowOutputs * dilation.
template <int K>
__device__ __forceinline__ void row_step(const float2* in, float2* out, const float* taps,
                                         int count, int d, float bias, int pitch, int region,
                                         int first, int end) {
  constexpr int P = kRowOutputs;
  const int pair = static_cast<int>(threadIdx.x) % kRowPairs,
            g = static_cast<int>(threadIdx.x) / kRowPairs,
            groups = static_cast<int>(blockDim.x) / kRowPairs;
  const int phase_step = groups % d, column_step = groups / d * (P * d) + phase_step;
  int phase = g % d, column = g / d * (P * d) + phase;
  in += pair * pitch, out += pair * pitch;
  for (; column < region; column += column_step) {
    if (column < end && column + (P - 1) * d >= first) {
      float2 acc[P];
      SDAN_UNROLL
      for (int j = 0; j < P; ++j) acc[j].x = bias, acc[j].y = bias;
      each_taps<K, 8>(count, [&](auto some, int k0) {
        constexpr int N = decltype(some)::value;
        float w[N + 3];
        get_taps<N>(taps + k0, w);
        const float2* from = in + column + k0 * d;
        SDAN_UNROLL
        for (int q = 0; q < P + N - 1; ++q) {
          const float2 v = *from;
          from += d;
          SDAN_UNROLL
          for (int j = 0; j < P; ++j) {
            if (q - j < 0 || q - j >= N) continue;
            acc[j].x = fmaf(w[q - j], v.x, acc[j].x);
            acc[j].y = fmaf(w[q - j], v.y, acc[j].y);
          }
        }
      });
      float2* to = out + column;
      SDAN_UNROLL
      for (int j = 0; j < P; ++j) {
        if (static_cast<unsigned>(column + j * d - first) < static_cast<unsigned>(end - first))
          *to = acc[j];
        to += d;
      }
    }
    phase += phase_step;
    if (phase >= d) phase -= d, column += (P - 1) * d;
  }
}

// Reads rows [y, y + 2 kRowPairs) and columns [x, x + columns) of a plane, with zeros outside the
// image. x and `columns` are multiples of kRowAlign.
__device__ __forceinline__ void stage_pairs(const void* tensor, int64_t base, float2* tile,
                                            const StripParams& p, int y, int x, int columns) {
  if (!p.wide) {
    for (Walk at(columns); at.row < kRowPairs; at.advance()) {
      const int r = y + 2 * at.row, c = x + at.column;
      const int64_t i = base + static_cast<int64_t>(r) * p.length + c;
      const bool inside = c >= 0 && c < p.length;
      float2 v;
      v.x = inside && r < p.width ? load_any(p.dtype, tensor, i) : 0.0f;
      v.y = inside && r + 1 < p.width ? load_any(p.dtype, tensor, i + p.length) : 0.0f;
      tile[at.row * p.pitch + at.column] = v;
    }
    return;
  }
  const auto pieces = [&](auto&& load_piece) {
    SDAN_UNROLL_BY(2)
    for (Walk at(columns / 4); at.row < kRowPairs; at.advance()) {
      const int r = y + 2 * at.row, c = x + 4 * at.column;
      float a[4] = {0, 0, 0, 0}, b[4] = {0, 0, 0, 0};
      const int64_t i = base + static_cast<int64_t>(r) * p.length + c;
      const bool inside = c >= 0 && c < p.length;
      if (inside && r < p.width) load_piece(i, a);
      if (inside && r + 1 < p.width) load_piece(i + p.length, b);
      const float v[8] = {a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]};
      put_shared<8>(reinterpret_cast<float*>(tile + at.row * p.pitch + 4 * at.column), v);
    }
  };
  if (p.dtype == DType::kFloat32)
    pieces([&](int64_t i, float (&v)[4]) { load<4>(static_cast<const float*>(tensor) + i, v); });
  else
    pieces([&](int64_t i, float (&v)[4]) { load4_any(p.dtype, tensor, i, v); });
}

// Here `length` is the image's width, `width` its height. grid: tiles of 2 kRowPairs rows and
// `tile` columns. Dynamic shared memory: the taps of each step (rounded up to 4),
// two tiles of kRowPairs * pitch pairs.
template <int K>
__global__ void __launch_bounds__(kStripThreads, 3)
    conv_row_kernel(const void* __restrict__ x, const void* __restrict__ weight0,
                    const void* __restrict__ bias0, const void* __restrict__ weight1,
                    const void* __restrict__ bias1, void* __restrict__ y, const StripParams p) {
  SDAN_DYNAMIC_SHARED(raw);
  const bool two = p.steps == 2;
  const StripStep &s0 = p.step[0], &s1 = p.step[1];
  auto* taps = reinterpret_cast<float*>(raw);
  float* taps1 = taps + round_up(s0.taps, 4);
  auto* a = reinterpret_cast<float2*>(taps1 + (two ? round_up(s1.taps, 4) : 0));
  float2* b = a + kRowPairs * p.pitch;
  const int h1 = two ? strip_halo(s1) : 0, halo = strip_halo(s0) + h1;
  const int tiles_y = (p.width + 2 * kRowPairs - 1) / (2 * kRowPairs);
  const auto per_plane = static_cast<unsigned>(tiles_y * p.tiles);
  const int64_t plane = blockIdx.x / per_plane, c = plane % p.channels;
  const int in_plane = static_cast<int>(blockIdx.x % per_plane);
  const int ty = in_plane / p.tiles * (2 * kRowPairs), tx = in_plane % p.tiles * p.tile;
  const int64_t base = plane * p.length * p.width;
  const int left = round_down(tx - halo, kRowAlign), shift = tx - halo - left;
  SDAN_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (i >= p.steps) break;
    const StripStep& s = p.step[i];
    for (int k = static_cast<int>(threadIdx.x); k < round_up(s.taps, 4);
         k += static_cast<int>(blockDim.x))
      (i ? taps1 : taps)[k] = k < s.taps ? strip_tap(p, s, i ? weight1 : weight0, c, k) : 0.0f;
  }
  const int region = two ? p.rows : p.tile;
  stage_pairs(x, base, a, p, ty, left, round_up(region + 2 * strip_halo(s0) + shift, kRowAlign));
  // Of the first of two steps, what lies outside the image is zero.
  int first = 0, end = region;
  if (two) {
    if (h1 > tx) first = h1 - tx;
    if (p.length - tx + h1 < end) end = p.length - tx + h1;
    const int outside = first + (p.tile + 2 * h1 > end ? p.tile + 2 * h1 - end : 0);
    for (int i = static_cast<int>(threadIdx.x); i < outside * kRowPairs;
         i += static_cast<int>(blockDim.x)) {
      const int n = i / kRowPairs, column = n < first ? n : end + n - first;
      float2 zero;
      zero.x = 0, zero.y = 0;
      b[i % kRowPairs * p.pitch + column] = zero;
    }
  }
  __syncthreads();
  const int columns = p.length - tx < p.tile ? p.length - tx : p.tile;
  const float2 *in = a + shift, *result = b;
  float2* to = b;
  SDAN_UNROLL_BY(1)
  for (int i = 0; i < p.steps; ++i) {
    const void* biases = i ? bias1 : bias0;
    const float bias = biases ? load_any(p.dtype, biases, c) : 0.0f;
    const bool final = i == p.steps - 1;
    row_step<K>(in, to, i ? taps1 : taps, i ? s1.taps : s0.taps, i ? s1.dilation : s0.dilation,
                bias, p.pitch, final ? p.tile : region, final ? 0 : first, final ? columns : end);
    __syncthreads();
    result = to, in = b, to = a;
  }
  const int64_t corner = base + static_cast<int64_t>(ty) * p.length + tx;
  for (Walk at(p.wide ? columns / 4 : columns); at.row < kRowPairs; at.advance()) {
    const bool second = ty + 2 * at.row + 1 < p.width;
    if (ty + 2 * at.row >= p.width) break;
    const int64_t i = corner + static_cast<int64_t>(2 * at.row) * p.length;
    const float2* from = result + at.row * p.pitch;
    if (p.wide) {
      float v[8];
      get_shared<8>(reinterpret_cast<const float*>(from + 4 * at.column), v);
      const float upper[4] = {v[0], v[2], v[4], v[6]}, lower[4] = {v[1], v[3], v[5], v[7]};
      store4_any(p.dtype, y, i + 4 * at.column, upper);
      if (second) store4_any(p.dtype, y, i + p.length + 4 * at.column, lower);
    } else {
      const float2 v = from[at.column];
      store_any(p.dtype, y, i + at.column, v.x);
      if (second) store_any(p.dtype, y, i + p.length + at.column, v.y);
    }
  }
}

// ---- columns

// 4 elements of one of the 16-bit types, in shared memory.
__device__ __forceinline__ void unpack4(DType dtype, const uint16_t* p, float* v) {
  const uint2 words = *reinterpret_cast<const uint2*>(p);
  if (dtype == DType::kBFloat16) {
    unpack2<bfloat16>(words.x, v[0], v[1]);
    unpack2<bfloat16>(words.y, v[2], v[3]);
  } else {
    unpack2<float16>(words.x, v[0], v[1]);
    unpack2<float16>(words.y, v[2], v[3]);
  }
}

// One step: the outputs of rows [0, p.rows) of a step, of which those in [live, live_end) are
// wanted, from the window of the ring that begins at `head`. Calls done(first row, outputs, column)
// for each group of kStripOutputs outputs, a dilation apart. `ring_floats`: where the ring ends.
template <int K, bool Last, typename F>
__device__ __forceinline__ void column_step(const float* ring, int head, int ring_floats,
                                            const float* taps, const float* offsets,
                                            const StripParams& p, int count, int d, int live,
                                            int live_end, F&& done) {
  constexpr int P = kStripOutputs;
  const int pitch = p.tile, step = d * pitch, lanes = p.tile / 4;
  const int column = static_cast<int>(threadIdx.x) % lanes * 4,
            g = static_cast<int>(threadIdx.x) / lanes,
            groups = static_cast<int>(blockDim.x) / lanes;
  const int phase_step = groups % d, row_step = groups / d * (P * d) + phase_step;
  int phase = g % d, row = g / d * (P * d) + phase;
  while (row < p.rows) {
    if (row < live_end && row + (P - 1) * d >= live) {
      const float4 offset = *reinterpret_cast<const float4*>(offsets + column);
      float acc[P][4];
      SDAN_UNROLL
      for (int j = 0; j < P; ++j)
        acc[j][0] = offset.x, acc[j][1] = offset.y, acc[j][2] = offset.z, acc[j][3] = offset.w;
      int start = head + row * pitch;
      if (start >= ring_floats) start -= ring_floats;
      each_taps<K, Last ? 4 : 8>(count, [&](auto some, int k0) {
        constexpr int N = decltype(some)::value;
        float w[Last ? 1 : N + 3];
        float4 each[Last ? N : 1];  // a tap of 4 channels
        if constexpr (Last)
          static_cast<void>(w);
        else
          get_taps<N>(taps + k0, w), static_cast<void>(each);
        int at = start + column;
        SDAN_UNROLL
        for (int q = 0; q < P + N - 1; ++q) {
          if constexpr (Last)
            if (q < N)
              each[q] = *reinterpret_cast<const float4*>(taps + (k0 + q) * (pitch + 4) + column);
          const float4 v = *reinterpret_cast<const float4*>(ring + at);
          at += step;
          if (at >= ring_floats) at -= ring_floats;
          SDAN_UNROLL
          for (int j = 0; j < P; ++j) {
            if (q - j < 0 || q - j >= N) continue;
            if constexpr (Last) {
              const float4 t = each[q - j];
              acc[j][0] = fmaf(t.x, v.x, acc[j][0]);
              acc[j][1] = fmaf(t.y, v.y, acc[j][1]);
              acc[j][2] = fmaf(t.z, v.z, acc[j][2]);
              acc[j][3] = fmaf(t.w, v.w, acc[j][3]);
            } else {
              const float t = w[q - j];
              acc[j][0] = fmaf(t, v.x, acc[j][0]);
              acc[j][1] = fmaf(t, v.y, acc[j][1]);
              acc[j][2] = fmaf(t, v.z, acc[j][2]);
              acc[j][3] = fmaf(t, v.w, acc[j][3]);
            }
          }
        }
        start += N * step;
        if (start >= ring_floats) start -= ring_floats;
      });
      done(row, acc, column);
    }
    row += row_step, phase += phase_step;
    if (phase >= d) phase -= d, row += (P - 1) * d;
  }
}

// A step of the walk handles p.rows rows: step n loads the rows from (first output + halos + n
// rows) on, turns what is there into as many results of the first convolution, and those into as
// many outputs, so that step 0 ends with the block's first outputs; p.before says how many steps
// come before it. The outputs go through shared memory, so that stores are wide and whole whatever
// the dilation. grid: (plane, segment, stripe). Dynamic shared memory: for each convolution tile
// floats and its taps (rounded up to 4; with Last taps * (tile + 4)); the rings; unless p.reuse,
// rows * tile floats for the outputs; of 16-bit tensors, rows * tile elements for cp.async.
template <int K, bool Last>
__global__ void __launch_bounds__(column_threads(Last), K ? 2 : 1)
    conv_column_kernel(const void* __restrict__ x, const void* __restrict__ weight0,
                       const void* __restrict__ bias0, const void* __restrict__ weight1,
                       const void* __restrict__ bias1, const void* __restrict__ edge_bias,
                       const void* __restrict__ edge_weight, const void* __restrict__ gate,
                       void* __restrict__ y, const StripParams p) {
  constexpr int P = kStripOutputs;
  SDAN_DYNAMIC_SHARED(raw);
  const int tile = p.tile, lanes = tile / 4;
  const bool two = p.steps == 2, half = p.dtype != DType::kFloat32;
  const StripStep &s0 = p.step[0], &s1 = p.step[1];
  const auto room = [&](const StripStep& s) {
    return Last ? s.taps * (tile + 4) : round_up(s.taps, 4);
  };
  auto* offsets = reinterpret_cast<float*>(raw);  // [step][column]
  float* taps = offsets + 2 * tile;
  float* taps1 = taps + room(s0);
  float* ring0 = taps1 + (two ? room(s1) : 0);
  float* ring1 = ring0 + p.ring[0] * tile;
  float* out = p.reuse ? ring0 : ring1 + p.ring[1] * tile;
  auto* fetched = reinterpret_cast<uint16_t*>(ring1 + (p.ring[1] + (p.reuse ? 0 : p.rows)) * tile);
  const int floats0 = p.ring[0] * tile, floats1 = p.ring[1] * tile;
  const int h0 = strip_halo(s0), h1 = two ? strip_halo(s1) : 0;
  const auto per_plane = static_cast<unsigned>(p.segments * p.tiles);
  const int64_t plane = blockIdx.x / per_plane, base = plane * p.length * p.width;
  const int in_plane = static_cast<int>(blockIdx.x % per_plane);
  const int begin = in_plane / p.tiles * p.segment, x0 = in_plane % p.tiles * tile;
  const int end = p.length - begin < p.segment ? p.length : begin + p.segment;
  const int low = begin - h0 - h1 > 0 ? begin - h0 - h1 : 0;  // the rows that the block needs
  const int high = p.length - end < h0 + h1 ? p.length : end + h0 + h1;
  // Taps and biases; zeros for what the first steps read before any row is there.
  const auto channel = [&](int column) {
    return Last ? static_cast<int64_t>((x0 + column) % p.channels) : plane % p.channels;
  };
  SDAN_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (i >= p.steps) break;
    const StripStep& s = p.step[i];
    float* to = i ? taps1 : taps;
    // With Last in the order of memory; the pitch of tile + 4 is for the banks.
    const int count = Last ? s.taps * tile : round_up(s.taps, 4);
    for (int n = static_cast<int>(threadIdx.x); n < count; n += static_cast<int>(blockDim.x)) {
      const int k = Last ? n % s.taps : n, column = Last ? n / s.taps : 0;
      to[Last ? k * (tile + 4) + column : k] =
          k < s.taps && x0 + column < p.width
              ? strip_tap(p, s, i ? weight1 : weight0, channel(column), k)
              : 0.0f;
    }
    for (int column = static_cast<int>(threadIdx.x); column < tile;
         column += static_cast<int>(blockDim.x)) {
      float offset = 0;
      if (x0 + column < p.width) {
        const int64_t c = channel(column);
        const void* bias = i ? bias1 : bias0;
        if (bias) offset = load_any(p.dtype, bias, c);
        if (i == 0 && edge_bias) {
          const int at = Last ? (x0 + column) / p.channels : x0 + column,
                    across = Last ? p.width / p.channels : p.width;
          float sum = 0;
          for (int k = 0; k < p.edge_taps; ++k) {
            const int64_t to_the_side =
                at + static_cast<int64_t>(k - (p.edge_taps - 1) / 2) * p.edge_dilation;
            if (to_the_side >= 0 && to_the_side < across)
              sum += load_any(p.dtype, edge_weight, c * p.edge_taps + k);
          }
          offset = fmaf(load_any(p.dtype, edge_bias, c), sum, offset);
        }
      }
      offsets[i * tile + column] = offset;
    }
  }
  for (int i = static_cast<int>(threadIdx.x); i < (floats0 + floats1) / 4;
       i += static_cast<int>(blockDim.x)) {
    const float zeros[4] = {0, 0, 0, 0};
    put_shared<4>(ring0 + 4 * i, zeros);
  }
  __syncthreads();

  // The rows of step n to the ring's rows from `slot` on, in floats: fetch() starts, arrive()
  // ends.
  const int per = half && p.wide ? p.wide : 4;
  const auto fetch = [&](int row0, int slot) {
    if (!p.wide) return;
    for (Walk at(tile / per); at.row < p.rows; at.advance()) {
      const int r = row0 + at.row, c = x0 + at.column * per;
      const bool inside = r >= low && r < high && c < p.width;
      const int64_t from = inside ? base + static_cast<int64_t>(r) * p.width + c : 0;
      if (!half) {
        int to = slot + at.row * tile;
        if (to >= floats0) to -= floats0;
        cp_async<16>(ring0 + to + 4 * at.column, static_cast<const float*>(x) + from,
                     inside ? 16 : 0);
      } else {
        uint16_t* to = fetched + at.row * tile + at.column * per;
        const uint16_t* source = static_cast<const uint16_t*>(x) + from;
        if (per == 8)
          cp_async<16>(to, source, inside ? 16 : 0);
        else
          cp_async<8>(to, source, inside ? 8 : 0);
      }
    }
    cp_async_commit();
  };
  const auto arrive = [&](int row0, int slot) {
    if (p.wide) cp_async_wait<0>();
    if (p.wide && !half) return;
    if (!p.wide) {
      for (Walk at(tile); at.row < p.rows; at.advance()) {
        int to = slot + at.row * tile;
        if (to >= floats0) to -= floats0;
        const int r = row0 + at.row, c = x0 + at.column;
        ring0[to + at.column] =
            r >= low && r < high && c < p.width
                ? load_any(p.dtype, x, base + static_cast<int64_t>(r) * p.width + c)
                : 0.0f;
      }
      return;
    }
    // 16-bit: every thread converts what it fetched itself.
    for (Walk at(tile / per); at.row < p.rows; at.advance()) {
      int to = slot + at.row * tile;
      if (to >= floats0) to -= floats0;
      to += at.column * per;
      const uint16_t* from = fetched + at.row * tile + at.column * per;
      if (per == 8) {
        float v[8];
        unpack4(p.dtype, from, v);
        unpack4(p.dtype, from + 4, v + 4);
        put_shared<8>(ring0 + to, v);
      } else {
        float v[4];
        unpack4(p.dtype, from, v);
        put_shared<4>(ring0 + to, v);
      }
    }
  };

  int head0 = 0, head1 = 0;  // where the windows of the two convolutions begin
  const auto forward = [&](int head, int rows, int floats) {
    const int to = head + rows * tile;
    return to >= floats ? to - floats : to;
  };
  const int ahead = begin + h0 + h1;  // the first row that step 0 loads
  if (p.ahead) fetch(ahead - p.before[0] * p.rows, forward(0, 2 * h0, floats0));
  for (int n = -p.before[0], first = begin + n * p.rows; first < end; ++n, first += p.rows) {
    // Outputs of this step: rows [first, first + rows), if first >= begin.
    if (!p.ahead) {
      __syncthreads();
      fetch(first + h0 + h1, forward(head0, 2 * h0, floats0));
    }
    arrive(first + h0 + h1, forward(head0, 2 * h0, floats0));
    __syncthreads();
    if (p.ahead && first + p.rows < end) {
      const int next = forward(head0, p.rows, floats0);
      fetch(first + p.rows + h0 + h1, forward(next, 2 * h0, floats0));
    }
    if (two && n >= -p.before[1]) {
      const int row0 = first + h1, slot = forward(head1, 2 * h1, floats1);  // in image, in ring
      column_step<K, Last>(ring0, head0, floats0, taps, offsets, p, s0.taps, s0.dilation,
                           (begin > h1 ? begin - h1 : 0) - row0,
                           (p.length - end < h1 ? p.length : end + h1) - row0,
                           [&](int row, float (&v)[P][4], int column) {
                             int to = slot + row * tile, r = row0 + row;
                             SDAN_UNROLL
                             for (int j = 0; j < P; ++j) {
                               if (to >= floats1) to -= floats1;
                               if (static_cast<unsigned>(r) < static_cast<unsigned>(p.length))
                                 put_shared<4>(ring1 + to + column, v[j]);
                               to += s0.dilation * tile, r += s0.dilation;
                             }
                           });
      // The ring turns: where rows outside of the image come, others were.
      if (row0 + p.rows > p.length) {
        for (Walk at(lanes); at.row < p.rows; at.advance()) {
          if (row0 + at.row < p.length) continue;
          const float zeros[4] = {0, 0, 0, 0};
          put_shared<4>(ring1 + forward(slot, at.row, floats1) + 4 * at.column, zeros);
        }
      }
      __syncthreads();
    }
    if (n >= 0) {
      const int d = two ? s1.dilation : s0.dilation;
      column_step<K, Last>(two ? ring1 : ring0, two ? head1 : head0, two ? floats1 : floats0,
                           two ? taps1 : taps, offsets + (two ? tile : 0), p,
                           two ? s1.taps : s0.taps, d, 0, end - first,
                           [&](int row, float (&v)[P][4], int column) {
                             float* to = out + row * tile + column;
                             SDAN_UNROLL
                             for (int j = 0; j < P; ++j) {
                               put_shared<4>(to, v[j]);
                               to += d * tile;
                             }
                           });
    }
    head0 = forward(head0, p.rows, floats0);
    if (n >= -p.before[1]) head1 = forward(head1, p.rows, floats1);
    if (n < 0) continue;
    __syncthreads();
    for (Walk at(p.wide ? lanes : tile); at.row < p.rows; at.advance()) {
      const int column = p.wide ? 4 * at.column : at.column;
      if (first + at.row >= end || x0 + column >= p.width) continue;
      const int64_t i = base + static_cast<int64_t>(first + at.row) * p.width + x0 + column;
      const float* from = out + at.row * tile + column;
      if (p.wide) {
        float v[4];
        get_shared<4>(from, v);
        if (gate) {
          float u[4];
          load4_any(p.dtype, gate, i, u);
          SDAN_UNROLL
          for (int e = 0; e < 4; ++e) v[e] *= u[e];
        }
        store4_any(p.dtype, y, i, v);
      } else {
        store_any(p.dtype, y, i, gate ? *from * load_any(p.dtype, gate, i) : *from);
      }
    }
  }
}

}  // namespace sdan_fast::cuda
