// The weight gradient of a depth-wise square of K x K taps with dilation D in 16 bits on tensor
// cores, channels_last tensors: the products of conv_wgrad_mma.cuh, from planes that a block makes
// of its tiles as conv_mma_last does.
#pragma once

#include "conv_mma_last.cuh"

namespace sdan_fast::cuda {

// Sizes in elements; product_plan.h chooses the tiles.
struct GradProductParams {
  int32_t channels, height, width;
  int32_t lanes;             // channels of a block, a multiple of 4
  int32_t tile_h, tile_w;    // of a tile, multiples of 16; its rows are D apart
  int32_t tiles_y, tiles_x;  // of each of the D images of an image
  int32_t tiles;             // of all images
  int32_t pitch_x, plane_x;  // of staged rows, odd numbers of 8 elements; of a channel's plane
  int32_t pitch_g, plane_g;  // of the gradient, which has the halo's rows
  int32_t scratch;           // where the warps' sums begin; in the channel's planes if 0
};

// The products of a tap row: columns of 16 x 8 NT elements that begin kMargin before the tile's.
template <int K, int D>
struct GradBand : Band<K, D> {
  static constexpr int kShift = Band<K, D>::kMargin - Band<K, D>::kHalo;
  static constexpr int kTiles = (16 + (K - 1) * D + kShift + 7) / 8;
  // Rows of taps at a time, whose sums fit in registers.
  static constexpr int kRows = K * kTiles <= 36 ? K : (K + 1) / 2;
  // Of the rows' sums in shared memory, eight times: floats from one to the next, 8 modulo 32, and
  // of four of them with room to move them a bank or a few.
  static constexpr int kSums = kRows * K, kPitch = (kSums + 23) / 32 * 32 + 8,
                       kFour = (3 * kPitch + kSums + 9) / 4 * 4;
};

// Which of a lane's sums of a product of 16 x 8 kTiles elements lie on taps' diagonals. 8 rows
// further down are 8 columns further on, so that both halves of a product are added first; then a
// lane has two elements of each 8 columns, of row lane / 4.
template <int K, int D>
struct Diagonals {
  using B = GradBand<K, D>;
  static constexpr int kCommon = D % 8 == 0 ? 8 : D % 4 == 0 ? 4 : D % 2 == 0 ? 2 : 1;
  static constexpr int kTapStep = 8 / kCommon, kTileStep = D / kCommon;
  static constexpr int kElements = D % 2 ? 2 : 1;              // of the two that lie on some tap's
  static constexpr int kMost = (K + kTapStep - 1) / kTapStep;  // taps of an element
  static constexpr int kFirst = ((kTapStep - 1) * D + 7 + B::kShift) / 8;  // the last first tile

  int tap[kElements], tile[kElements];  // the first tap of each element (K: none), and where
  bool second;                          // if kElements is 1: which of the two it is

  __device__ __forceinline__ explicit Diagonals(int lane) {
    const int row = lane / 4;
    second = (row + B::kShift) % 2;
    SDAN_UNROLL
    for (int e = 0; e < kElements; ++e) {
      const int at = lane % 4 * 2 + (kElements == 2 ? e : second) - row - B::kShift;
      tap[e] = K, tile[e] = 0;
      SDAN_UNROLL
      for (int k = 0; k < kTapStep && k < K; ++k)
        if ((k * D - at) % 8 == 0) tap[e] = k, tile[e] = (k * D - at) / 8;
    }
  }

  // Puts a row of taps' sums to to[tap].
  __device__ __forceinline__ void put(const float (&acc)[B::kTiles][4], float* to) const {
    SDAN_UNROLL
    for (int e = 0; e < kElements; ++e) {
      float sums[B::kTiles];  // of both halves
      SDAN_UNROLL
      for (int t = 0; t < B::kTiles; ++t) {
        const auto of = [&](int i) {
          return acc[t][i] + (t + 1 < B::kTiles ? acc[t + 1][2 + i] : 0);
        };
        const float v = of(e), other = of(1);
        sums[t] = kElements == 1 && second ? other : v;
      }
      SDAN_UNROLL
      for (int n = 0; n < kMost; ++n) {
        float v = 0;
        SDAN_UNROLL
        for (int first = 0; first <= kFirst && first + n * kTileStep < B::kTiles; ++first) {
          const float here = sums[first + n * kTileStep];  // read first: no array in local memory
          v = tile[e] == first ? here : v;
        }
        if (tap[e] + n * kTapStep < K) to[tap[e] + n * kTapStep] = v;
      }
    }
  }
};

// A warp has a quad of channels, a block tiles blockIdx.x, blockIdx.x + gridDim.x, ... Writes
// partial[blockIdx.x][channel][tap], and [taps] = the sum of the gradient. grid: (blocks, channels
// / lanes). Dynamic shared memory: planes of the input, of the gradient, and scratch.
template <typename T, int K, int D>
__global__ void __launch_bounds__(kProductThreads, 1)
    wgrad_mma_last_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                          float* __restrict__ partial, const GradProductParams p) {
  if constexpr (!kTaken<T, true>) return;
  using B = GradBand<K, D>;
  constexpr int S = 16, halo = K / 2;
  SDAN_DYNAMIC_SHARED(raw);
  auto* planes_x = reinterpret_cast<T*>(raw);
  T* planes_g = planes_x + p.lanes * p.plane_x;
  const int quad = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int c0 = static_cast<int>(blockIdx.y) * p.lanes,
            here = p.channels - c0 < p.lanes ? p.channels - c0 : p.lanes, quads = here / 4;
  const int64_t next = static_cast<int64_t>(D) * p.width * p.channels;
  constexpr uint32_t one = std::is_same_v<T, bfloat16> ? 0x3f803f80u : 0x3c003c00u;
  const uint32_t ones[2] = {one, one};
  const Diagonals<K, D> diagonals(lane);
  const SharedAddress corner_x = shared_address(planes_x + block_row(lane, p.pitch_x)),
                      corner_g = shared_address(planes_g + (lane % 8 + lane / 16 * 8) * p.pitch_g +
                                                lane / 8 % 2 * 8);
  for (int number = static_cast<int>(blockIdx.x); number < p.tiles;
       number += static_cast<int>(gridDim.x)) {
    const int line = number / p.tiles_x, x0 = (number - line * p.tiles_x) * p.tile_w,
              which = line / p.tiles_y, y0 = (line - which * p.tiles_y) * p.tile_h, n = which / D,
              image = which - n * D;
    const int rows = (p.height - image + D - 1) / D;  // of the image; none, perhaps
    const bool first_turn = number == static_cast<int>(blockIdx.x);
    const int64_t base = (static_cast<int64_t>(n) * p.height + image) * p.width * p.channels + c0;
    if (!first_turn) __syncthreads();
    stage_planes(x + base, next, planes_x, p.pitch_x, p.plane_x, quads, p.channels, y0,
                 x0 - B::kMargin, p.tile_h, p.tile_w + 2 * B::kMargin, rows, p.width);
    stage_planes(grad + base, next, planes_g, p.pitch_g, p.plane_g, quads, p.channels, y0 - halo,
                 x0, p.tile_h + K - 1, p.tile_w, rows, p.width);
    __syncthreads();
    if (quad >= quads) continue;
    SDAN_UNROLL_BY(1)
    for (int e = 0; e < 4; ++e) {
      const int c = 4 * quad + e, place = place_of(c, quads);
      float* to = partial + (static_cast<int64_t>(blockIdx.x) * p.channels + c0 + c) * (K * K + 1);
      // Of rows of lanes 0 to 3, and of 4 to 7: these a bank or two from those, whose pitch is 8.
      float *low = reinterpret_cast<float*>(raw + p.scratch) + quad * 2 * B::kFour,
            *high = low + B::kFour;
      if (p.scratch == 0) {
        low = reinterpret_cast<float*>(planes_g + place * p.plane_g);
        high = reinterpret_cast<float*>(planes_x + place * p.plane_x);
      }
      high += ((low - high) & 7) + (D % 2 ? 1 : 2);
      float* const own = (lane < 16 ? low : high) + lane / 4 % 4 * B::kPitch;
      const auto put = [&](int k, float v) { to[k] = first_turn ? v : to[k] + v; };
      SDAN_UNROLL_BY(1)
      for (int first = 0; first < K; first += B::kRows) {
        float acc[B::kRows][B::kTiles][4], total[4] = {0, 0, 0, 0};
        SDAN_UNROLL
        for (int i = 0; i < B::kRows * B::kTiles * 4; ++i)
          acc[i / (4 * B::kTiles)][i / 4 % B::kTiles][i % 4] = 0;
        for (int down = 0; down < p.tile_h && y0 + down < rows; down += S) {
          for (int right = 0; right < p.tile_w && x0 + right < p.width; right += S) {
            uint32_t b[B::kTiles][2];
            get_blocks<true, 0>(corner_x + (place * p.plane_x + down * p.pitch_x + right) * 2, b);
            SharedAddress from =
                corner_g + (place * p.plane_g + (down + K - 1 - first) * p.pitch_g + right) * 2;
            SDAN_UNROLL
            for (int i = 0; i < B::kRows; ++i, from -= 2 * p.pitch_g) {
              if (B::kRows < K && first + i >= K) break;
              uint32_t a[4];
              load_transposed<0>(from, a);
              if (first + i == halo) multiply_add<T>(total, a, ones);
              SDAN_UNROLL
              for (int t = 0; t < B::kTiles; ++t) multiply_add<T>(acc[i][t], a, b[t]);
            }
          }
        }
        __syncwarp();
        SDAN_UNROLL
        for (int i = 0; i < B::kRows; ++i)
          if (B::kRows == K || first + i < K) diagonals.put(acc[i], own + i * K);
        __syncwarp();
        SDAN_UNROLL
        for (int k = 0; k < B::kSums; k += 32) {
          if (k + lane >= B::kSums || (B::kRows < K && first * K + k + lane >= K * K)) break;
          float sum = 0;
          SDAN_UNROLL
          for (int row = 0; row < 4; ++row)
            sum += low[row * B::kPitch + k + lane] + high[row * B::kPitch + k + lane];
          put(first * K + k + lane, sum);
        }
        if (first <= halo && halo < first + B::kRows) {
          const float sum = warp_sum(lane % 4 == 0 ? total[0] + total[2] : 0.0f);
          if (lane == 0) put(K * K, sum);
        }
      }
    }
  }
}

}  // namespace sdan_fast::cuda
