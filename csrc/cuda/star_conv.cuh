// The tail of star_conv: y = outer(GELU(DW3x3(p) + bias) * b), where p and b are the two 1x1
// products, and its gradients. Nothing but y is written, nothing between the steps leaves the
// registers.
//
// A thread owns V neighbouring elements (pixels of contiguous tensors, channels of channels_last
// ones) and walks down `rows` output rows. Each input row is read once; it is added to the three
// output rows that it belongs to, of which only two are open at a time.
//   contiguous     the columns to the left and right of a thread's pixels are a shuffle away; the
//                  backward gives each warp one thread of overlap on both sides, whose gradients
//                  are computed twice rather than exchanged
//   channels_last  the neighbouring columns are other threads' vectors: p comes again from L1, the
//                  gradients of a go through shared memory
// Backward forms a = DW3x3(p) + bias again. Weight and bias gradients stay in registers over all of
// a block's rows, and leave as one partial sum per block; sum_parts adds those.
#pragma once

#include "activation.cuh"
#include "conv_tile.cuh"
#include "star.cuh"

namespace sdan_fast::cuda {

constexpr int kStarConvThreads = 256, kStarConvWarps = kStarConvThreads / 32;
// Of the channels_last backward, at most: 168 registers each, or 255.
template <typename T>
constexpr int star_conv_last_threads = is_16bit<T> ? 384 : 256;
constexpr int kStarConvOwners = 30;  // threads of a warp that own something, in the backward
constexpr int kStarConvSums = 10;    // 9 taps and the bias

// p, b and their gradients are slices of wider tensors: `step` elements lie between two images of
// contiguous ones, and two pixels of channels_last ones. y and its gradient are dense.
struct StarConvParams {
  int64_t images, step;
  int32_t channels, height, width;
  int32_t rows;              // output rows of a thread
  int32_t splits;            // blocks that share a plane (backward of contiguous tensors)
  int32_t columns, vectors;  // channels_last backward: threads of a block along W, and along C
  int32_t outer;
  int32_t bands;  // channels_last forward: groups of rows of a block, below each other
};

// Where a thread of the contiguous kernels is: `items` walk along W first, then down the groups of
// `rows` rows of a plane.
struct StarConvItem {
  int q, row;  // vector of the row, first output row
  bool live, first, last;
  __device__ __forceinline__ StarConvItem(const StarConvParams& s, int v, int item) {
    const int across = s.width / v, groups = (s.height + s.rows - 1) / s.rows;
    live = item >= 0 && item < across * groups;
    const int at = live ? item : 0;
    q = at % across;
    row = at / across * s.rows;
    first = q == 0;
    last = q == across - 1;
  }
};

__device__ __forceinline__ int star_conv_items(const StarConvParams& s, int v) {
  return s.width / v * ((s.height + s.rows - 1) / s.rows);
}

// V values, zero if not `inside`.
template <typename T, int V>
__device__ __forceinline__ void load_or_zero(const T* p, bool inside, float (&v)[V]) {
  if (inside) {
    load<V>(p, v);
  } else {
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) v[e] = 0;
  }
}

// x = v with its two neighbours along W, zero beyond the image. Every thread of the warp calls it.
// The neighbours of the warp's first and last thread are left_edge and right_edge.
template <int V>
__device__ __forceinline__ void with_neighbours(const float (&v)[V], const StarConvItem& at,
                                                float left_edge, float right_edge,
                                                float (&x)[V + 2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float left = __shfl_up_sync(0xffffffffu, v[V - 1], 1);
  const float right = __shfl_down_sync(0xffffffffu, v[0], 1);
  x[0] = at.first ? 0.0f : lane == 0 ? left_edge : left;
  x[V + 1] = at.last ? 0.0f : lane == 31 ? right_edge : right;
  SDAN_UNROLL
  for (int e = 0; e < V; ++e) x[e + 1] = v[e];
}

// acc += a row of three taps over x.
template <int V>
__device__ __forceinline__ void add_taps(const float* w, const float (&x)[V + 2], float (&acc)[V]) {
  SDAN_UNROLL
  for (int k = 0; k < 3; ++k) {
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) acc[e] = fmaf(w[k], x[e + k], acc[e]);
  }
}

// y = outer(GELU(a) * b), in place of a.
template <typename T, int V>
__device__ __forceinline__ void store_star(T* y, float (&a)[V], const float (&b)[V], int outer) {
  SDAN_UNROLL
  for (int e = 0; e < V; ++e) a[e] = gelu<is_16bit<T>>(a[e]) * b[e];
  activate<is_16bit<T>>(outer, a);
  store<V>(y, a);
}

// ---- contiguous

// grid: any number of blocks. V divides the width, and all rows are aligned to V elements.
template <typename T, int V>
__global__ void __launch_bounds__(kStarConvThreads, 1)
    star_conv_forward_kernel(const T* __restrict__ p, const T* __restrict__ b,
                             const T* __restrict__ weight, const T* __restrict__ bias,
                             T* __restrict__ y, const StarConvParams s) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int items = star_conv_items(s, V);
  const int64_t blocks = (items + kStarConvThreads - 1) / kStarConvThreads;
  const int64_t pixels = static_cast<int64_t>(s.height) * s.width;
  for (int64_t block = blockIdx.x; block < blocks * s.images * s.channels; block += gridDim.x) {
    const Quotient of_planes(block, blocks), of_images(of_planes.whole, s.channels);
    const int item =
        static_cast<int>(of_planes.rest) * kStarConvThreads + static_cast<int>(threadIdx.x);
    if (item - lane >= items) continue;  // a warp beyond the plane
    const StarConvItem at(s, V, item);
    const int64_t plane = of_planes.whole, c = of_images.rest;
    const int64_t in = of_images.whole * s.step + c * pixels + at.q * V,
                  out = plane * pixels + at.q * V;
    float w[9];
    SDAN_UNROLL
    for (int k = 0; k < 9; ++k) w[k] = load_one(weight + c * 9 + k);
    const float shift = bias ? load_one(bias + c) : 0.0f;
    float next[V], second[V], third[V];  // outputs that wait for two more rows, and for one
    load_or_zero<T, V>(p + in + (at.row - 1) * int64_t{s.width}, at.live && at.row > 0, next);
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) second[e] = third[e] = 0;
    for (int k = 0; k < s.rows + 2; ++k) {
      const int r = at.row - 1 + k;
      const int64_t from = in + r * int64_t{s.width};
      const bool inside = at.live && r >= 0 && r < s.height;
      const bool writes = at.live && k >= 2 && r - 1 < s.height;
      float x[V + 2], vb[V], left = 0, right = 0;
      if (inside && lane == 0 && !at.first) left = load_one(p + from - 1);
      if (inside && lane == 31 && !at.last) right = load_one(p + from + V);
      with_neighbours<V>(next, at, left, right, x);
      load_or_zero<T, V>(p + from + s.width, at.live && r + 1 < s.height && k < s.rows + 1, next);
      load_or_zero<T, V>(b + from - s.width, writes, vb);
      add_taps<V>(w + 6, x, third);
      float a[V];
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) a[e] = third[e], third[e] = second[e], second[e] = shift;
      add_taps<V>(w + 3, x, third);
      add_taps<V>(w, x, second);
      if (writes) store_star<T, V>(y + out + (r - 1) * int64_t{s.width}, a, vb, s.outer);
    }
  }
}

// grad_p and grad_b may be null together; partial, if not null, gets partial[plane][split][10]: the
// sums for the 9 taps and the bias. grid: images * channels * splits, or any part of it with a
// stride.
template <typename T, int V>
__global__ void __launch_bounds__(kStarConvThreads, 2)
    star_conv_backward_kernel(const T* __restrict__ grad, const T* __restrict__ p,
                              const T* __restrict__ b, const T* __restrict__ weight,
                              const T* __restrict__ bias, T* __restrict__ grad_p,
                              T* __restrict__ grad_b, float* __restrict__ partial,
                              const StarConvParams s) {
  constexpr bool kCoarse = is_16bit<T>;
  SDAN_SHARED(float, sums, [kStarConvWarps][kStarConvSums]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int items = star_conv_items(s, V);
  constexpr int kPerBlock = kStarConvWarps * kStarConvOwners;
  const int64_t pixels = static_cast<int64_t>(s.height) * s.width;
  for (int64_t block = blockIdx.x; block < s.images * s.channels * s.splits; block += gridDim.x) {
    const int64_t plane = block / s.splits, image = plane / s.channels;
    const int c = static_cast<int>(plane % s.channels);
    float w[9], acc[kStarConvSums];
    SDAN_UNROLL
    for (int k = 0; k < 9; ++k) w[k] = load_one(weight + c * int64_t{9} + k);
    const float shift = bias ? load_one(bias + c) : 0.0f;
    SDAN_UNROLL
    for (int k = 0; k < kStarConvSums; ++k) acc[k] = 0;
    for (int first = static_cast<int>(block % s.splits) * kPerBlock; first < items;
         first += s.splits * kPerBlock) {
      if (first + warp * kStarConvOwners >= items) break;  // a warp beyond the plane
      const StarConvItem at(s, V, first + warp * kStarConvOwners + lane - 1);
      const bool owner = at.live && lane > 0 && lane < 31;
      const int64_t in = image * s.step + c * pixels + at.q * V, dense = plane * pixels + at.q * V;
      // Three rows of p, and two open rows of its gradient.
      float x[3][V + 2], second[V], third[V];
      SDAN_UNROLL
      for (int i = 0; i < 3; ++i) {
        SDAN_UNROLL
        for (int e = 0; e < V + 2; ++e) x[i][e] = 0;
      }
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) second[e] = third[e] = 0;
      for (int k = 0; k < s.rows + 4; ++k) {
        const int r = at.row - 2 + k, ra = r - 1;  // the row of p that arrives, and that of a
        const int64_t from = in + r * int64_t{s.width};
        const bool inside = at.live && r >= 0 && r < s.height;
        const bool has_a = at.live && k >= 2 && ra >= 0 && ra < s.height;
        const bool own = owner && has_a && k >= 3 && k < s.rows + 3;
        float v[V], g[V], vb[V], left = 0, right = 0;
        load_or_zero<T, V>(p + from, inside, v);
        load_or_zero<T, V>(b + from - s.width, has_a, vb);
        load_or_zero<T, V>(grad + dense + ra * int64_t{s.width}, has_a, g);
        if (inside && lane == 0 && !at.first) left = load_one(p + from - 1);
        if (inside && lane == 31 && !at.last) right = load_one(p + from + V);
        SDAN_UNROLL
        for (int e = 0; e < V + 2; ++e) x[0][e] = x[1][e], x[1][e] = x[2][e];
        with_neighbours<V>(v, at, left, right, x[2]);
        if (k < 2) continue;  // three rows of p make the first one of a
        float a[V];
        SDAN_UNROLL
        for (int e = 0; e < V; ++e) a[e] = shift;
        SDAN_UNROLL
        for (int i = 0; i < 3; ++i) add_taps<V>(w + 3 * i, x[i], a);
        star_gradients<kCoarse>(g, a, vb, kGelu, s.outer);  // zero where g is: beyond the image
        if (own && grad_b) store<V>(grad_b + from - s.width, a);
        SDAN_UNROLL
        for (int e = 0; e < V; ++e) {
          if (!has_a) vb[e] = 0;
          if (own) acc[9] += vb[e];
        }
        if (partial && own) {
          SDAN_UNROLL
          for (int i = 0; i < 9; ++i) {
            SDAN_UNROLL
            for (int e = 0; e < V; ++e) acc[i] = fmaf(vb[e], x[i / 3][e + i % 3], acc[i]);
          }
        }
        if (!grad_p) continue;
        float ga[V + 2], done[V];
        with_neighbours<V>(vb, at, 0.0f, 0.0f, ga);
        // The taps reversed: row ra of the gradient of a goes to rows ra - 1 .. ra + 1 of that of
        // p.
        const float flipped[9] = {w[2], w[1], w[0], w[5], w[4], w[3], w[8], w[7], w[6]};
        add_taps<V>(flipped, ga, third);
        SDAN_UNROLL
        for (int e = 0; e < V; ++e) done[e] = third[e], third[e] = second[e], second[e] = 0;
        add_taps<V>(flipped + 3, ga, third);
        add_taps<V>(flipped + 6, ga, second);
        if (owner && k >= 4 && ra - 1 < s.height) store<V>(grad_p + from - 2 * s.width, done);
      }
    }
    if (!partial) continue;
    __syncthreads();  // the sums of the round before have been read
    SDAN_UNROLL
    for (int k = 0; k < kStarConvSums; ++k) {
      acc[k] = warp_sum(acc[k]);
      if (lane == 0) sums[warp][k] = acc[k];
    }
    __syncthreads();
    if (threadIdx.x < kStarConvSums) {
      float total = 0;
      SDAN_UNROLL
      for (int i = 0; i < kStarConvWarps; ++i) total += sums[i][threadIdx.x];
      partial[block * kStarConvSums + threadIdx.x] = total;
    }
  }
}

// ---- channels_last

// The 9 taps of V channels, which lie one after the other.
template <typename T, int V>
__device__ __forceinline__ void load_taps(const T* weight, int c, float (&w)[9][V]) {
  float flat[9 * V];
  SDAN_UNROLL
  for (int i = 0; i < 9; ++i) {
    float v[V];
    load<V>(weight + c * int64_t{9} + i * V, v);
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) flat[i * V + e] = v[e];
  }
  SDAN_UNROLL
  for (int k = 0; k < 9; ++k) {
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) w[k][e] = flat[e * 9 + k];
  }
}

template <int V>
__device__ __forceinline__ void add_product(const float (&w)[V], const float (&x)[V],
                                            float (&acc)[V]) {
  SDAN_UNROLL
  for (int e = 0; e < V; ++e) acc[e] = fmaf(w[e], x[e], acc[e]);
}

// A block takes neighbouring vectors of `bands` groups of rows below each other, which share their
// halos. grid: any number of blocks. V divides the channels, and pixels are aligned to V elements.
template <typename T, int V>
__global__ void __launch_bounds__(kStarConvThreads, 1)
    star_conv_last_kernel(const T* __restrict__ p, const T* __restrict__ b,
                          const T* __restrict__ weight, const T* __restrict__ bias,
                          T* __restrict__ y, const StarConvParams s) {
  const int vectors = s.channels / V, rows = s.rows * s.bands,
            stripes = (s.height + rows - 1) / rows, items = kStarConvThreads / s.bands,
            band = static_cast<int>(threadIdx.x) / items;
  const int64_t per_image = static_cast<int64_t>(vectors) * s.width * stripes,
                stride = static_cast<int64_t>(gridDim.x) * items;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * items + threadIdx.x % items;
       item < per_image * s.images; item += stride) {
    const int64_t image = item / per_image, in_image = item % per_image;
    const int c = static_cast<int>(in_image % vectors) * V;
    const int column = static_cast<int>(in_image / vectors % s.width);
    const int row = static_cast<int>(in_image / vectors / s.width) * rows + band * s.rows;
    if (row >= s.height) continue;
    float w[9][V], shift[V], second[V], third[V];
    load_taps<T, V>(weight, c, w);
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) {
      shift[e] = bias ? load_one(bias + c + e) : 0.0f;
      second[e] = third[e] = 0;
    }
    const int64_t pixel = (image * s.height + row - 1) * s.width + column,
                  behind = pixel - s.width;  // of the row that is ready
    const T *from = p + pixel * s.step + c, *gate = b + behind * s.step + c;
    T* to = y + behind * s.channels + c;
    const int64_t next = s.step * s.width, next_y = int64_t{s.channels} * s.width;
    const bool left = column > 0, right = column + 1 < s.width;
    const int end = s.height - row < s.rows ? s.height - row + 2 : s.rows + 2;
    for (int k = 0; k < end; ++k) {
      const bool inside = static_cast<unsigned>(row - 1 + k) < static_cast<unsigned>(s.height);
      float x[3][V], a[V], vb[V];
      load_or_zero<T, V>(from - s.step, inside && left, x[0]);
      load_or_zero<T, V>(from, inside, x[1]);
      load_or_zero<T, V>(from + s.step, inside && right, x[2]);
      load_or_zero<T, V>(gate, k >= 2, vb);
      T* const out = to;
      from += next, gate += next, to += next_y;
      SDAN_UNROLL
      for (int i = 0; i < 3; ++i) add_product<V>(w[6 + i], x[i], third);
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) a[e] = third[e], third[e] = second[e], second[e] = shift[e];
      SDAN_UNROLL
      for (int i = 0; i < 3; ++i) {
        add_product<V>(w[3 + i], x[i], third);
        add_product<V>(w[i], x[i], second);
      }
      if (k >= 2) store_star<T, V>(out, a, vb, s.outer);
    }
  }
}

// A block is a tile, blockIdx.x: s.columns neighbouring columns, the outer two of which only help,
// and s.rows rows, by s.vectors vectors of channels (blockIdx.y counts these). The other arguments
// are those of star_conv_backward_kernel; partial is [blockIdx.x][channel][10]. Dynamic shared
// memory: kStarConvSums * V * (blockDim.x + s.vectors) floats.
template <typename T, int V>
__global__ void __launch_bounds__(star_conv_last_threads<T>, 1)
    star_conv_backward_last_kernel(const T* __restrict__ grad, const T* __restrict__ p,
                                   const T* __restrict__ b, const T* __restrict__ weight,
                                   const T* __restrict__ bias, T* __restrict__ grad_p,
                                   T* __restrict__ grad_b, float* __restrict__ partial,
                                   const StarConvParams s) {
  constexpr bool kCoarse = is_16bit<T>;
  SDAN_DYNAMIC_SHARED(raw);
  auto* shared = reinterpret_cast<float*>(raw);
  const int t = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int c = (static_cast<int>(blockIdx.y) * s.vectors + t % s.vectors) * V;
  const int lane = t / s.vectors;  // along W
  const bool channel = lane < s.columns && c < s.channels;
  const int tiles_x = (s.width + s.columns - 3) / (s.columns - 2),
            groups = (s.height + s.rows - 1) / s.rows;
  // The bias waits in shared memory behind the buffers of exchange, for each thread by itself:
  // registers are few enough for star_conv_last_threads then.
  float* own_bias = shared + 2 * threads * V;
  float w[9][V], acc[kStarConvSums][V], shift[V];
  SDAN_UNROLL
  for (int e = 0; e < V; ++e) {
    shift[e] = channel && bias ? load_one(bias + c + e) : 0.0f;
    SDAN_UNROLL
    for (int k = 0; k < 9; ++k) w[k][e] = 0;
    SDAN_UNROLL
    for (int k = 0; k < kStarConvSums; ++k) acc[k][e] = 0;
  }
  put_vector<V>(own_bias, t, shift);
  if (channel) load_taps<T, V>(weight, c, w);
  const int tile = static_cast<int>(blockIdx.x);
  const int column = tile % tiles_x * (s.columns - 2) + lane - 1;
  const int row = tile / tiles_x % groups * s.rows;
  const bool live = channel && column >= 0 && column < s.width;
  const bool owner = live && lane > 0 && lane < s.columns - 1;
  const bool left = live && column > 0, right = live && column + 1 < s.width;
  // At each step row r of p arrives, row r - 1 of a and of its gradient is made, and row r - 2 of
  // the gradient of p is ready. The first r is row - 2; `at` is row r - 1, and a row before that.
  const int64_t next = s.step * s.width, next_g = int64_t{s.channels} * s.width;
  const int64_t pixel =
      (static_cast<int64_t>(tile / tiles_x / groups) * s.height + row - 4) * s.width + column;
  int64_t at = pixel * s.step + c, at_g = pixel * s.channels + c;
  float x[3][3][V], second[V], third[V];  // rows and columns of p; open rows of its gradient
  SDAN_UNROLL
  for (int e = 0; e < V; ++e) {
    second[e] = third[e] = 0;
    SDAN_UNROLL
    for (int i = 0; i < 9; ++i) x[i / 3][i % 3][e] = 0;
  }
  const int rows = s.height - row < s.rows ? s.height - row : s.rows;
  int turn = 0;
  bool inside = false, own = false;  // whether row r is in the image, and r - 1 the thread's own
  for (int k = 0; k < rows + 4; ++k) {
    const bool has_a = inside && live, owned = own;
    inside = static_cast<unsigned>(row - 2 + k) < static_cast<unsigned>(s.height);
    own = owner && static_cast<unsigned>(k - 3) < static_cast<unsigned>(rows);
    at += next, at_g += next_g;
    SDAN_UNROLL
    for (int j = 0; j < 3; ++j) {
      SDAN_UNROLL
      for (int e = 0; e < V; ++e) x[0][j][e] = x[1][j][e], x[1][j][e] = x[2][j][e];
    }
    const T* from = p + at + next;
    load_or_zero<T, V>(from - s.step, inside && left, x[2][0]);
    load_or_zero<T, V>(from, inside && live, x[2][1]);
    load_or_zero<T, V>(from + s.step, inside && right, x[2][2]);
    if (k < 2) continue;  // three rows of p make the first one of a
    float a[V], vb[V], g[V];
    load_or_zero<T, V>(b + at, has_a, vb);
    load_or_zero<T, V>(grad + at_g, has_a, g);
    get_vector<V>(own_bias, t, true, a);
    SDAN_UNROLL
    for (int i = 0; i < 9; ++i) add_product<V>(w[i], x[i / 3][i % 3], a);
    star_gradients<kCoarse>(g, a, vb, kGelu, s.outer);
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) vb[e] = has_a ? vb[e] : 0.0f;
    if (own) {
      if (grad_b) store<V>(grad_b + at, a);
      if (partial) {
        SDAN_UNROLL
        for (int i = 0; i < 9; ++i) add_product<V>(vb, x[i / 3][i % 3], acc[i]);
        SDAN_UNROLL
        for (int e = 0; e < V; ++e) acc[9][e] += vb[e];
      }
    }
    if (!grad_p) continue;
    // Two buffers in turn: the barrier of one step says that everybody has read the step before.
    float* exchange = shared + turn;
    turn = threads * V - turn;
    put_vector<V>(exchange, t, vb);
    __syncthreads();
    float ga[3][V], done[V];
    get_vector<V>(exchange, t - s.vectors, t >= s.vectors, ga[0]);
    get_vector<V>(exchange, t + s.vectors, t + s.vectors < threads, ga[2]);
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) ga[1][e] = vb[e];
    // The taps reversed, as in the contiguous kernel.
    SDAN_UNROLL
    for (int j = 0; j < 3; ++j) add_product<V>(w[2 - j], ga[j], third);
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) done[e] = third[e], third[e] = second[e], second[e] = 0;
    SDAN_UNROLL
    for (int j = 0; j < 3; ++j) {
      add_product<V>(w[5 - j], ga[j], third);
      add_product<V>(w[8 - j], ga[j], second);
    }
    if (owned) store<V>(grad_p + at - next, done);
  }
  if (!partial) return;
  __syncthreads();  // the exchange is over
  const int pitch =
      threads + s.vectors;  // the sums of one tap follow those of another in the banks
  SDAN_UNROLL
  for (int k = 0; k < kStarConvSums; ++k) {
    SDAN_UNROLL
    for (int e = 0; e < V; ++e) shared[(k * V + e) * pitch + t] = acc[k][e];
  }
  __syncthreads();
  const int sums = kStarConvSums * V * s.vectors;
  for (int i = t; i < sums; i += threads) {
    const int v = i % s.vectors, ke = i / s.vectors, e = ke % V;
    const int to = (static_cast<int>(blockIdx.y) * s.vectors + v) * V + e;
    if (to >= s.channels) continue;
    float total = 0;
    for (int l = 1; l < s.columns - 1; ++l) total += shared[ke * pitch + l * s.vectors + v];
    partial[(static_cast<int64_t>(blockIdx.x) * s.channels + to) * kStarConvSums + ke / V] = total;
  }
}

}  // namespace sdan_fast::cuda
