// Preparing and scheduling the fused operators: parameters converted and packed, images described,
// regions cut and handed to threads.
//
// For baseline sources only. One layer's parameters are packed on every call: they are a few
// thousand floats, and so an update in place can never leave a stale copy behind. The network keeps
// what it packed (prepared.h).
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "fused.h"
#include "tensor_util.h"

namespace sdan_fast {

// Floats that live as long as the arena, in 64-byte aligned pieces.
class FloatArena {
 public:
  // For an op on tensors of `dtype`: bfloat16 ones multiply pairs where the processor does.
  explicit FloatArena(DType dtype) : pairs_(dtype == DType::kBFloat16 && picked_pairs()) {}

  // For what is needed only while `other` is being filled.
  explicit FloatArena(const FloatArena& other) : pairs_(other.pairs_) {}

  bool pairs() const { return pairs_; }
  bool tiles() const { return pairs_ && picked_tiles(); }

  float* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) & ~size_t{63};
    if (chunks_.empty() || used_ + bytes > size_) {
      size_ = std::max<size_t>(bytes, 64 * 1024);
      void* p = std::aligned_alloc(64, size_);
      if (p == nullptr) throw std::bad_alloc();
      chunks_.emplace_back(static_cast<char*>(p));
      used_ = 0;
    }
    float* p = reinterpret_cast<float*>(chunks_.back().get() + used_);
    used_ += bytes;
    return p;
  }

  float* zeros(int64_t count) {
    float* p = take(count);
    std::fill_n(p, count, 0.0f);
    return p;
  }

  // The tensor's values as float32 in row-major order.
  float* values(const Tensor& t);

  // The same of an optional vector of `count`, `fallback` where it is absent.
  float* values_or(const std::optional<Tensor>& t, int64_t count, float fallback) {
    if (t.has_value()) return values(*t);
    float* p = take(count);
    std::fill_n(p, count, fallback);
    return p;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::vector<std::unique_ptr<char, Free>> chunks_;
  size_t used_ = 0, size_ = 0;
  bool pairs_;
};

// Round to nearest even; parameters are finite.
inline uint32_t bfloat16_bits(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

inline float float_of(bfloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  static_assert(sizeof(f) == sizeof(bits));
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

inline float float_of(float16 v) {
  const uint32_t magnitude = v.bits & 0x7fffu;
  float f;
  if (magnitude >= 0x0400u) {
    const uint32_t bits =
        magnitude >= 0x7c00u ? 0x7f800000u | (magnitude << 13) : (magnitude << 13) + 0x38000000u;
    __builtin_memcpy(&f, &bits, 4);
  } else {
    f = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  }
  return (v.bits & 0x8000u) != 0 ? -f : f;
}

inline float* FloatArena::values(const Tensor& t) {
  const Tensor dense = in_format(t, Format::kContiguous);
  const int64_t n = dense.numel();
  float* p = take(n);
  const void* data = dense.const_data_ptr();
  switch (kernel_dtype(dense, "sdan_fast", "a parameter")) {
    case DType::kFloat32:
      std::copy_n(static_cast<const float*>(data), n, p);
      break;
    case DType::kBFloat16:
      for (int64_t i = 0; i < n; ++i) p[i] = float_of(static_cast<const bfloat16*>(data)[i]);
      break;
    case DType::kFloat16:
      for (int64_t i = 0; i < n; ++i) p[i] = float_of(static_cast<const float16*>(data)[i]);
      break;
  }
  return p;
}

// The fewest tiles of at most 16 rows that n take, as even as possible: the rows of each.
inline int64_t tile_share(int64_t n) {
  const int64_t tiles = (n + 15) / 16;
  return (n + tiles - 1) / tiles;
}

// Sums of `rows` x `columns`, factors of `rows` x `depth` and `depth` x `columns`.
inline const TileConfig* make_tile_config(FloatArena& arena, int64_t rows, int64_t columns,
                                          int64_t depth) {
  TileConfig config{};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : depth);
    config.row_bytes[i] = static_cast<uint16_t>(4 * (i == 4 || i == 5 ? depth : columns));
  }
  return new (arena.take(sizeof(TileConfig) / sizeof(float))) TileConfig(config);
}

// f(first output, first row, how many rows the tile before has too) for each group of `outputs`
// and, in it, for each step of `depth` over the rows of each input.
template <typename F>
void for_tiles(int64_t co, int64_t outputs, int64_t depth, const std::vector<int64_t>& input_rows,
               const F& f) {
  for (int64_t m = 0; m < co; m += outputs) {
    int64_t before = 0;
    for (const int64_t n : input_rows) {
      for (int64_t k = 0; k < n; k += depth) {
        // The last tile is zero where it repeats the one before.
        const int64_t first = std::min(k, n - depth);
        f(std::min(m, co - outputs), before + first, k - first);
      }
      before += n;
    }
  }
}

// For matrix tiles with pixels along the columns. weight: co x the sum of input_rows, pairs. False
// if an input has less rows than a tile, all of them being alike.
inline bool pack_tiles(FloatArena& arena, const float* weight, const float* bias,
                       const std::vector<int64_t>& input_rows, Pointwise* pw) {
  const int64_t outputs = tile_share(pw->co);
  int64_t depth = 1, all = 0, tiles = 0;
  for (const int64_t n : input_rows) depth = std::max(depth, tile_share(n));
  for (const int64_t n : input_rows) {
    if (n < depth) return false;
    all += n;
    tiles += (n + depth - 1) / depth;
  }
  tiles *= (pw->co + outputs - 1) / outputs;
  float* packed = arena.zeros(tiles * outputs * 16);
  float* biases = arena.take(int64_t{16} * pw->co);
  pw->weight = packed;
  pw->bias = biases;
  pw->tiles = make_tile_config(arena, outputs, 16, depth);
  for_tiles(pw->co, outputs, depth, input_rows, [&](int64_t m, int64_t row, int64_t known) {
    for (int64_t i = 0; i < outputs; ++i, packed += 16) {
      const float* w = weight + (m + i) * all + row;
      std::copy(w + known, w + depth, packed + known);
    }
  });
  for (int64_t m = 0; m < pw->co; ++m) std::fill_n(biases + 16 * m, 16, bias[m]);
  return true;
}

// For matrix tiles with pixels along the rows, `pixels` of them in all, of an even number of
// channels that are neighbours. weight: co x ci, row by row. Groups of outputs fill a row of sums,
// so that none crosses a cache line.
inline Pointwise pack_pixel_tiles(FloatArena& arena, const float* weight, const float* bias,
                                  int64_t co, int64_t ci, int64_t pixels) {
  const int64_t rows = ci / 2, depth = tile_share(rows), outputs = std::min<int64_t>(co, 16);
  const int64_t tiles = (co + outputs - 1) / outputs * ((rows + depth - 1) / depth);
  float* packed = arena.zeros(tiles * depth * 16);
  const Pointwise pw{packed,
                     bias,
                     static_cast<int>(ci),
                     static_cast<int>(co),
                     true,
                     make_tile_config(arena, std::min<int64_t>(pixels, 16), outputs, depth)};
  for_tiles(co, outputs, depth, {rows}, [&](int64_t m, int64_t row, int64_t known) {
    for (int64_t k = 0; k < depth; ++k, packed += 16) {
      if (k < known) continue;
      for (int64_t i = 0; i < outputs; ++i) {
        const float* w = weight + (m + i) * ci + 2 * (row + k);
        const uint32_t both = bfloat16_bits(w[0]) | bfloat16_bits(w[1]) << 16;
        __builtin_memcpy(packed + i, &both, sizeof(both));
      }
    }
  });
  return pw;
}

// The 1x1 convolution of one input of `ci` channels, or of several whose channels `inputs` counts:
// each of them is a tile of its own, and so has pairs of its own.
inline Pointwise pack(FloatArena& arena, const float* weight, const float* bias, int64_t co,
                      int64_t ci, std::vector<int64_t> inputs = {}) {
  static const auto pack_kernel = SDAN_PICK_KERNEL(pack_pointwise);
  int64_t rows = ci;
  std::vector<float> paired;
  if (arena.pairs()) {
    if (inputs.empty()) inputs.push_back(ci);
    std::vector<int64_t> input_rows;
    for (const int64_t n : inputs) input_rows.push_back((n + 1) / 2);
    rows = std::accumulate(input_rows.begin(), input_rows.end(), int64_t{0});
    paired.resize(static_cast<size_t>(co * rows));
    float* p = paired.data();
    for (int64_t m = 0; m < co; ++m) {
      const float* w = weight + m * ci;
      for (const int64_t n : inputs) {
        for (int64_t k = 0; k < n; k += 2) {
          const uint32_t both =
              bfloat16_bits(w[k]) | (k + 1 < n ? bfloat16_bits(w[k + 1]) << 16 : 0u);
          __builtin_memcpy(p++, &both, 4);
        }
        w += n;
      }
    }
    weight = paired.data();
    Pointwise pw{nullptr, nullptr, static_cast<int>(ci), static_cast<int>(co), true, nullptr};
    if (arena.tiles() && pack_tiles(arena, weight, bias, input_rows, &pw)) return pw;
  }
  float* packed = arena.take(co * rows);
  pack_kernel(weight, static_cast<int>(co), static_cast<int>(rows), packed);
  return {packed, bias, static_cast<int>(ci), static_cast<int>(co), arena.pairs(), nullptr};
}

inline Pointwise pack(FloatArena& arena, const Tensor& weight, const std::optional<Tensor>& bias,
                      std::vector<int64_t> inputs = {}) {
  FloatArena rows(arena);
  return pack(arena, rows.values(weight), arena.values_or(bias, weight.size(0), 0.0f),
              weight.size(0), weight.size(1), std::move(inputs));
}

inline Pointwise pack_pixel_tiles(FloatArena& arena, const Tensor& weight,
                                  const std::optional<Tensor>& bias, int64_t pixels) {
  FloatArena rows(arena);
  return pack_pixel_tiles(arena, rows.values(weight), arena.values_or(bias, weight.size(0), 0.0f),
                          weight.size(0), weight.size(1), pixels);
}

// The 1x1 convolution of weight * z + bias, so that the affine part of a LayerNorm needs no pass of
// its own.
inline Pointwise pack_after_norm(FloatArena& arena, const Tensor& weight, const float* norm_weight,
                                 const float* norm_bias) {
  const int64_t co = weight.size(0), ci = weight.size(1);
  FloatArena rows(arena);
  float* w = rows.values(weight);
  float* bias = arena.take(co);
  for (int64_t m = 0; m < co; ++m) {
    double sum = 0;
    for (int64_t k = 0; k < ci; ++k) {
      sum += static_cast<double>(w[m * ci + k]) * norm_bias[k];
      w[m * ci + k] *= norm_weight[k];
    }
    bias[m] = static_cast<float>(sum);
  }
  return pack(arena, w, bias, co, ci);
}

inline ImageView view_of(const Tensor& t, DType dtype) {
  const auto s = t.strides();
  // A dimension of one element has no stride to speak of; say what the fast paths look for.
  return {t.data_ptr(), dtype,
          s[0],         t.size(1) == 1 ? 1 : s[1],
          s[2],         t.size(3) == 1 && s[1] != 1 ? 1 : s[3]};
}

// Of one pixel.
inline int64_t multiply_adds(const Pointwise& pw) {
  return static_cast<int64_t>(pw.ci) * pw.co;
}

// How many of PyTorch's threads some multiply-adds are worth: one for each 0.75 million, 14 us of a
// fast core. Waking a second one costs several microseconds, and on a machine that has less free
// cores than threads the first then waits for it a whole time slice.
inline int64_t threads_for(int64_t multiply_adds) {
  return std::clamp<int64_t>(multiply_adds / 750'000, 1, torch::stable::get_num_threads());
}

// f(i) for i in [0, n), each of at most `threads` threads taking the next one as it gets free:
// which thread runs a task never shows in its result, and an unlucky core holds nobody up.
template <typename F>
void run_tasks(int64_t threads, int64_t n, const F& f) {
  threads = std::min(threads, n);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) f(i);
  });
}

// f(part, y0, y1) for rows of `parts` parts of `height` rows each, whoever gets free taking a share
// of what is left, at least `least` rows: few pieces at first, small ones when the end is near.
// Pieces begin at even rows of their part.
template <typename F>
void run_rows(int64_t threads, int64_t parts, int64_t height, int64_t least, const F& f) {
  const int64_t total = parts * height;
  if (threads <= 1) {
    for (int64_t i = 0; i < parts; ++i) f(i, int64_t{0}, height);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    int64_t begin = next.load();
    while (begin < total) {
      const int64_t y = begin % height;
      int64_t rows = std::max(least, (total - begin) / (2 * threads));
      rows = std::min(rows + (rows & 1), height - y);
      if (!next.compare_exchange_weak(begin, begin + rows)) continue;
      f(begin / height, y, y + rows);
      begin = next.load();
    }
  });
}

// Bytes of second-level cache to plan for.
inline int64_t cache_bytes() {
  static const int64_t bytes = [] {
    int64_t found = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return std::clamp<int64_t>(found > 0 ? found : 1 << 20, 256 << 10, 2 << 20);
  }();
  return bytes;
}

// Equal parts of [0, n), each at least `least` long where n allows, about `wanted` of them.
inline int64_t part_count(int64_t n, int64_t wanted, int64_t least) {
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, n / std::max<int64_t>(least, 1)));
}

// images x rows x columns cut into equal regions.
struct RegionGrid {
  int64_t images, height, width, bands, tiles;

  int64_t count() const { return images * bands * tiles; }
  Region at(int64_t i) const {
    const int64_t tile = i % tiles, band = i / tiles % bands, n = i / (tiles * bands);
    return {n, height * band / bands, height * (band + 1) / bands, width * tile / tiles,
            width * (tile + 1) / tiles};
  }
};

}  // namespace sdan_fast
