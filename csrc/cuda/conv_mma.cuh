// Depth-wise convolution with a square of K x K taps, dilation D, in 16 bits on tensor cores, and
// its input gradient (the taps reversed).
//
// A row of taps takes a row of the image to a row of outputs: eight outputs beside each other are a
// product of the columns that they meet and a matrix with the taps along its diagonals, zeros
// elsewhere. So 16 rows by 8 columns of outputs are, for each row of taps, a product of 16 rows of
// the image and that matrix, which is the same everywhere and stays in registers. Half of it or
// more is zeros, and yet 7 x 7 takes 7 products (14 where it is dilated by 4) instead of 196 FMAs,
// and 16-bit elements are multiplied as they are staged, unconverted. Products of 16-bit values are
// exact in float32, and so are the sums' types. What is not finite spreads by a few columns, as
// zeros times infinity are.
//
// The rows of a product lie R apart, so that rows of the image that are loaded once serve R outputs
// below each other.
#pragma once

#include "mma.cuh"
#include "quad_tile.cuh"

namespace sdan_fast::cuda {

constexpr int kProductThreads = 256;

// Kernels that a GPU does not take are empty there: sm_75 has no tensor cores for bfloat16, and no
// shared memory for channels_last tiles.
#if SDAN_DEVICE_PASS && __CUDA_ARCH__ < 800
template <typename T, bool Last>
constexpr bool kTaken = std::is_same_v<T, float16> && !Last;
#else
template <typename T, bool Last>
constexpr bool kTaken = true;
#endif

// The columns that 8 outputs meet, in blocks of 8, beginning kMargin before the first.
template <int K, int D>
struct Band {
  static constexpr int kTaps = K, kDilation = D;
  static constexpr int kHalo = K / 2 * D, kMargin = (kHalo + 3) / 4 * 4;
  static constexpr int kBlocks = (8 + kMargin + kHalo + 7) / 8, kSteps = (kBlocks + 1) / 2;
  // Words of the taps of a row with zeros around, twice: pairs that begin with an even element, and
  // with an odd one.
  static constexpr int kWords = 8 * kSteps + 4, kTable = K * 2 * kWords;  // a multiple of 4
};

// The table of a channel's taps in shared memory.
template <int K, int D, typename T>
__device__ __forceinline__ void put_bands(uint32_t* table, const T* weight, int flip, int thread,
                                          int threads) {
  using B = Band<K, D>;
  for (int i = thread; i < B::kTable; i += threads) {
    const int kh = i / (2 * B::kWords), odd = i / B::kWords % 2, word = i % B::kWords;
    uint32_t pair = 0;
    SDAN_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int at = 2 * word + odd + e - 7 - B::kMargin + B::kHalo, kw = at / D, k = kh * K + kw;
      if (at >= 0 && kw < K && at % D == 0)
        pair |= static_cast<uint32_t>(weight[flip ? K * K - 1 - k : k].bits) << 16 * e;
    }
    table[i] = pair;
  }
}

// This lane's elements of the matrices of taps.
template <int K, int D>
__device__ __forceinline__ void get_bands(const uint32_t* table, int lane,
                                          uint32_t (&b)[K][Band<K, D>::kSteps][2]) {
  using B = Band<K, D>;
  const int first = lane % 4 * 2 + 7 - lane / 4, odd = first % 2;
  table += odd * B::kWords + first / 2;
  SDAN_UNROLL
  for (int k = 0; k < K; ++k) {
    SDAN_UNROLL
    for (int s = 0; s < B::kSteps; ++s) {
      b[k][s][0] = table[2 * k * B::kWords + 8 * s];
      b[k][s][1] = table[2 * k * B::kWords + 8 * s + 4];
    }
  }
}

// Where this lane's row of the first two blocks of 16 x 8 elements lies, in elements.
__device__ __forceinline__ int block_row(int lane, int pitch) {
  return lane % 16 * pitch + lane / 16 * 8;
}

template <bool Transposed, int First, int N>
__device__ __forceinline__ void get_blocks(SharedAddress from, uint32_t (&a)[N][2]) {
  if constexpr (First + 1 < N) {
    uint32_t r[4];
    load_matrices<Transposed, 16 * First>(from, r);
    a[First][0] = r[0], a[First][1] = r[1], a[First + 1][0] = r[2], a[First + 1][1] = r[3];
    get_blocks<Transposed, First + 2>(from, a);
  } else if constexpr (First < N) {
    load_matrices<Transposed, 16 * First>(from, a[First]);
  }
}

// Adds to 16 R rows of 8 J outputs: acc[r][j] are rows r, r + R, ... and the j-th 8 columns. from:
// this lane's address of the columns that the first output meets (block_row, rows R apart); next:
// bytes to the next row.
template <typename T, int K, int D, int R, int J>
__device__ __forceinline__ void add_products(SharedAddress from, int next,
                                             const uint32_t (&b)[K][Band<K, D>::kSteps][2],
                                             float (&acc)[R][J][4]) {
  using B = Band<K, D>;
  SDAN_UNROLL
  for (int i = 0; i < R + K - 1; ++i, from += next) {
    uint32_t blocks[B::kBlocks + J - 1][2];
    get_blocks<false, 0>(from, blocks);
    SDAN_UNROLL
    for (int r = 0; r < R; ++r) {
      if (i - r < 0 || i - r >= K) continue;
      SDAN_UNROLL
      for (int j = 0; j < J; ++j) {
        SDAN_UNROLL
        for (int s = 0; s < B::kSteps; ++s) {
          uint32_t a[4] = {blocks[j + 2 * s][0], blocks[j + 2 * s][1], 0, 0};
          if (2 * s + 1 < B::kBlocks)
            a[2] = blocks[j + 2 * s + 1][0], a[3] = blocks[j + 2 * s + 1][1];
          multiply_add<T>(acc[r][j], a, b[i - r][s]);
        }
      }
    }
  }
}

// Products beside each other of a warp: more of them read less, where rows have no use in common.
__host__ __device__ constexpr int products_across(int r) {
  return r == 1 ? 4 : 2;
}

// Sizes in elements; product_plan.h chooses the tiles.
struct ProductParams {
  int32_t channels, height, width;
  int32_t flip;              // 1: correlate with the taps reversed (input gradient)
  int32_t wide;              // 1: rows of the tensors begin at multiples of 4 elements
  int32_t tile_h, tile_w;    // outputs of a tile, of whole products; its rows are D apart
  int32_t tiles_y, tiles_x;  // of each of the D images of a plane
  int32_t images;            // of a block
  int32_t pitch;             // of staged rows; an odd number of 8 elements, for the banks
};

// A thread's share of a tile: a column of quads, rows first, first + abreast, ... of `total`, which
// the image has from `low` to `high`; `there` elements of a quad. from: row 0's elements.
template <bool Wide, typename T>
__device__ __forceinline__ void copy_quads(const T* from, int64_t next, T* to, int pitch, int first,
                                           int abreast, int low, int high, int total, int there) {
  const auto clear = [&](int end) {
    SDAN_UNROLL_BY(1)
    for (; first < end; first += abreast, to += abreast * pitch)
      *reinterpret_cast<uint64_t*>(to) = 0;
  };
  to += first * pitch;
  clear(there > 0 ? low : total);
  from += first * next;
  const int64_t bytes = abreast * next * static_cast<int>(sizeof(T));
  SDAN_UNROLL_BY(4)
  for (; first < high; first += abreast, to += abreast * pitch) {
    if constexpr (Wide) {
      cp_async<8>(to, from);
    } else {
      uint64_t quad = 0;
      SDAN_UNROLL
      for (int e = 0; e < 4; ++e)
        if (e < there) quad |= static_cast<uint64_t>(from[e].bits) << 16 * e;
      *reinterpret_cast<uint64_t*>(to) = quad;
    }
    from = bytes_on(from, bytes);
  }
  clear(total);
}

// The lanes' elements of a row of 16 outputs, each with 2 of either 8 columns, as a quad of
// neighbours each: that at column quad_column(lane).
template <typename T>
__device__ __forceinline__ Words<8> quad_of(const float (&left)[2], const float (&right)[2]) {
  const bool odd = threadIdx.x & 1;
  const uint32_t a = pack2<T>(left[0], left[1]), b = pack2<T>(right[0], right[1]);
  const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? a : b, 1);
  Words<8> quad;
  quad.w[0] = odd ? other : a, quad.w[1] = odd ? b : other;
  return quad;
}

__device__ __forceinline__ int quad_column(int lane) {
  return lane % 2 * 8 + lane / 2 % 2 * 4;
}

// As conv_square: a block takes a tile of an image of rows D apart, or the same tile of several of
// them. grid: (plane, images of its rows, tile). Dynamic shared memory: the table of taps, a tile
// for each image.
template <typename T, int K, int D, int R>
__global__ void __launch_bounds__(kProductThreads, K == 9 && D > 1 ? 1 : 2)  // spills otherwise
    conv_mma_kernel(const T* __restrict__ x, const T* __restrict__ weight,
                    const T* __restrict__ bias, T* __restrict__ y, const ProductParams p) {
  if constexpr (!kTaken<T, false>) return;
  using B = Band<K, D>;
  SDAN_DYNAMIC_SHARED(raw);
  auto* table = reinterpret_cast<uint32_t*>(raw);
  auto* tile = reinterpret_cast<T*>(table + B::kTable);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const auto per_plane =
      static_cast<unsigned>((D + p.images - 1) / p.images * p.tiles_y * p.tiles_x);
  const unsigned plane = blockIdx.x / per_plane;
  const int in_plane = static_cast<int>(blockIdx.x - plane * per_plane),
            c = static_cast<int>(plane % static_cast<unsigned>(p.channels));
  const int line = in_plane / p.tiles_x, x0 = (in_plane - line * p.tiles_x) * p.tile_w,
            image = line / p.tiles_y,  // their first, in groups
      y0 = (line - image * p.tiles_y) * p.tile_h, first_image = image * p.images;
  const auto rows_of = [&](int i) {  // of an image, below the tile's first; none, perhaps
    return i < D ? (p.height - i + D - 1) / D - y0 : 0;
  };
  if (rows_of(first_image) <= 0) return;
  const int64_t base = (static_cast<int64_t>(plane) * p.height + first_image) * p.width + x0,
                next = static_cast<int64_t>(D) * p.width;
  const int total = p.tile_h + K - 1, section = total * p.pitch;  // of a staged image
  // Threads beyond the margins are idle, so that the reads of a warp end with a sector.
  constexpr int kBefore = (B::kMargin + 15) / 16 * 16;
  const int across = (p.tile_w + 2 * kBefore) / 4,
            abreast = threads < across ? 1 : threads / across, first_row = thread / across;
  if (thread < abreast * across) {
    // More than one column of quads for a thread only where rows are long.
    for (int q = thread - first_row * across; q < across; q += threads) {
      const int column = 4 * q - kBefore, there = x0 + column < 0 ? 0 : p.width - x0 - column;
      if (column < -B::kMargin || column >= p.tile_w + B::kMargin) continue;
      constexpr int halo = K / 2;
      const T* from = x + base + (y0 - halo) * next + column;
      T* to = tile + B::kMargin + column;
      SDAN_UNROLL_BY(1)
      for (int i = 0; i < p.images; ++i, from += p.width, to += section) {
        const int rows = rows_of(first_image + i) + halo, low = y0 > halo ? 0 : halo - y0,
                  high = rows < total ? rows : total;
        if (rows <= halo) break;
        if (p.wide)
          copy_quads<true>(from, next, to, p.pitch, first_row, abreast, low, high, total, there);
        else
          copy_quads<false>(from, next, to, p.pitch, first_row, abreast, low, high, total, there);
      }
    }
  }
  cp_async_commit();
  put_bands<K, D>(table, weight + static_cast<int64_t>(c) * K * K, p.flip, thread, threads);
  const float offset = bias ? load_one(bias + c) : 0.0f;
  cp_async_wait<0>();
  __syncthreads();

  constexpr int J = products_across(R), S = 16;
  const int lane = thread % 32, units_x = p.tile_w / (8 * J),
            per_image = p.tile_h / (S * R) * units_x;
  uint32_t b[K][B::kSteps][2];
  get_bands<K, D>(table, lane, b);
  const SharedAddress corner = shared_address(tile + block_row(lane, R * p.pitch));
  const int row = lane / 4 * R, column = quad_column(lane);
  T* const to = y + base + (y0 + row) * next + column;
  const int64_t bytes = next * static_cast<int>(sizeof(T));
  for (int unit = thread / 32; unit < p.images * per_image; unit += threads / 32) {
    const int i = D == 1 ? 0 : unit / per_image, in_image = unit - i * per_image,
              along = in_image / units_x;
    const int down = along * S * R, right = (in_image - along * units_x) * 8 * J;
    const int n = rows_of(first_image + i);
    const int left = n - row - down, there = p.width - x0 - column - right;
    if (n <= down || p.width - x0 <= right) continue;
    float acc[R][J][4];
    SDAN_UNROLL
    for (int k = 0; k < R * J * 4; ++k) acc[k / (4 * J)][k / 4 % J][k % 4] = offset;
    add_products<T, K, D, R, J>(corner + (i * section + down * p.pitch + right) * 2, 2 * p.pitch, b,
                                acc);
    T* at = to + (down * next + i * p.width + right);
    SDAN_UNROLL
    for (int half = 0; half < 2; ++half) {
      SDAN_UNROLL
      for (int r = 0; r < R; ++r) {
        SDAN_UNROLL
        for (int j = 0; j < J; j += 2) {
          const float first[2] = {acc[r][j][2 * half], acc[r][j][2 * half + 1]},
                      second[2] = {acc[r][j + 1][2 * half], acc[r][j + 1][2 * half + 1]};
          const Words<8> quad = quad_of<T>(first, second);
          if (8 * R * half + r >= left || there <= 8 * j) continue;
          if (p.wide) {
            store_words<8>(at + 8 * j, quad);
          } else {
            SDAN_UNROLL
            for (int e = 0; e < 4; ++e)
              if (e < there - 8 * j)
                at[8 * j + e].bits = static_cast<uint16_t>(quad.w[e / 2] >> 16 * (e % 2));
          }
        }
        at = bytes_on(at, bytes);
      }
      at = bytes_on(at, 7 * R * bytes);
    }
  }
}

}  // namespace sdan_fast::cuda
