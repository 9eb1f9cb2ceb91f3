// conv_mma for channels_last tensors: the same products, from planes that a block makes of its tile
// of the tensor while it stages it, and back to pixels through shared memory.
#pragma once

#include "conv_mma.cuh"

namespace sdan_fast::cuda {

// Sizes in elements; product_plan.h chooses the tiles.
struct LastProductParams {
  int32_t channels, height, width;
  int32_t flip;              // 1: correlate with the taps reversed (input gradient)
  int32_t lanes;             // channels of a block, a multiple of 4
  int32_t tile_h, tile_w;    // outputs of a tile, multiples of 16; its rows are D apart
  int32_t tiles_y, tiles_x;  // of each of the D images of an image
  int32_t pitch, plane;      // of staged rows, odd numbers of 8 elements; of a channel's plane
  int32_t pixel;             // 32-bit words of a pixel's results, 4 modulo 8
};

// Where a block's channel c lies among its planes: the quads' first channels, then their second
// ones and so on, so that what the neighbours store is apart in the banks.
__device__ __forceinline__ int place_of(int c, int quads) {
  return c % 4 * quads + c / 4;
}

// Reads a tile of pixels, `channels` elements from one to the next, into planes: columns [x, x +
// columns) and rows [y, y + total), which lie `next` elements apart; zeros outside the image.
// Threads read four neighbouring channels, their neighbours the next ones, then those of the next
// pixel; each goes down its column.
template <typename T>
__device__ __forceinline__ void stage_planes(const T* image, int64_t next, T* planes, int pitch,
                                             int plane, int quads, int channels, int y, int x,
                                             int total, int columns, int height, int width) {
  const int apart = quads * plane, low = y < 0 ? -y : 0,
            high = height - y < total ? height - y : total;
  const int64_t bytes = next * static_cast<int>(sizeof(T));
  for (int item = static_cast<int>(threadIdx.x); item < quads * columns;
       item += static_cast<int>(blockDim.x)) {
    const int column = item / quads, quad = item - column * quads;
    const bool inside = static_cast<unsigned>(x + column) < static_cast<unsigned>(width);
    T* to = planes + quad * plane + column;
    const auto put = [&](const Words<8>& v) {
      T* at = to;
      SDAN_UNROLL
      for (int e = 0; e < 4; ++e, at += apart)
        at->bits = static_cast<uint16_t>(v.w[e / 2] >> 16 * (e % 2));
      to += pitch;
    };
    int row = 0;
    const auto clear = [&](int end) {
      SDAN_UNROLL_BY(1)
      for (; row < end; ++row) put(Words<8>{});
    };
    clear(inside ? low : total);
    const T* from =
        image + (y + row) * next + static_cast<int64_t>(x + column) * channels + 4 * quad;
    constexpr int kBatch = 4;  // loads under way at a time
    for (; row + kBatch <= high; row += kBatch) {
      Words<8> v[kBatch];
      SDAN_UNROLL
      for (int i = 0; i < kBatch; ++i, from = bytes_on(from, bytes)) v[i] = load_words<8>(from);
      SDAN_UNROLL
      for (int i = 0; i < kBatch; ++i) put(v[i]);
    }
    SDAN_UNROLL_BY(1)
    for (; row < high; ++row, from = bytes_on(from, bytes)) put(load_words<8>(from));
    clear(total);
  }
}

// A channel's taps in shared memory: rows of K and a zero. Undilated, both elements of a register
// of the matrices of taps may be taps, and words have one in the low half, then as many words in
// the high one. Else one of the elements at most is a tap, and they are 16-bit elements.
template <int K, int D>
struct BandTaps {
  using B = Band<K, D>;
  using Tap = std::conditional_t<D == 1, uint32_t, uint16_t>;
  static constexpr int kRow = K + 1, kHalf = K * kRow, kEach = D == 1 ? 2 : 1;
  static constexpr int kBytes = kHalf * (D == 1 ? 8 : 2);  // of a channel

  int at[B::kSteps][2][kEach];  // this lane's elements
  int shift[B::kSteps][2];      // dilated: of which half

  template <typename T>
  static __device__ __forceinline__ void put(Tap* taps, const T* weight, int flip, int channels) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int i = thread; i < channels * K * K; i += threads) {
      const int line = i / K, kw = i - line * K, c = line / K, k = i - c * K * K;
      const uint16_t tap = weight[flip ? i + (K * K - 1 - 2 * k) : i].bits;
      Tap* to = taps + (c * (kEach - 1) * K + line) * kRow + kw;
      *to = tap;
      if constexpr (D == 1) to[kHalf] = static_cast<uint32_t>(tap) << 16;
    }
    for (int i = thread; i < channels * kEach * K; i += threads) taps[i * kRow + K] = 0;
  }

  __device__ __forceinline__ explicit BandTaps(int lane) {
    SDAN_UNROLL
    for (int i = 0; i < 4 * B::kSteps; ++i) {
      const int s = i / 4, half = i / 2 % 2, e = i % 2;
      const int offset = 16 * s + 8 * half + lane % 4 * 2 + e - lane / 4 - B::kMargin + B::kHalo,
                tap = offset / D;
      const bool there = offset >= 0 && tap < K && offset % D == 0;
      if constexpr (D == 1)
        at[s][half][e] = (there ? tap : K) + e * kHalf;
      else if (e == 0 || there)
        at[s][half][0] = there ? tap : K, shift[s][half] = 16 * e;
    }
  }

  // The elements of one channel, whose taps these are.
  __device__ __forceinline__ void get(const Tap* taps, uint32_t (&b)[K][B::kSteps][2]) const {
    SDAN_UNROLL
    for (int i = 0; i < 2 * B::kSteps; ++i) {
      const int s = i / 2, half = i % 2;
      const Tap *first = taps + at[s][half][0], *second = taps + at[s][half][kEach - 1];
      SDAN_UNROLL
      for (int k = 0; k < K; ++k) {
        if constexpr (D == 1)
          b[k][s][half] = first[k * kRow] | second[k * kRow];
        else
          b[k][s][half] = static_cast<uint32_t>(first[k * kRow]) << shift[s][half];
      }
    }
  }
};

// A warp has a quad of channels. grid: (image, image of its rows, tile; channels / lanes). Dynamic
// shared memory: a tile's planes, the results of 16 x 16 pixels, the taps.
template <typename T, int K, int D, int J>
__global__ void __launch_bounds__(kProductThreads,
                                  K == 9 ? 1 : 2)  // 9 rows of taps spill otherwise
    conv_mma_last_kernel(const T* __restrict__ x, const T* __restrict__ weight,
                         const T* __restrict__ bias, T* __restrict__ y, const LastProductParams p) {
  if constexpr (!kTaken<T, true>) return;
  using B = Band<K, D>;
  constexpr int S = 16;
  SDAN_DYNAMIC_SHARED(raw);
  auto* planes = reinterpret_cast<T*>(raw);
  auto* results = reinterpret_cast<uint32_t*>(planes + p.lanes * p.plane);
  const int result_row = S * p.pixel + 2;  // for the banks
  auto* taps = reinterpret_cast<typename BandTaps<K, D>::Tap*>(results + S * result_row);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const auto per_image = static_cast<unsigned>(D * p.tiles_y * p.tiles_x);
  const unsigned number = blockIdx.x / per_image;
  const int in_image = static_cast<int>(blockIdx.x - number * per_image),
            line = in_image / p.tiles_x, x0 = (in_image - line * p.tiles_x) * p.tile_w,
            image = line / p.tiles_y, y0 = (line - image * p.tiles_y) * p.tile_h;
  const int rows = (p.height - image + D - 1) / D;  // of the image; none, perhaps
  const int n = rows - y0 < p.tile_h ? rows - y0 : p.tile_h;
  if (n <= 0) return;
  const int c0 = static_cast<int>(blockIdx.y) * p.lanes,
            here = p.channels - c0 < p.lanes ? p.channels - c0 : p.lanes, quads = here / 4;
  const int64_t next = static_cast<int64_t>(D) * p.width * p.channels,
                base =
                    (static_cast<int64_t>(number) * p.height + image) * p.width * p.channels + c0;
  stage_planes(x + base, next, planes, p.pitch, p.plane, quads, p.channels, y0 - K / 2,
               x0 - B::kMargin, p.tile_h + K - 1, p.tile_w + 2 * B::kMargin, rows, p.width);
  BandTaps<K, D>::put(taps, weight + static_cast<int64_t>(c0) * K * K, p.flip, here);
  __syncthreads();

  const int quad = thread / 32, lane = thread % 32;
  const BandTaps<K, D> band(lane);
  const SharedAddress corner = shared_address(planes + block_row(lane, p.pitch));
  uint32_t* const to = results + lane / 4 * result_row + lane % 4 * 2 * p.pixel + 2 * quad;
  // A thread writes a quad of channels of a column of pixels.
  const int out_row = thread / (S * quads), rest = thread - out_row * S * quads,
            out_column = rest / quads, out_quad = rest - out_column * quads,
            abreast = threads / (S * quads);
  const uint32_t* const from = results + out_row * result_row + out_column * p.pixel + 2 * out_quad;
  T* const corner_y = y + base + (y0 + out_row) * next +
                      static_cast<int64_t>(x0 + out_column) * p.channels + 4 * out_quad;
  const int64_t bytes = abreast * next * static_cast<int>(sizeof(T));
  for (int down = 0; down < n; down += S) {
    for (int right = 0; right < p.tile_w && x0 + right < p.width; right += 8 * J) {
      float acc[4][1][J][4];
      if (quad < quads) {
        SDAN_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int c = 4 * quad + e;
          const float offset = bias ? load_one(bias + c0 + c) : 0.0f;
          SDAN_UNROLL
          for (int k = 0; k < 4 * J; ++k) acc[e][0][k / 4][k % 4] = offset;
          uint32_t b[K][B::kSteps][2];
          band.get(taps + c * BandTaps<K, D>::kEach * BandTaps<K, D>::kHalf, b);
          add_products<T, K, D, 1, J>(
              corner + (place_of(c, quads) * p.plane + down * p.pitch + right) * 2, 2 * p.pitch, b,
              acc[e]);
        }
      }
      SDAN_UNROLL
      for (int half = 0; half < J / 2; ++half) {
        if (quad < quads) {
          SDAN_UNROLL
          for (int i = 0; i < 8; ++i) {  // i % 4: an element of a product
            const int j = 2 * half + i / 4, at = i % 4;
            const uint32_t low = pack2<T>(acc[0][0][j][at], acc[1][0][j][at]),
                           high = pack2<T>(acc[2][0][j][at], acc[3][0][j][at]);
            *reinterpret_cast<uint64_t*>(to + at / 2 * 8 * result_row +
                                         (i / 4 * 8 + at % 2) * p.pixel) =
                static_cast<uint64_t>(high) << 32 | low;
          }
        }
        __syncthreads();
        if (out_row < abreast && x0 + right + S * half + out_column < p.width) {
          T* at = corner_y + down * next + static_cast<int64_t>(right + S * half) * p.channels;
          const uint32_t* pair = from;
          const int end = n - down < S ? n - down : S;
          for (int row = out_row; row < end; row += abreast) {
            const uint64_t v = *reinterpret_cast<const uint64_t*>(pair);
            Words<8> words;
            words.w[0] = static_cast<uint32_t>(v), words.w[1] = static_cast<uint32_t>(v >> 32);
            store_words<8>(at, words);
            at = bytes_on(at, bytes);
            pair += abreast * result_row;
          }
        }
        __syncthreads();
      }
    }
  }
}

}  // namespace sdan_fast::cuda
