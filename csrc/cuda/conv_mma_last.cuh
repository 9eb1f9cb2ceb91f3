// conv_mma for channels_last tensors: the same products, from planes that a block makes of its tile
// of the tensor while it stages it, and back to pixels through shared memory.
//
// A product's 16 rows are eight rows of two groups of eight columns beside each other, so that a
// low tile, whose halo costs little, still has rows that are loaded once for R outputs below each
// other. A warp computes a channel's whole tile at once: the taps come once, and the results take
// the place of the planes.
#pragma once

#include "conv_mma.cuh"

namespace sdan_fast::cuda {

// Sizes in elements; product_plan.h chooses them, and the instance.
struct LastProductParams {
  int32_t channels, height, width;
  int32_t flip;              // 1: correlate with the taps reversed (input gradient)
  int32_t lanes;             // channels of a block, a multiple of 4
  int32_t tiles_y, tiles_x;  // of each of the D images of an image
  int32_t plane;             // from a channel's plane to the next
};

// Where a block's channel c lies among its planes: the quads' first channels, then their second
// ones and so on, so that what the neighbours store is apart in the banks.
__device__ __forceinline__ int place_of(int c, int quads) {
  return c % 4 * quads + c / 4;
}

// Pairs of columns of a warp that stages planes of these quads of channels. For the banks planes
// lie an odd number of pair_span(quads) elements apart.
__host__ __device__ constexpr int pairs_abreast(int quads) {
  return quads > 4 ? 4 : 8;
}
__host__ __device__ constexpr int pair_span(int quads) {
  return 2 * pairs_abreast(quads);
}

// Reads a tile of pixels, `channels` elements from one to the next, into planes: columns [x, x +
// columns) and rows [y, y + total), which lie `next` elements apart; zeros outside the image. Rows
// that are R apart are neighbours in the planes. If Paired, columns i and i + 4 of each eight are
// neighbours as well, and stored as one word. A thread takes such a pair, four channels and four
// rows of it; its neighbours take the next channels, then the next columns.
template <int R, bool Paired, typename T>
__device__ __forceinline__ void stage_planes(const T* image, int64_t next, T* planes, int pitch,
                                             int plane, int quads, int channels, int y, int x,
                                             int total, int columns, int height, int width) {
  constexpr int kRows = 4;
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  const int pair = lane / quads, quad = lane - pair * quads, abreast = pairs_abreast(quads);
  if (pair >= abreast) return;
  const int groups = (columns + 2 * abreast - 1) / (2 * abreast),
            chunks = (total + kRows - 1) / kRows, per = (total + R - 1) / R, apart = quads * plane;
  const int64_t bytes = next * static_cast<int>(sizeof(T));
  for (int item = static_cast<int>(threadIdx.x) / 32; item < groups * chunks; item += warps) {
    const int chunk = item / groups, first = chunk * kRows,
              eight = (item - chunk * groups) * 2 * abreast + pair / 4 * 8, i = pair % 4,
              column = eight + i;
    const auto has = [&](int c) {
      return c < columns && static_cast<unsigned>(x + c) < static_cast<unsigned>(width);
    };
    const bool left = has(column), right = has(column + 4);
    const T* from =
        image + (y + first) * next + static_cast<int64_t>(x + column) * channels + 4 * quad;
    Words<8> v[kRows][2];
    SDAN_UNROLL
    for (int k = 0; k < kRows; ++k, from = bytes_on(from, bytes)) {
      const bool inside =
          static_cast<unsigned>(y + first + k) < static_cast<unsigned>(height) && first + k < total;
      v[k][0] = v[k][1] = Words<8>{};
      if (inside && left) v[k][0] = load_words<8>(from);
      if (inside && right) v[k][1] = load_words<8>(from + 4 * channels);
    }
    T* to = planes + quad * plane + (Paired ? eight + 2 * i : column);
    SDAN_UNROLL
    for (int k = 0; k < kRows; ++k) {
      const int row = first + k;
      if (row >= total) break;
      T* at = to + (row % R * per + row / R) * pitch;
      SDAN_UNROLL
      for (int e = 0; e < 4; ++e, at += apart) {
        const uint32_t a = v[k][0].w[e / 2], b = v[k][1].w[e / 2];
        if constexpr (Paired) {
          if (eight < columns)
            *reinterpret_cast<uint32_t*>(at) =
                e % 2 ? a >> 16 | (b & 0xffff0000u) : (a & 0xffffu) | b << 16;
        } else {
          if (column < columns) at[0].bits = static_cast<uint16_t>(a >> 16 * (e % 2));
          if (column + 4 < columns) at[4].bits = static_cast<uint16_t>(b >> 16 * (e % 2));
        }
      }
    }
  }
}

// A block's tile: 8 R rows, D apart, of 8 J columns.
template <int K_, int D_, int R_, int J_>
struct LastTile : Band<K_, D_> {
  using B = Band<K_, D_>;
  static constexpr int K = K_, D = D_, R = R_, J = J_;
  static constexpr int kRows = 8 * R, kColumns = 8 * J;
  static constexpr int kTotal = kRows + K - 1, kPer = (kTotal + R - 1) / R;  // staged rows
  static constexpr int kAcross = kColumns + 2 * B::kMargin;                  // staged columns
  static constexpr int kPitch = (kAcross + 7) / 16 * 16 + 8;  // an odd number of 8, for the banks
  static constexpr int kMet = B::kBlocks + J - 1;             // blocks of 8 columns that it meets
  static constexpr int kPlane = R * kPer * kPitch;
};

// A channel's taps in shared memory: for each of a row, and for none, all rows' beside each other.
template <int K, int D>
struct BandTaps {
  using B = Band<K, D>;
  static constexpr int kRows = (K + 7) / 8 * 8, kEach = (K + 1) * kRows, kBytes = 2 * kEach;
  // The elements of a register of the matrices of taps belong to columns 4 apart: both may be taps,
  // or one at most.
  static constexpr int kElements = 4 % D == 0 ? 2 : 1;

  int at[B::kSteps][2][kElements];  // this lane's elements
  int shift[B::kSteps][2];          // of one element: of which half

  template <typename T>
  static __device__ __forceinline__ void put(uint16_t* taps, const T* weight, int flip,
                                             int channels) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int i = thread; i < channels * kEach; i += threads) {
      const int c = i / kEach, kw = i / kRows % (K + 1), kh = i % kRows, k = kh * K + kw;
      const bool there = kw < K && kh < K;
      taps[i] = there ? weight[c * K * K + (flip ? K * K - 1 - k : k)].bits : uint16_t{0};
    }
  }

  __device__ __forceinline__ explicit BandTaps(int lane) {
    const int column = lane / 8 + lane / 4 % 2 * 4;  // of the output
    SDAN_UNROLL
    for (int i = 0; i < 4 * B::kSteps; ++i) {
      const int s = i / 4, half = i / 2 % 2, e = i % 2;
      const int offset = 16 * s + 8 * half + lane % 4 + 4 * e - column - B::kMargin + B::kHalo,
                tap = offset / D;
      const bool there = offset >= 0 && tap < K && offset % D == 0;
      if constexpr (kElements == 2)
        at[s][half][e] = (there ? tap : K) * kRows;
      else if (e == 0 || there)
        at[s][half][0] = (there ? tap : K) * kRows, shift[s][half] = 16 * e;
    }
  }

  // The elements of one channel, whose taps these are.
  __device__ __forceinline__ void get(const uint16_t* taps, uint32_t (&b)[K][B::kSteps][2]) const {
    SDAN_UNROLL
    for (int i = 0; i < 2 * B::kSteps; ++i) {
      const int s = i / 2, half = i % 2;
      uint32_t pairs[kElements][kRows / 2];  // of rows
      SDAN_UNROLL
      for (int n = 0; n < kElements * kRows / 8; ++n) {
        const int e = n / (kRows / 8), first = n % (kRows / 8) * 4;
        const uint4 v = reinterpret_cast<const uint4*>(taps + at[s][half][e])[first / 4];
        pairs[e][first] = v.x, pairs[e][first + 1] = v.y;
        pairs[e][first + 2] = v.z, pairs[e][first + 3] = v.w;
      }
      SDAN_UNROLL
      for (int k = 0; k < K; ++k) {
        const auto row = [&](int e) { return pairs[e][k / 2] >> 16 * (k % 2); };
        if constexpr (kElements == 2)
          b[k][s][half] = (row(0) & 0xffffu) | row(1) << 16;
        else
          b[k][s][half] = (row(0) & 0xffffu) << shift[s][half];
      }
    }
  }
};

// The blocks of 8 columns that eight rows of a tile meet, from this lane's address: of row lane % 8
// and the block lane / 8.
template <int First, int N>
__device__ __forceinline__ void get_row_blocks(SharedAddress from, uint32_t (&a)[N]) {
  constexpr int kHere = N - First >= 4 ? 4 : N - First >= 2 ? 2 : 1;
  uint32_t r[kHere];
  load_matrices<false, 16 * First>(from, r);
  SDAN_UNROLL
  for (int i = 0; i < kHere; ++i) a[First + i] = r[i];
  if constexpr (First + kHere < N) get_row_blocks<First + kHere>(from, a);
}

// Writes a tile's n rows of results from where stage_planes puts its first rows and columns.
template <int R, typename T>
__device__ __forceinline__ void store_planes(const T* planes, T* image, int64_t next, int pitch,
                                             int plane, int quads, int channels, int n,
                                             int columns) {
  constexpr int kRows = 4;
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  const int pair = lane / quads, quad = lane - pair * quads, abreast = pairs_abreast(quads);
  if (pair >= abreast) return;
  const int groups = (columns + 2 * abreast - 1) / (2 * abreast), chunks = (n + kRows - 1) / kRows,
            apart = quads * plane;
  const int64_t bytes = next * static_cast<int>(sizeof(T));
  for (int item = static_cast<int>(threadIdx.x) / 32; item < groups * chunks; item += warps) {
    const int chunk = item / groups, first = chunk * kRows,
              eight = (item - chunk * groups) * 2 * abreast + pair / 4 * 8, i = pair % 4,
              column = eight + i;
    if (column >= columns) continue;
    T* to = image + first * next + static_cast<int64_t>(column) * channels + 4 * quad;
    const T* from = planes + quad * plane + eight + 2 * i;
    SDAN_UNROLL
    for (int k = 0; k < kRows; ++k, to = bytes_on(to, bytes)) {
      const int row = first + k;
      if (row >= n) break;
      const T* at = from + (row % R * 8 + row / R) * pitch;
      uint32_t w[4];
      SDAN_UNROLL
      for (int e = 0; e < 4; ++e, at += apart) w[e] = *reinterpret_cast<const uint32_t*>(at);
      Words<8> left, right;
      SDAN_UNROLL
      for (int h = 0; h < 2; ++h) {
        left.w[h] = (w[2 * h] & 0xffffu) | w[2 * h + 1] << 16;
        right.w[h] = w[2 * h] >> 16 | (w[2 * h + 1] & 0xffff0000u);
      }
      store_words<8>(to, left);
      if (column + 4 < columns) store_words<8>(to + 4 * channels, right);
    }
  }
}

// A warp has a quad of channels. grid: (image, image of its rows, tile; channels / lanes). Dynamic
// shared memory: a tile's planes, and the taps.
template <typename T, int K, int D, int R, int J>
__global__ void __launch_bounds__(kProductThreads, 2)
    conv_mma_last_kernel(const T* __restrict__ x, const T* __restrict__ weight,
                         const T* __restrict__ bias, T* __restrict__ y, const LastProductParams p) {
  if constexpr (!kTaken<T, true>) return;
  using Tile = LastTile<K, D, R, J>;
  SDAN_DYNAMIC_SHARED(raw);
  auto* planes = reinterpret_cast<T*>(raw);
  auto* taps = reinterpret_cast<uint16_t*>(planes + p.lanes * p.plane);
  const auto per_image = static_cast<unsigned>(D * p.tiles_y * p.tiles_x);
  const unsigned number = blockIdx.x / per_image;
  const int in_image = static_cast<int>(blockIdx.x - number * per_image),
            line = in_image / p.tiles_x, x0 = (in_image - line * p.tiles_x) * Tile::kColumns,
            image = line / p.tiles_y, y0 = (line - image * p.tiles_y) * Tile::kRows;
  const int rows = (p.height - image + D - 1) / D;  // of the image; none, perhaps
  const int n = rows - y0 < Tile::kRows ? rows - y0 : Tile::kRows;
  if (n <= 0) return;
  const int c0 = static_cast<int>(blockIdx.y) * p.lanes,
            here = p.channels - c0 < p.lanes ? p.channels - c0 : p.lanes, quads = here / 4;
  const int64_t next = static_cast<int64_t>(D) * p.width * p.channels,
                base =
                    (static_cast<int64_t>(number) * p.height + image) * p.width * p.channels + c0;
  stage_planes<R, true>(x + base, next, planes, Tile::kPitch, p.plane, quads, p.channels,
                        y0 - K / 2, x0 - Tile::kMargin, Tile::kTotal, Tile::kAcross, rows, p.width);
  BandTaps<K, D>::put(taps, weight + static_cast<int64_t>(c0) * K * K, p.flip, here);
  __syncthreads();

  const int quad = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const BandTaps<K, D> band(lane);
  SDAN_UNROLL_BY(1)
  for (int c = 4 * quad; c < 4 * quad + 4 && c < here; ++c) {
    T* const plane = planes + place_of(c, quads) * p.plane;
    const SharedAddress corner = shared_address(plane + lane % 8 * Tile::kPitch + lane / 8 * 8);
    const float offset = bias ? load_one(bias + c0 + c) : 0.0f;
    float acc[R][J / 2][4];
    SDAN_UNROLL
    for (int k = 0; k < R * J * 2; ++k) acc[k / (2 * J)][k / 4 % (J / 2)][k % 4] = offset;
    uint32_t b[K][Tile::kSteps][2];
    band.get(taps + c * BandTaps<K, D>::kEach, b);
    SDAN_UNROLL
    for (int i = 0; i < R + K - 1; ++i) {
      uint32_t met[Tile::kMet];
      get_row_blocks<0>(corner + (i % R * Tile::kPer + i / R) * Tile::kPitch * 2, met);
      SDAN_UNROLL
      for (int r = 0; r < R; ++r) {
        if (i - r < 0 || i - r >= K) continue;
        SDAN_UNROLL
        for (int j = 0; j < J; j += 2) {
          SDAN_UNROLL
          for (int s = 0; s < Tile::kSteps; ++s) {
            uint32_t a[4] = {met[j + 2 * s], met[j + 1 + 2 * s], 0, 0};
            if (2 * s + 1 < Tile::kBlocks) a[2] = met[j + 2 * s + 1], a[3] = met[j + 2 + 2 * s];
            multiply_add<T>(acc[r][j / 2], a, b[i - r][s]);
          }
        }
      }
    }
    __syncwarp();  // all of the plane has been read
    T* to = plane + lane / 4 * Tile::kPitch + lane % 4 * 2;
    SDAN_UNROLL
    for (int r = 0; r < R; ++r, to += 8 * Tile::kPitch) {
      SDAN_UNROLL
      for (int j = 0; j < J; ++j)
        *reinterpret_cast<uint32_t*>(to + 8 * j) =
            pack2<T>(acc[r][j / 2][j % 2 * 2], acc[r][j / 2][j % 2 * 2 + 1]);
    }
  }
  __syncthreads();
  const int columns = p.width - x0 < Tile::kColumns ? p.width - x0 : Tile::kColumns;
  store_planes<R>(planes, y + base + y0 * next + static_cast<int64_t>(x0) * p.channels, next,
                  Tile::kPitch, p.plane, quads, p.channels, n, columns);
}

}  // namespace sdan_fast::cuda
