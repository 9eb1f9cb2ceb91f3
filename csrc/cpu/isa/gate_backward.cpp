// The backward of the gated 1x1 convolution, or of one with an activation, in one pass over memory,
// tile by tile: the product again and its gradient, both transposed products and the sums over the
// pixels.
#include "outer_product.h"
#include "pixel_tiles.h"
#include "star_gradients.h"

namespace sdan_fast {
namespace SDAN_ISA {

namespace {

// x and m keep a tile, for the sums over its pixels; the others a chunk.
struct Scratch {
  float *x, *m, *grad, *out;
  ptrdiff_t tile_stride, chunk_stride;
};

int64_t place(const GateBackwardPlan& plan, char* base, Scratch* s) {
  ScratchCursor cursor{base, 0};
  s->tile_stride = pixel_tile_stride(plan.tiling.tile);
  s->chunk_stride = pixel_tile_stride(kChunk);
  const int widest = plan.co > plan.ci ? plan.co : plan.ci;
  s->x = cursor.take(plan.ci * s->tile_stride);
  s->m = cursor.take(plan.co * s->tile_stride);
  s->grad = cursor.take(plan.co * s->chunk_stride);
  s->out = cursor.take(widest * s->chunk_stride);
  return cursor.used;
}

// out = a * b
void multiply_rows(const float* a, ptrdiff_t a_stride, const float* b, ptrdiff_t b_stride,
                   float* out, ptrdiff_t out_stride, int rows, int64_t n) {
  for (int c = 0; c < rows; ++c) {
    for (int64_t i = 0; i < n; i += kLanes) {
      store(out + c * out_stride + i, load(a + c * a_stride + i) * load(b + c * b_stride + i));
    }
  }
}

// out = grad times the activation's derivative at p
void chain_rows(Activation activation, float* p, const float* grad, ptrdiff_t chunk_stride,
                float* out, ptrdiff_t out_stride, int rows, int64_t n) {
  constexpr int V = 2;
  for (int c = 0; c < rows; ++c, p += chunk_stride, grad += chunk_stride, out += out_stride) {
    for (int64_t i = 0; i < n; i += V * kLanes) {
      Vec x[V] = {load(p + i), load(p + i + kLanes)};
      Vec g[V] = {load(grad + i), load(grad + i + kLanes)};
      chain_switch<false>(activation, g, x);
      store(out + i, g[0]);
      store(out + i + kLanes, g[1]);
    }
  }
}

}  // namespace

void gate_backward_scratch(const GateBackwardPlan* plan, int64_t* bytes) {
  Scratch s;
  *bytes = place(*plan, nullptr, &s);
}

void gate_backward_run(const GateBackwardPlan* plan, int64_t part, void* scratch) {
  const int co = plan->co, ci = plan->ci;
  const bool need_gu = plan->gu.data != nullptr, need_gx = plan->gx.data != nullptr;
  const bool need_m = need_gx || plan->weight || plan->bias;
  const bool gated = plan->u.data != nullptr, chained = plan->activation != Activation::kNone;
  const bool need_product = need_gu || chained;
  Scratch s;
  place(*plan, static_cast<char*>(scratch), &s);
  const int lines = lines_a_step(3 * co + 2 * ci, (need_product ? prefetch_steps(co, ci, 1) : 0) +
                                                      (need_gx ? prefetch_steps(ci, co, 1) : 0));
  PrefetchQueue queue;
  for_chunks(
      plan->tiling, part,
      [&](const Chunk& chunk) {
        queue.clear();
        fetch_pixels(&queue, plan->grad, chunk, co, false);
        fetch_pixels(&queue, plan->x, chunk, ci, false);
        fetch_pixels(&queue, plan->u, chunk, co, false);
        fetch_pixels(&queue, plan->gu, chunk, co, true);
        fetch_pixels(&queue, plan->gx, chunk, ci, true);
        float *x = s.x + chunk.at, *m = s.m + chunk.at;
        const int64_t first = chunk.first, n = chunk.n;
        const bool as_it_is = need_m && !gated && !chained;
        load_pixels(plan->grad, first, n, co, as_it_is ? m : s.grad,
                    as_it_is ? s.tile_stride : s.chunk_stride);
        if (plan->x.data != nullptr) load_pixels(plan->x, first, n, ci, x, s.tile_stride);
        if (need_product) {
          pointwise_pixels(x, s.tile_stride, plan->forward, s.out, s.chunk_stride, n, &queue,
                           lines);
        }
        if (need_gu) {
          multiply_rows(s.out, s.chunk_stride, s.grad, s.chunk_stride, s.out, s.chunk_stride, co,
                        n);
          store_pixels(plan->gu, first, n, co, s.out, s.chunk_stride);
        }
        if (!need_m) return;
        if (gated) {
          load_pixels(plan->u, first, n, co, s.out, s.chunk_stride);
          multiply_rows(s.out, s.chunk_stride, s.grad, s.chunk_stride, m, s.tile_stride, co, n);
        } else if (chained) {
          chain_rows(plan->activation, s.out, s.grad, s.chunk_stride, m, s.tile_stride, co, n);
        }
        if (need_gx) {
          pointwise_pixels(m, s.tile_stride, plan->transposed, s.out, s.chunk_stride, n, &queue,
                           lines);
          store_pixels(plan->gx, first, n, ci, s.out, s.chunk_stride);
        }
      },
      [&](int64_t pixels) {
        float* sums = plan->sums.data + part * plan->sums.stride;
        const int vecs = static_cast<int>((pixels + kLanes - 1) / kLanes);
        if (plan->weight) outer_product(s.m, s.tile_stride, co, s.x, s.tile_stride, ci, vecs, sums);
        if (plan->bias) row_totals(s.m, s.tile_stride, co, vecs, sums + plan->sums.rows_at);
      });
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
