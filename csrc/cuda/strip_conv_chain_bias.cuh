// The bias gradients of a strip chain, from the gradient of its result alone.
//
// What a bias adds to the result is an all-ones image sent through the convolutions behind it, and
// that is separable: a column-vector x a row-vector. With the fields
//   down(s)   = V_last .. V_s applied to an all-ones column,   across(s) = H_last .. H_s to a row
// (all ones behind the last stage) the gradient of the bias of H_s is the sum over the image of
// grad * down(s) * across(s + 1), that of V_s's the sum of grad * down(s + 1) * across(s + 1).
// So no gradient that flows back through convolutions is summed, whose rounding errors would be
// large beside a sum that cancels; sums here carry their rounding errors along.
//
//   chain_fields        one stage's convolutions, applied to the fields of the stages up to it
//   chain_bias_sums     partial sums for the two or fewer stages of a launch, one per block
//   sum_parts           adds them
#pragma once

#include "quad_tile.cuh"

namespace sdan_fast::cuda {

constexpr int kBiasThreads = 256, kFieldThreads = 64;
constexpr int kBiasRows = 4;  // of the gradient that a thread sums at a time

// Fields are stored as [stage][channel][position], or [stage][position][channel] if `last`.
struct FieldParams {
  DType dtype;
  int32_t stage;  // whose convolutions these are: fields [0, stage] pass through them
  int32_t channels, length[2], taps[2], dilation[2];  // of W and of H
  int32_t last;
};

// `from` and `to` hold, for W and then for H, a field of every stage; the one of this stage is all
// ones before it. A thread computes one value.
__global__ void __launch_bounds__(kFieldThreads, 1)
    chain_fields_kernel(const void* __restrict__ across, const void* __restrict__ down,
                        const float* __restrict__ from, float* __restrict__ to, int64_t stages,
                        const FieldParams p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t offset = 0;
  SDAN_UNROLL_BY(1)
  for (int axis = 0; axis < 2; ++axis) {
    // Chosen, not indexed: an index would put the parameters on the stack.
    const int length = axis ? p.length[1] : p.length[0], taps = axis ? p.taps[1] : p.taps[0],
              dilation = axis ? p.dilation[1] : p.dilation[0];
    const int64_t field = static_cast<int64_t>(p.channels) * length;
    const void* weight = axis ? down : across;
    const int64_t next = p.last ? static_cast<int64_t>(dilation) * p.channels : dilation;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
         i < (p.stage + 1) * field; i += step) {
      const Quotient of_fields(i, field), in_field(of_fields.rest, p.last ? p.channels : length);
      const int64_t c = p.last ? in_field.rest : in_field.whole;
      const int position = static_cast<int>(p.last ? in_field.whole : in_field.rest);
      // The taps that meet the image.
      const int middle = (taps - 1) / 2, before = position / dilation,
                behind = (length - 1 - position) / dilation;
      const int first = before < middle ? middle - before : 0,
                end = behind < middle ? middle + behind + 1 : taps;
      const bool ones = of_fields.whole == p.stage;
      const float* value = from + offset + i + (first - middle) * next;
      CarefulSum sum;
      with_element(p.dtype, [&](auto element) {
        const auto* tap = static_cast<const decltype(element)*>(weight) + c * taps;
        if (ones) {
          for (int k = first; k < end; ++k) sum.add(load_one(tap + k));
        } else {
          SDAN_UNROLL_BY(2)
          for (int k = first; k < end; ++k) {
            sum.add(load_one(tap + k) * *value);
            value += next;
          }
        }
      });
      to[offset + i] = sum.sum;
    }
    offset += stages * field;
  }
}

// V elements of a row, 16 bytes: 4 of float32, 8 of 16 bits. All at once if `wide`, else one by
// one, and zeros from the `present`-th on.
template <int V>
__device__ __forceinline__ Words<16> load_columns(const void* p, int64_t i, bool wide,
                                                  int present) {
  using E = std::conditional_t<V == 4, uint32_t, uint16_t>;
  const E* from = static_cast<const E*>(p) + i;
  if (wide) return load_words<16>(from);
  Words<16> r{};
  SDAN_UNROLL
  for (int e = 0; e < V; ++e)
    if (e < present)
      r.w[e * 4 / V] |= static_cast<uint32_t>(from[e]) << (V == 4 ? 0 : 16 * (e % 2));
  return r;
}

template <int V>
__device__ __forceinline__ void to_floats(DType dtype, const Words<16>& r, float (&v)[V]) {
  SDAN_UNROLL
  for (int j = 0; j < 4; ++j) {
    if constexpr (V == 4)
      v[j] = bits_to_float(r.w[j]);
    else if (dtype == DType::kBFloat16)
      unpack2<bfloat16>(r.w[j], v[2 * j], v[2 * j + 1]);
    else
      unpack2<float16>(r.w[j], v[2 * j], v[2 * j + 1]);
  }
}

struct BiasParams {
  int64_t images;
  DType dtype;
  int32_t channels, height, width;
  int32_t stages;   // of this launch: 1 or 2
  int32_t segment;  // rows of a column that are summed at a time
  int32_t wide;     // 1: V columns may be read at once, of the gradient and of the fields
};

// The fields of a launch's stages s and s + 1, and of the one behind: down[i] and across[i] of
// stage s + i. Null: all ones.
struct BiasFields {
  const float* down[3];
  const float* across[3];
};

// Contiguous tensors. A block sums a segment of a plane's rows, a thread V columns (4 of float32, 8
// of 16 bits) and every so many rows of them. In 16 bits a few terms are added plainly, their sums
// carefully. Block x (plane, segment) writes partial[i][x] for the biases i of H_s, V_s, H_s+1,
// V_s+1.
template <int V>
__global__ void __launch_bounds__(kBiasThreads, 2)
    chain_bias_sums_kernel(const void* __restrict__ grad, const BiasFields fields,
                           float* __restrict__ partial, const BiasParams p) {
  constexpr int R = kBiasRows, H = R / 2;
  constexpr bool kCareful = V == 4;
  SDAN_SHARED(float, sums, [4][kBiasThreads / 32]);
  const auto segments = static_cast<unsigned>((p.height + p.segment - 1) / p.segment);
  const int64_t plane = blockIdx.x / segments, c = plane % p.channels;
  const int begin = static_cast<int>(blockIdx.x % segments) * p.segment,
            end = p.height - begin < p.segment ? p.height : begin + p.segment;
  const int groups = (p.width + V - 1) / V, threads = static_cast<int>(blockDim.x),
            abreast = groups < threads ? groups : threads, rows = threads / abreast;
  const int first = begin + static_cast<int>(threadIdx.x) / abreast;
  const float* down[3];
  SDAN_UNROLL
  for (int s = 0; s < 3; ++s) down[s] = fields.down[s] ? fields.down[s] + c * p.height : nullptr;
  CarefulSum total[4];
  const auto over_columns = [&](auto at_once) {
    constexpr bool kAtOnce = decltype(at_once)::value;
    for (int g = static_cast<int>(threadIdx.x) % abreast; first < begin + rows && g < groups;
         g += abreast) {
      const int x = g * V;
      const int64_t base = plane * p.height * p.width + x;
      CarefulSum columns[3][V];
      for (int y = first; y < end; y += rows * R) {
        [[maybe_unused]] float few[3][V] = {};
        SDAN_UNROLL_BY(1)
        for (int half = 0; half < R; half += H) {
          // All loads come before any arithmetic, and none is behind a branch.
          Words<16> words[H];
          float factor[3][H];
          SDAN_UNROLL
          for (int r = 0; r < H; ++r) {
            const int at = y + (half + r) * rows;
            words[r] = Words<16>{};
            if (at < end)
              words[r] = load_columns<V>(grad, base + static_cast<int64_t>(at) * p.width, kAtOnce,
                                         p.width - x);
            SDAN_UNROLL
            for (int s = 0; s < 3; ++s) {
              factor[s][r] = 1;
              if (down[s]) factor[s][r] = down[s][at < end ? at : y];
            }
          }
          SDAN_UNROLL
          for (int r = 0; r < H; ++r) {
            float v[V];
            to_floats<V>(p.dtype, words[r], v);
            SDAN_UNROLL
            for (int s = 0; s < 3; ++s) {
              if (s > p.stages) continue;
              SDAN_UNROLL
              for (int e = 0; e < V; ++e) {
                if constexpr (kCareful)
                  columns[s][e].add(v[e] * factor[s][r]);
                else
                  few[s][e] = fmaf(v[e], factor[s][r], few[s][e]);
              }
            }
          }
        }
        if constexpr (!kCareful) {
          SDAN_UNROLL
          for (int s = 0; s < 3; ++s) {
            if (s > p.stages) continue;
            SDAN_UNROLL
            for (int e = 0; e < V; ++e) columns[s][e].add(few[s][e]);
          }
        }
      }
      // Columns beyond the image are zero. H_s has the field down(s), all others those behind it.
      [[maybe_unused]] float few[4] = {};
      SDAN_UNROLL
      for (int first_of = 0; first_of < V; first_of += 4) {
        float across[3][4];
        SDAN_UNROLL
        for (int s = 1; s < 3; ++s) {
          const float* from = fields.across[s] && s <= p.stages
                                  ? fields.across[s] + c * p.width + x + first_of
                                  : nullptr;
          SDAN_UNROLL
          for (int k = 0; k < 4; ++k) across[s][k] = 1;
          if (from && kAtOnce) {
            load<4>(from, across[s]);
          } else if (from) {
            SDAN_UNROLL
            for (int k = 0; k < 4; ++k)
              if (x + first_of + k < p.width) across[s][k] = from[k];
          }
        }
        SDAN_UNROLL
        for (int i = 0; i < 4; ++i) {
          SDAN_UNROLL
          for (int k = 0; k < 4; ++k) {
            const CarefulSum& column = columns[(i + 1) / 2][first_of + k];
            const float factor = across[i / 2 + 1][k];
            if constexpr (kCareful) {
              total[i].add(column.sum * factor);
              total[i].add(-column.lost * factor);
            } else {
              few[i] = fmaf(column.sum - column.lost, factor, few[i]);
            }
          }
        }
      }
      if constexpr (!kCareful) {
        SDAN_UNROLL
        for (int i = 0; i < 4; ++i) total[i].add(few[i]);
      }
    }
  };
  if (p.wide)
    over_columns(std::true_type{});
  else
    over_columns(std::false_type{});
  const int warp = static_cast<int>(threadIdx.x) / 32;
  SDAN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float s = warp_sum(total[i]);
    if (threadIdx.x % 32 == 0) sums[i][warp] = s;
  }
  __syncthreads();
  if (threadIdx.x < 2u * static_cast<unsigned>(p.stages)) {
    CarefulSum s;
    for (int i = 0; i < threads / 32; ++i) s.add(sums[threadIdx.x][i]);
    partial[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x] = s.sum;
  }
}

// Floats from one row of sums of all threads to the next, `n` (a power of two) of which belong to a
// thread: 32 neighbouring sums, those of a thread one after the other, lie in 32 banks.
__host__ __device__ constexpr int bias_pitch(int threads, int n) {
  const int to = n < 32 ? 32 / n : 1;
  return threads + ((to - threads) & 31);
}

// channels_last tensors. blockDim.x lanes of V channels, blockDim.y columns of segments of images,
// in turn; grid: (splits, channels / (V blockDim.x)). In 16 bits the terms of kBiasRows rows are
// added plainly, their sums carefully. Block x writes partial[x][channel][i] for the biases i, in
// the order of chain_bias_sums_kernel. Dynamic shared memory: 4 V rows of bias_pitch floats.
template <typename T, int V>
__global__ void __launch_bounds__(kBiasThreads, 2)
    chain_bias_sums_last_kernel(const T* __restrict__ grad, const BiasFields fields,
                                float* __restrict__ partial, const BiasParams p) {
  constexpr int R = kBiasRows;
  constexpr bool kCareful = !is_16bit<T>;
  SDAN_DYNAMIC_SHARED(raw);
  auto* sums = reinterpret_cast<float*>(raw);  // [channel of a thread][bias][thread]
  const int first = static_cast<int>(blockIdx.y * blockDim.x) * V,
            c = first + static_cast<int>(threadIdx.x) * V;
  const int segments = (p.height + p.segment - 1) / p.segment;
  const int64_t columns = p.images * segments * p.width,
                next = static_cast<int64_t>(gridDim.x) * blockDim.y,
                line = static_cast<int64_t>(p.width) * p.channels;
  CarefulSum total[4][V];
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
       c < p.channels && i < columns; i += next) {
    const Quotient of_rows(i, p.width), of_images(of_rows.whole, segments);
    const int x = static_cast<int>(of_rows.rest),
              begin = static_cast<int>(of_images.rest) * p.segment,
              end = p.height - begin < p.segment ? p.height : begin + p.segment;
    const T* from = grad + (of_images.whole * p.height + begin) * line +
                    static_cast<int64_t>(x) * p.channels + c;
    CarefulSum column[3][V];
    int64_t at = static_cast<int64_t>(begin) * p.channels + c;  // in a field down the columns
    const auto add_rows = [&](auto whole, int rows) {
      const auto there = [&](int r) { return decltype(whole)::value || r < rows; };
      // All loads come before any arithmetic.
      float v[R][V];
      SDAN_UNROLL
      for (int r = 0; r < R; ++r, from += line) {
        SDAN_UNROLL
        for (int e = 0; e < V; ++e) v[r][e] = 0;
        if (there(r)) load<V>(from, v[r]);
      }
      SDAN_UNROLL
      for (int s = 0; s < 3; ++s) {
        if (s > p.stages) continue;
        [[maybe_unused]] float few[V] = {};
        const float* factors = fields.down[s] ? fields.down[s] + at : nullptr;
        SDAN_UNROLL
        for (int r = 0; r < R; ++r) {
          float down[V];
          SDAN_UNROLL
          for (int e = 0; e < V; ++e) down[e] = 1;
          if (factors && there(r)) load<V>(factors + static_cast<int64_t>(r) * p.channels, down);
          SDAN_UNROLL
          for (int e = 0; e < V; ++e) {
            if constexpr (kCareful)
              column[s][e].add(v[r][e] * down[e]);
            else
              few[e] = fmaf(v[r][e], down[e], few[e]);
          }
        }
        if constexpr (!kCareful) {
          SDAN_UNROLL
          for (int e = 0; e < V; ++e) column[s][e].add(few[e]);
        }
      }
      at += int64_t{R} * p.channels;
    };
    int y = begin;
    for (; y + R <= end; y += R) add_rows(std::true_type{}, R);
    if (y < end) add_rows(std::false_type{}, end - y);
    // H_s has the field down(s), all others those behind it.
    SDAN_UNROLL
    for (int s = 1; s < 3; ++s) {
      if (s > p.stages) continue;
      float across[V];
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) across[e] = 1;
      if (fields.across[s])
        load<V>(fields.across[s] + static_cast<int64_t>(x) * p.channels + c, across);
      SDAN_UNROLL
      for (int k = 2 * s - 2; k < 2 * s; ++k) {
        SDAN_UNROLL
        for (int e = 0; e < V; ++e) {
          const CarefulSum& of = column[(k + 1) / 2][e];
          if constexpr (kCareful) {
            total[k][e].add(of.sum * across[e]);
            total[k][e].add(-of.lost * across[e]);
          } else {
            total[k][e].add((of.sum - of.lost) * across[e]);
          }
        }
      }
    }
  }
  const int lanes = static_cast<int>(blockDim.x), rows = static_cast<int>(blockDim.y),
            threads = lanes * rows, biases = 2 * p.stages, mine = V * biases,
            pitch = bias_pitch(threads, mine),
            thread = static_cast<int>(threadIdx.y) * lanes + static_cast<int>(threadIdx.x);
  SDAN_UNROLL
  for (int k = 0; k < 4; ++k) {
    if (k >= biases) continue;
    SDAN_UNROLL
    for (int e = 0; e < V; ++e)
      sums[(e * biases + k) * pitch + thread] = total[k][e].sum - total[k][e].lost;
  }
  __syncthreads();
  for (int i = thread; i < lanes * mine && first + i / biases < p.channels; i += threads) {
    const float* from = sums + i % mine * pitch + i / mine;
    CarefulSum even, odd;  // two chains of additions are under way
    int k = 0;
    for (; k + 1 < rows; k += 2) even.add(from[k * lanes]), odd.add(from[(k + 1) * lanes]);
    if (k < rows) even.add(from[k * lanes]);
    even.add(odd.sum);
    even.add(-odd.lost);
    const int64_t to = static_cast<int64_t>(blockIdx.x) * p.channels + first;
    partial[to * biases + i] = even.sum - even.lost;
  }
}

}  // namespace sdan_fast::cuda
