// The gated 1x1 convolution, a register-blocked small matrix product over tiles of pixels.
//
// NCHW: vectors run along the pixels (plane_products.h), whose inputs are staged as float32
// channels x pixels. channels_last: vectors run along the outputs (pixel_products.h).
#include "pointwise_gate.h"

#include <type_traits>

#include "by_dtype.h"
#include "pixel_products.h"
#include "plane_products.h"
#include "planes.h"
#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

// NCHW: weights as pack_pointwise_weight lays them out, then the bias. channels_last: as
// pack_outputs does.
template <typename T>
void pack(const PointwiseGateArgs& a) {
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  const auto bias_of = [&](int64_t m) { return bias == nullptr ? 0.0f : to_float(bias[m]); };
  float* out = a.packed;
  if (!a.channels_last) {
    const int co = static_cast<int>(a.co);
    const int ci = static_cast<int>(a.ci);
    const int groups = pointwise_groups(co);
    for (int g = 0; g < groups; ++g) {
      const int begin = pointwise_group_begin(co, groups, g);
      const int end = pointwise_group_begin(co, groups, g + 1);
      for (int k = 0; k < ci; ++k) {
        for (int m = begin; m < end; ++m)
          *out++ = to_float(weight[static_cast<int64_t>(m) * ci + k]);
      }
    }
    for (int m = 0; m < co; ++m) *out++ = bias_of(m);
    return;
  }
  if (a.pairs) {
    pack_outputs(
        a.ci / 2, a.co,
        [&](int64_t m, int64_t k) {
          float pair;
          std::memcpy(&pair, weight + m * a.ci + 2 * k, sizeof(pair));
          return pair;
        },
        bias_of, out);
    return;
  }
  pack_outputs(
      a.ci, a.co, [&](int64_t m, int64_t k) { return to_float(weight[m * a.ci + k]); }, bias_of,
      out);
}

// Small images are in the second-level cache, and asking for their lines takes time.
SDAN_INLINE bool is_cached(const PointwiseGateArgs& a) {
  const int64_t size = a.dtype == DType::kFloat32 ? 4 : 2;
  return a.pixels * (a.ci + 2 * a.co) * size < (2 << 20);
}

// Tile [first, last) of the pixels of one image, a chunk at a time: its inputs are staged next to
// each other, multiplied, and the products gated on their way out.
template <typename T>
void tile_nchw(const PointwiseGateArgs& a, int64_t image, int64_t first, int64_t last) {
  const int64_t plane = a.pixels;
  const int64_t chunk = plane_pixels(a.ci);
  const int64_t stride = staged_stride(chunk);
  float* staged = static_cast<float*>(
      thread_scratch(static_cast<size_t>(a.ci * stride + kLanes) * sizeof(float)));
  const int ci = static_cast<int>(a.ci), co = static_cast<int>(a.co);
  const Pointwise product = {a.packed, a.packed + a.ci * a.co, ci, co, false, nullptr};
  const bool cached = is_cached(a);
  for (int64_t i = first; i < last; i += chunk) {
    const int64_t n = last - i < chunk ? last - i : chunk;
    const int64_t at = image * co * plane + i;
    const T* x = static_cast<const T*>(a.x) + image * ci * plane + i;
    const T* u = static_cast<const T*>(a.u) + at;
    T* y = static_cast<T*>(a.y) + at;
    stage_planes(staged, stride, x, plane, ci, n);
    const bool more = !cached && i + n < plane;
    plane_products(
        product, staged, static_cast<ptrdiff_t>(stride), n,
        [=](int m, int64_t k) __attribute__((always_inline)) {
          if (!more) return;
          fetch_planes(x + n + k, plane, ci, co, m);
          fetch_planes(u + n + k, plane, co, co, m);
          fetch_plane_to_write(y + n + k + m * plane);
        },
        [=](int m, int64_t k, Vec sum, int lanes) __attribute__((always_inline)) {
          const T* p = u + m * plane + k;
          T* q = y + m * plane + k;
          if (lanes == kLanes) {
            store(q, load(p) * sum);
          } else {
            store_n(q, load_n(p, lanes) * sum, lanes);
          }
        });
  }
}

// Pixels [first, last) of the batch, a chunk at a time. words(x, n) are the inputs of a chunk.
template <typename Product, typename T, typename Words>
SDAN_INLINE void gate_pixels(const PointwiseGateArgs& a, const OutputProducts& product,
                             int64_t first, int64_t last, const Words& words) {
  const int64_t size = sizeof(T), co = a.co;
  const int64_t chunk = pixels_together(product);
  const bool cached = is_cached(a);
  const int lines = lines_an_output_step(a.co, chunk, (a.ci + 2 * a.co) * size);
  for (int64_t i = first; i < last; i += chunk) {
    const int64_t n = last - i < chunk ? last - i : chunk;
    const T* x = static_cast<const T*>(a.x) + i * a.ci;
    const T* u = static_cast<const T*>(a.u) + i * a.co;
    T* y = static_cast<T*>(a.y) + i * a.co;
    PrefetchQueue queue;
    queue.clear();
    const int64_t left = a.pixels - i - n, next = cached ? 0 : left < chunk ? left : chunk;
    queue.add_rows(x + n * a.ci, 0, 1, next * a.ci, false);
    queue.add_rows(u + n * a.co, 0, 1, next * a.co, false);
    queue.add_rows(y + n * a.co, 0, 1, next * a.co, true);
    output_products<Product>(product, words(x, n), n, &queue, lines,
                             [=](int64_t pixel, int64_t m, Vec sum, int lanes)
                                 __attribute__((always_inline)) {
                                   const int64_t at = pixel * co + m;
                                   if (lanes == kLanes) {
                                     store(y + at, load(u + at) * sum);
                                   } else {
                                     store_n(y + at, load_n(u + at, lanes) * sum, lanes);
                                   }
                                 });
  }
}

template <typename T>
void tile_channels_last(const PointwiseGateArgs& a, int64_t first, int64_t last) {
  if constexpr (kHasPairs && std::is_same_v<T, bfloat16>) {
    if (a.pairs) {
      return gate_pixels<MultiplyPairs, T>(a, {a.packed, a.ci / 2, a.co}, first, last,
                                           [](const T* x, int64_t) { return x; });
    }
  }
  const OutputProducts product = {a.packed, a.ci, a.co};
  float* scratch = nullptr;
  if (a.dtype != DType::kFloat32) {
    scratch = static_cast<float*>(
        thread_scratch(static_cast<size_t>(pixels_together(product) * a.ci) * sizeof(float)));
  }
  gate_pixels<MultiplyAdd, T>(a, product, first, last, [&](const T* x, int64_t n) {
    return as_floats(x, n * a.ci, scratch);
  });
}

template <typename T>
void run(const PointwiseGateArgs& a, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t % a.tiles * a.tile;
    const int64_t last = first + a.tile < a.pixels ? first + a.tile : a.pixels;
    if (a.channels_last) {
      tile_channels_last<T>(a, first, last);
    } else {
      tile_nchw<T>(a, t / a.tiles, first, last);
    }
  }
}

}  // namespace

void pointwise_gate_pack(const PointwiseGateArgs& args) {
  by_dtype(args.dtype, [&](auto t) { pack<decltype(t)>(args); });
}

void pointwise_gate_run(const PointwiseGateArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto t) { run<decltype(t)>(args, begin, end); });
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
