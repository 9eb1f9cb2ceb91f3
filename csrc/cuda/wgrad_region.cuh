// What the weight gradients of contiguous tensors share: a block owns a region of one plane, and
// goes over it in tiles that arrive in shared memory one step ahead.
#pragma once

#include <type_traits>

#include "quad_tile.cuh"

namespace sdan_fast::cuda {

struct RegionParams {
  int32_t channels, height, width;
  int32_t kh, kw, dh, dw;
  int32_t wide;  // 1: rows of the tensors are 16-byte aligned
  int32_t region_h, region_w, regions_y, regions_x;
  int32_t tile_h, tile_w;
};

struct Span {
  int begin, end;
};

// The region of a block.
struct Region {
  int64_t plane;
  Span ys, xs;
  __device__ __forceinline__ explicit Region(const RegionParams& p) {
    const auto regions = static_cast<unsigned>(p.regions_y * p.regions_x);
    plane = blockIdx.x / regions;
    const int at = static_cast<int>(blockIdx.x % regions), y = at / p.regions_x * p.region_h,
              x = at % p.regions_x * p.region_w;
    ys = {y, y + p.region_h < p.height ? y + p.region_h : p.height};
    xs = {x, x + p.region_w < p.width ? x + p.region_w : p.width};
  }
};

// How the threads of a block share out the copying of tiles that are `across` accesses wide. Those
// of 16 bytes go to 8 rows at a time, whose places in shared memory are apart in the banks; of
// accesses that begin within a sector, `skip` are left out so that those of a warp end with one.
struct Share {
  int row, rows, column, columns;  // the first of a thread, and from one to the next
  __device__ __forceinline__ Share(int across, bool wide, int skip) {
    const int t = static_cast<int>(threadIdx.x), together = wide ? 8 : 1, q = t / together,
              teams = static_cast<int>(blockDim.x) / together;
    columns = across + skip < teams ? across + skip : teams;
    column = q % columns - skip;
    rows = teams / columns * together;
    row = q / columns * together + t % together;
    if (row >= rows) column = across;  // too many
  }
};

// Zeros where an access of fetch_tile goes, of 8 elements that become float32 or 16 bytes.
template <typename Staged>
__device__ __forceinline__ void put_zeros(Staged* to, int bytes) {
  SDAN_UNROLL_BY(1)
  for (int i = 0; i < bytes / 4; i += 4) put_shared4(reinterpret_cast<float*>(to) + i, float4{});
}

// `rows` rows and `across` accesses of a plane to shared memory, beginning with (y, x); what is not
// of rows `ys` and columns `xs` is zero. An access is 16 bytes if Wide, and x and xs are multiples
// of that. 16-bit elements become float32 where the tile is.
template <bool Wide, typename T, typename Staged>
__device__ __forceinline__ void fetch_tile(const T* plane, Staged* tile, const Share& share,
                                           int width, int pitch, int y, int x, int rows, int across,
                                           Span ys, Span xs) {
  constexpr int N = Wide ? kWide<T> : 1;
  for (int column = share.column; column < across; column += share.columns) {
    if (column < 0) continue;
    const int at_x = x + column * N, end = y + rows, high = ys.end < end ? ys.end : end;
    int at_y = y + share.row;
    Staged* to = tile + share.row * pitch + column * N;
    const int step = share.rows * pitch;
    const auto clear = [&](int stop) {
      SDAN_UNROLL_BY(1)
      for (; at_y < stop; at_y += share.rows, to += step) {
        if constexpr (Wide)
          put_zeros(to, N * static_cast<int>(sizeof(Staged)));
        else
          *to = Staged{};
      }
    };
    clear(at_x >= xs.begin && at_x < xs.end ? ys.begin : end);
    const T* from = plane + (static_cast<int64_t>(at_y) * width + at_x);
    const int64_t bytes = static_cast<int64_t>(share.rows) * width * static_cast<int>(sizeof(T));
    SDAN_UNROLL_BY(4)
    for (; at_y < high; at_y += share.rows, to += step) {
      if constexpr (Wide && std::is_same_v<T, Staged>) {
        cp_async<16>(to, from);
      } else if constexpr (Wide) {
        float v[N];
        load<N>(from, v);
        put_shared<N>(to, v);
      } else if constexpr (std::is_same_v<T, Staged>) {
        *to = *from;
      } else {
        *to = load_one(from);
      }
      from = bytes_on(from, bytes);
    }
    clear(end);
  }
}

// Goes over the tiles of a region: fetch(y, x, buffer) of the next one before use(y, x, buffer) of
// one, whose data are there for all threads then.
template <typename Fetch, typename Use>
__device__ __forceinline__ void over_tiles(const RegionParams& p, const Region& r, Fetch&& fetch,
                                           Use&& use) {
  fetch(r.ys.begin, r.xs.begin, 0);
  cp_async_commit();
  for (int y = r.ys.begin, x = r.xs.begin, buffer = 0; y < r.ys.end; buffer ^= 1) {
    int next_y = y, next_x = x + p.tile_w;
    if (next_x >= r.xs.end) next_x = r.xs.begin, next_y += p.tile_h;
    if (next_y < r.ys.end) {
      fetch(next_y, next_x, buffer ^ 1);
      cp_async_commit();
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    use(y, x, buffer);
    __syncthreads();
    y = next_y, x = next_x;
  }
}

}  // namespace sdan_fast::cuda
