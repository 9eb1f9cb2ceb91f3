// activation(1x1 convolution of x) in one pass over memory, chunk by chunk of the batch's pixels:
// channels_last with vectors along the outputs (pixel_products.h) or in matrix tiles, NCHW along
// the pixels (plane_products.h), the rest and pairs of bfloat16 in tiles that pixels are turned to
// and back.
#include "activate.h"
#include "by_dtype.h"
#include "pixel_products.h"
#include "pixel_tiles.h"
#include "plane_products.h"
#include "plane_tiles.h"

namespace sdan_fast {
namespace SDAN_ISA {

namespace {

// The inputs and outputs of a chunk, where they are not used where they lie.
struct Scratch {
  float *x, *y;
  ptrdiff_t stride;
};

// Pixels whose sums stay in the first-level cache until they are rounded; two matrix tiles and
// more.
constexpr int64_t kTilePixels = 64;

OutputProducts output_products_of(const PointwiseConvPlan& plan) {
  return {plan.outputs, plan.conv.ci, plan.conv.co};
}

bool is_planes(const PointwiseConvPlan& plan) {
  return !plan.conv.pairs && plan.x.stride_p == 1 && plan.y.stride_p == 1;
}

#if SDAN_IS_AVX512
bool is_plane_tiles(const PointwiseConvPlan& plan) {
  return plan.conv.tiles != nullptr && !plan.pixel_tiles && plan.x.stride_p == 1 &&
         plan.y.stride_p == 1;
}
#endif

int64_t place(const PointwiseConvPlan& plan, char* base, Scratch* s) {
  ScratchCursor cursor{base, 0};
  const bool converted = plan.x.dtype != DType::kFloat32;
#if SDAN_IS_AVX512
  if (is_plane_tiles(plan)) {
    const PlaneTileScratch tile = place_plane_tile(plan.conv, &cursor);
    *s = {tile.pairs, tile.sums, 0};
    return cursor.used;
  }
#endif
  if (plan.pixel_tiles) {
    s->stride = 0;
    s->x = nullptr;
    s->y = cursor.take(round_up(plan.conv.co, 16) * kTilePixels);
  } else if (plan.outputs != nullptr) {
    const int64_t pixels = converted ? pixels_together(output_products_of(plan)) : 0;
    s->stride = 0;
    s->x = cursor.take(plan.conv.ci * pixels);
    s->y = cursor.take(plan.conv.co * pixels);
  } else {
    const bool planes = is_planes(plan);
    s->stride = pixel_tile_stride(planes ? plane_pixels(plan.conv.ci) : kChunk);
    s->x = cursor.take(plan.conv.ci * s->stride);
    s->y = cursor.take(planes && !converted ? 0 : plan.conv.co * s->stride);
  }
  return cursor.used;
}

// y = activation(x) for n values, which may be in place.
template <typename T>
void activate_values(Activation activation, const float* x, int64_t n, T* y) {
  constexpr int V = 2;
  int64_t i = 0;
  for (; i + V * kLanes <= n; i += V * kLanes) {
    Vec v[V] = {load(x + i), load(x + i + kLanes)};
    activate_switch(activation, v);
    store(y + i, v[0]);
    store(y + i + kLanes, v[1]);
  }
  for (; i < n; i += kLanes) {
    const int lanes = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    Vec v[1] = {load_n(x + i, lanes)};
    activate_switch(activation, v);
    store_n(y + i, v[0], lanes);
  }
}

// Whether sums have to be gone over after they were stored: results are rounded to 16 bits once,
// after the activation.
template <typename T>
bool has_second_step(const PointwiseConvPlan& plan) {
  return !std::is_same_v<T, float> || plan.activation != Activation::kNone;
}

// Where the sums go: the image itself, or scratch where it has 16 bits.
float* sums_of(float* y, float*) {
  return y;
}
template <typename T>
float* sums_of(T*, float* scratch) {
  return scratch;
}

SDAN_INLINE void store_sum(float* to, Vec sum, int lanes) {
  if (lanes == kLanes) {
    store(to, sum);
  } else {
    store_n(to, sum, lanes);
  }
}

// Pixels [first, last) of channels_last images.
template <typename T>
void run_pixels(const PointwiseConvPlan& plan, int64_t first, int64_t last, const Scratch& s) {
  const OutputProducts product = output_products_of(plan);
  const int64_t ci = plan.conv.ci, co = plan.conv.co, pixels = plan.tiling.pixels;
  const int64_t size = sizeof(T);
  const int64_t chunk = pixels_together(product);
  const int lines = lines_an_output_step(co, chunk, (ci + co) * size);
  for (int64_t i = first; i < last; i += chunk) {
    const int64_t n = last - i < chunk ? last - i : chunk;
    const T* x = static_cast<const T*>(plan.x.data) + i * ci;
    T* y = static_cast<T*>(plan.y.data) + i * co;
    PrefetchQueue queue;
    queue.clear();
    const int64_t left = pixels - i - n, next = left < chunk ? left : chunk;
    queue.add_rows(x + n * ci, 0, 1, next * ci, false);
    queue.add_rows(y + n * co, 0, 1, next * co, true);
    float* sums = sums_of(y, s.y);
    output_products<MultiplyAdd>(
        product, as_floats(x, n * ci, s.x), n, &queue, lines,
        [=](int64_t pixel, int64_t m, Vec sum, int lanes)
            __attribute__((always_inline)) { store_sum(sums + pixel * co + m, sum, lanes); });
    if (has_second_step<T>(plan)) activate_values(plan.activation, sums, n * co, y);
  }
}

#if SDAN_IS_AVX512
// y = u * sums, or sums where u is null, for n pixels of sums as pixel_tile_products leaves them.
void finish_pixel_tiles(const TileOutputs& outputs, const float* sums, int64_t n, const bfloat16* u,
                        bfloat16* y) {
  const int groups = outputs.groups(), lanes = outputs.each;
  for (int64_t i = 0; i < n; ++i) {
    for (int g = 0; g < groups; ++g, sums += kLanes) {
      const int64_t at = i * outputs.all + outputs.begin(g);
      if (lanes == kLanes) {
        store(y + at, u != nullptr ? load(u + at) * load(sums) : load(sums));
      } else {
        store_n(y + at, u != nullptr ? load_n(u + at, lanes) * load(sums) : load(sums), lanes);
      }
    }
  }
}

// Pixels [first, last) of channels_last images, by matrix tiles.
void run_pixel_tiles(const PointwiseConvPlan& plan, int64_t first, int64_t last, float* sums) {
  const TileScope scope(plan.conv);
  const int64_t ci = plan.conv.ci, co = plan.conv.co, least = plan.conv.tiles->rows[0];
  const TileOutputs outputs = pixel_tile_outputs(plan.conv);
  const int64_t row = int64_t{outputs.groups()} * kLanes;
  const auto* x = static_cast<const bfloat16*>(plan.x.data);
  const auto* u = static_cast<const bfloat16*>(plan.u.data);
  auto* y = static_cast<bfloat16*>(plan.y.data);
  for (int64_t i = first; i < last; i += kTilePixels) {
    const int64_t n = last - i < kTilePixels ? last - i : kTilePixels;
    // Too few pixels for a tile are computed with some of those before them, which are there: a
    // tile is no larger than the batch.
    const int64_t more = n < least ? least - n : 0;
    pixel_tile_products(plan.conv, x + (i - more) * ci, n + more, sums);
    float* of = sums + more * row;
    if (plan.activation != Activation::kNone) activate_values(plan.activation, of, n * row, of);
    finish_pixel_tiles(outputs, of, n, u == nullptr ? u : u + i * co, y + i * co);
  }
}
#endif

// Pixels [first, last) of the batch's planes, which do not go on from one image to the next.
template <typename T>
void run_planes(const PointwiseConvPlan& plan, int64_t first, int64_t last, const Scratch& s) {
  const Pointwise& conv = plan.conv;
  const int ci = conv.ci, co = conv.co;
  const int64_t plane = plan.x.run_pixels;
  const int64_t x_plane = plan.x.stride_c, y_plane = plan.y.stride_c;
  const int64_t chunk = plane_pixels(ci);
  int64_t n;
  for (int64_t i = first; i < last; i += n) {
    const int64_t image = i / plane, at = i % plane;
    n = plane - at < last - i ? plane - at : last - i;
    n = n < chunk ? n : chunk;
    load_pixels(plan.x, i, n, ci, s.x, s.stride);
    const T* x = static_cast<const T*>(plan.x.data) + image * plan.x.stride_run + at;
    T* y = static_cast<T*>(plan.y.data) + image * plan.y.stride_run + at;
    float* sums = sums_of(y, s.y);
    const int64_t sums_plane = sums == s.y ? s.stride : y_plane;
    const bool more = at + n < plane;
    plane_products(
        conv, s.x, s.stride, n,
        [=](int m, int64_t k) __attribute__((always_inline)) {
          if (!more) return;
          fetch_planes(x + n + k, x_plane, ci, co, m);
          fetch_plane_to_write(y + n + k + m * y_plane);
        },
        [=](int m, int64_t k, Vec sum, int lanes)
            __attribute__((always_inline)) { store_sum(sums + m * sums_plane + k, sum, lanes); });
    if (!has_second_step<T>(plan)) continue;
    for (int m = 0; m < co; ++m) {
      activate_values(plan.activation, sums + m * sums_plane, n, y + m * y_plane);
    }
  }
}

// A part of the pixels by way of tiles.
void run_tiles(const PointwiseConvPlan& plan, int64_t part, const Scratch& s) {
  const Pointwise& conv = plan.conv;
  const TileScope tiles(conv);
  const int lines =
      lines_a_step(conv.co + conv.ci, prefetch_steps(conv.co, tile_rows(conv.ci, conv.pairs), 1));
  PrefetchQueue queue;
  for_chunks(
      plan.tiling, part,
      [&](const Chunk& chunk) {
        queue.clear();
        fetch_pixels(&queue, plan.x, chunk, conv.ci, false);
        fetch_pixels(&queue, plan.y, chunk, conv.co, true);
        if (conv.pairs) {
          load_pixel_pairs(plan.x, chunk.first, chunk.n, conv.ci, s.x, s.stride);
        } else {
          load_pixels(plan.x, chunk.first, chunk.n, conv.ci, s.x, s.stride);
        }
        // Matrix tiles are so fast that it matters where their sums wait to be rounded.
        const int64_t together = conv.tiles != nullptr ? kBlock : kChunk;
        for (int64_t at = 0; at < chunk.n; at += together) {
          const int64_t n = chunk.n - at < together ? chunk.n - at : together;
          pointwise_pixels(s.x + at, s.stride, conv, s.y, s.stride, n, &queue, lines);
          if (plan.activation != Activation::kNone) {
            for (int m = 0; m < conv.co; ++m) {
              float* row = s.y + m * s.stride;
              activate_values(plan.activation, row, n, row);
            }
          }
          store_pixels(plan.y, chunk.first + at, n, conv.co, s.y, s.stride);
        }
      },
      [](int64_t) {});
}

}  // namespace

void pack_output_products(const float* weight, const float* bias, int co, int ci, float* packed) {
  pack_outputs(
      ci, co, [&](int64_t m, int64_t k) { return weight[m * ci + k]; },
      [&](int64_t m) { return bias[m]; }, packed);
}

void pointwise_conv2d_scratch(const PointwiseConvPlan* plan, int64_t* bytes) {
  Scratch s;
  *bytes = place(*plan, nullptr, &s);
}

void pointwise_conv2d_run(const PointwiseConvPlan* plan, int64_t part, void* scratch) {
  Scratch s;
  place(*plan, static_cast<char*>(scratch), &s);
  const PixelTiling& t = plan->tiling;
  const int64_t first = t.tiles * part / t.parts * t.tile;
  const int64_t end = t.tiles * (part + 1) / t.parts * t.tile;
  const int64_t last = end < t.pixels ? end : t.pixels;
#if SDAN_IS_AVX512
  if (plan->pixel_tiles) return run_pixel_tiles(*plan, first, last, s.y);
  if (is_plane_tiles(*plan)) return run_plane_tiles(*plan, first, last, {s.x, s.y});
#endif
  if (plan->outputs != nullptr) {
    by_dtype(plan->x.dtype, [&](auto v) { run_pixels<decltype(v)>(*plan, first, last, s); });
  } else if (is_planes(*plan)) {
    by_dtype(plan->x.dtype, [&](auto v) { run_planes<decltype(v)>(*plan, first, last, s); });
  } else {
    run_tiles(*plan, part, s);
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
