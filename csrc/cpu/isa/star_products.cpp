// Star's 1x1 convolutions of the normalized input for its backward, tile by tile: the products
// again, and their gradients' way back through them and through the LayerNorm.
#include "layer_norm_statistics.h"
#include "outer_product.h"
#include "pixel_tiles.h"

namespace sdan_fast {
namespace SDAN_ISA {

namespace {

// The weight and bias of a LayerNorm, or null: without them.
struct Affine {
  const float *weight, *bias;
};

// z = (x - mean) / sqrt(var + eps) over the channels, for V vectors of pixels; their 1 / sqrt too.
template <int V>
void normalize_vecs(const float* x, ptrdiff_t x_stride, int channels, float eps, Affine affine,
                    float* z, ptrdiff_t z_stride, float* rstd) {
  const auto nothing = [](int64_t) {};
  Statistics<V> s;
  statistics_of_planes(s, x, x_stride, channels, eps, nothing, nothing);
  for (int c = 0; c < channels; ++c) {
    const Vec w = set1(affine.weight != nullptr ? affine.weight[c] : 1.0f);
    const Vec b = set1(affine.bias != nullptr ? affine.bias[c] : 0.0f);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec d = (load(x + c * x_stride + v * kLanes) - s.mean[v]) - s.rest[v];
      store(z + c * z_stride + v * kLanes, fma(d * s.rstd[v], w, b));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(rstd + v * kLanes, s.rstd[v]);
}

void normalize_pixels(const float* x, ptrdiff_t x_stride, int channels, float eps, Affine affine,
                      float* z, ptrdiff_t z_stride, float* rstd, int64_t n) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    normalize_vecs<4>(x + i, x_stride, channels, eps, affine, z + i, z_stride, rstd + i);
  }
  for (; i < n; i += kLanes) {
    normalize_vecs<1>(x + i, x_stride, channels, eps, affine, z + i, z_stride, rstd + i);
  }
}

// g = rstd (g - mean(g) - z mean(g z)), means over the channels: from z's gradient to x's.
template <int V>
void denormalize_vecs(float* g, ptrdiff_t g_stride, int channels, const float* z,
                      ptrdiff_t z_stride, const float* rstd) {
  const Vec scale = set1(1.0f / static_cast<float>(channels));
  Vec mean[V], slope[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) mean[v] = slope[v] = zero();
  for (int c = 0; c < channels;) {
    const int64_t end = c + kChainChannels < channels ? c + kChainChannels : channels;
    Vec part[V], product[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) part[v] = product[v] = zero();
    for (; c < end; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec h = load(g + c * g_stride + v * kLanes);
        part[v] = part[v] + h;
        product[v] = fma(h, load(z + c * z_stride + v * kLanes), product[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      mean[v] = mean[v] + part[v];
      slope[v] = slope[v] + product[v];
    }
  }
  Vec r[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    mean[v] = mean[v] * scale;
    slope[v] = slope[v] * scale;
    r[v] = load(rstd + v * kLanes);
  }
  for (int c = 0; c < channels; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* p = g + c * g_stride + v * kLanes;
      const Vec rest = fnma(load(z + c * z_stride + v * kLanes), slope[v], load(p) - mean[v]);
      store(p, rest * r[v]);
    }
  }
}

void denormalize_pixels(float* g, ptrdiff_t g_stride, int channels, const float* z,
                        ptrdiff_t z_stride, const float* rstd, int64_t n) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    denormalize_vecs<4>(g + i, g_stride, channels, z + i, z_stride, rstd + i);
  }
  for (; i < n; i += kLanes) {
    denormalize_vecs<1>(g + i, g_stride, channels, z + i, z_stride, rstd + i);
  }
}

struct Scratch {
  float *x, *out, *rstd;  // of a chunk
  ptrdiff_t stride;
};

int64_t place(const StarProductsPlan& plan, char* base, Scratch* s) {
  ScratchCursor cursor{base, 0};
  s->stride = pixel_tile_stride(kChunk);
  s->x = cursor.take(plan.products.ci * s->stride);
  s->out = cursor.take(plan.products.co * s->stride);
  s->rstd = cursor.take(s->stride);
  return cursor.used;
}

// z and grad keep a tile, for the sums over its pixels; gx, which is x at first, a chunk.
struct BackwardScratch {
  float *z, *grad, *gx, *rstd;
  ptrdiff_t tile_stride, chunk_stride;
};

int64_t place(const StarProductsBackwardPlan& plan, char* base, BackwardScratch* s) {
  ScratchCursor cursor{base, 0};
  s->tile_stride = pixel_tile_stride(plan.tiling.tile);
  s->chunk_stride = pixel_tile_stride(kChunk);
  s->z = cursor.take(plan.ci * s->tile_stride);
  s->grad = cursor.take(plan.co * s->tile_stride);
  s->gx = cursor.take(plan.ci * s->chunk_stride);
  s->rstd = cursor.take(s->chunk_stride);
  return cursor.used;
}

}  // namespace

void star_products_scratch(const StarProductsPlan* plan, int64_t* bytes) {
  Scratch s;
  *bytes = place(*plan, nullptr, &s);
}

void star_products_run(const StarProductsPlan* plan, int64_t part, void* scratch) {
  const Pointwise& products = plan->products;
  Scratch s;
  place(*plan, static_cast<char*>(scratch), &s);
  const int lines =
      lines_a_step(products.co + products.ci, prefetch_steps(products.co, products.ci, 1));
  PrefetchQueue queue;
  for_chunks(
      plan->tiling, part,
      [&](const Chunk& chunk) {
        queue.clear();
        fetch_pixels(&queue, plan->x, chunk, products.ci, false);
        fetch_pixels(&queue, plan->out, chunk, products.co, true);
        load_pixels(plan->x, chunk.first, chunk.n, products.ci, s.x, s.stride);
        normalize_pixels(s.x, s.stride, products.ci, plan->eps,
                         {plan->norm_weight, plan->norm_bias}, s.x, s.stride, s.rstd, chunk.n);
        // Where the outer activation bends, what these are off by is multiplied: shorter sums.
        pointwise_pixels<16>(s.x, s.stride, products, s.out, s.stride, chunk.n, &queue, lines);
        store_pixels(plan->out, chunk.first, chunk.n, products.co, s.out, s.stride);
      },
      [](int64_t) {});
}

void star_products_backward_scratch(const StarProductsBackwardPlan* plan, int64_t* bytes) {
  BackwardScratch s;
  *bytes = place(*plan, nullptr, &s);
}

void star_products_backward_run(const StarProductsBackwardPlan* plan, int64_t part, void* scratch) {
  const int co = plan->co, ci = plan->ci;
  BackwardScratch s;
  place(*plan, static_cast<char*>(scratch), &s);
  const int lines = lines_a_step(co + 2 * ci, prefetch_steps(ci, co, 1));
  PrefetchQueue queue;
  for_chunks(
      plan->tiling, part,
      [&](const Chunk& chunk) {
        float *z = s.z + chunk.at, *grad = s.grad + chunk.at;
        load_pixels(plan->x, chunk.first, chunk.n, ci, s.gx, s.chunk_stride);
        load_pixels(plan->grad, chunk.first, chunk.n, co, grad, s.tile_stride);
        normalize_pixels(s.gx, s.chunk_stride, ci, plan->eps, {nullptr, nullptr}, z, s.tile_stride,
                         s.rstd, chunk.n);
        if (plan->gx.data == nullptr) return;
        queue.clear();
        fetch_pixels(&queue, plan->x, chunk, ci, false);
        fetch_pixels(&queue, plan->grad, chunk, co, false);
        fetch_pixels(&queue, plan->gx, chunk, ci, true);
        pointwise_pixels(grad, s.tile_stride, plan->transposed, s.gx, s.chunk_stride, chunk.n,
                         &queue, lines);
        denormalize_pixels(s.gx, s.chunk_stride, ci, z, s.tile_stride, s.rstd, chunk.n);
        store_pixels(plan->gx, chunk.first, chunk.n, ci, s.gx, s.chunk_stride);
      },
      [&](int64_t n) {
        if (plan->sums.data == nullptr) return;
        float* sums = plan->sums.data + part * plan->sums.stride;
        const int vecs = static_cast<int>((n + kLanes - 1) / kLanes);
        outer_product(s.grad, s.tile_stride, co, s.z, s.tile_stride, ci, vecs, sums);
        row_totals(s.grad, s.tile_stride, co, vecs, sums + plan->sums.rows_at);
      });
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
