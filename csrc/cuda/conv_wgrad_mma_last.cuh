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
  int32_t scratch;           // where the warps' sums begin; in the gradient's planes if 0
};

// The products of a tap row: columns of 16 x 8 NT elements that begin kMargin before the tile's.
template <int K, int D>
struct GradBand : Band<K, D> {
  static constexpr int kTiles =
      (16 + (K - 1) * D + Band<K, D>::kMargin - Band<K, D>::kHalo + 7) / 8;
  // Rows of taps at a time, whose sums fit in registers.
  static constexpr int kRows = K * kTiles <= 36 ? K : (K + 1) / 2;
  // Floats from a row of 8 folded ones to the next; of all of them.
  static constexpr int kPitch = (kTiles + 1) / 2 * 16 + 8, kFolded = 7 * kPitch + 8 * (kTiles + 1);
};

// The sums along the diagonals of a product of 16 x 8 kTiles elements, by way of kFolded floats of
// shared memory: lane 4 j has that of tap j, of the `number`-th 8 taps.
template <int K, int D>
__device__ __forceinline__ void fold(float* scratch, int lane,
                                     const float (&acc)[GradBand<K, D>::kTiles][4]) {
  using B = GradBand<K, D>;
  __syncwarp();
  // 8 rows further down are 8 columns further on: both halves lie on the same diagonals.
  float* to = scratch + lane / 4 * B::kPitch + lane % 4 * 2;
  SDAN_UNROLL
  for (int t = 0; t <= B::kTiles; ++t) {
    float2 v;
    v.x = v.y = 0;
    if (t > 0) v.x = acc[t - 1][0], v.y = acc[t - 1][1];
    if (t < B::kTiles) v.x += acc[t][2], v.y += acc[t][3];
    *reinterpret_cast<float2*>(to + 8 * t) = v;
  }
  __syncwarp();
}

template <int K, int D>
__device__ __forceinline__ float folded_sum(const float* scratch, int lane, int tap) {
  using B = GradBand<K, D>;
  const float* from = scratch + lane % 4 * (B::kPitch + 1) + 8 + B::kMargin - B::kHalo + tap * D;
  float sum = 0;
  if (tap < K) sum = from[0] + from[4 * (B::kPitch + 1)];
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}

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
      float* scratch = p.scratch ? reinterpret_cast<float*>(raw + p.scratch) + quad * B::kFolded
                                 : reinterpret_cast<float*>(planes_g + place * p.plane_g);
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
        SDAN_UNROLL
        for (int i = 0; i < B::kRows; ++i) {
          if (B::kRows < K && first + i >= K) break;
          fold<K, D>(scratch, lane, acc[i]);
          SDAN_UNROLL
          for (int j = 0; j < K; j += 8) {
            const float sum = folded_sum<K, D>(scratch, lane, j + lane / 4);
            if (lane % 4 == 0 && j + lane / 4 < K) put((first + i) * K + j + lane / 4, sum);
          }
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
