// activation(1x1 convolution of x) in one pass over memory, chunk by chunk of the batch's pixels.
#include "activate.h"
#include "pixel_tiles.h"

namespace sdan_fast {
namespace SDAN_ISA {

namespace {

struct Scratch {
  float *x, *y;
  ptrdiff_t stride;
};

int64_t place(const PointwiseConvPlan& plan, char* base, Scratch* s) {
  ScratchCursor cursor{base, 0};
  s->stride = pixel_tile_stride(kChunk);
  s->x = cursor.take(plan.conv.ci * s->stride);
  s->y = cursor.take(plan.conv.co * s->stride);
  return cursor.used;
}

void activate_rows(Activation activation, float* x, ptrdiff_t stride, int rows, int64_t n) {
  if (activation == Activation::kNone) return;
  constexpr int V = 2;
  for (int c = 0; c < rows; ++c, x += stride) {
    for (int64_t i = 0; i < n; i += V * kLanes) {
      Vec v[V] = {load(x + i), load(x + i + kLanes)};
      activate_switch(activation, v);
      store(x + i, v[0]);
      store(x + i + kLanes, v[1]);
    }
  }
}

}  // namespace

void pointwise_conv2d_scratch(const PointwiseConvPlan* plan, int64_t* bytes) {
  Scratch s;
  *bytes = place(*plan, nullptr, &s);
}

void pointwise_conv2d_run(const PointwiseConvPlan* plan, int64_t part, void* scratch) {
  const Pointwise& conv = plan->conv;
  Scratch s;
  place(*plan, static_cast<char*>(scratch), &s);
  const int lines =
      lines_a_step(conv.co + conv.ci, prefetch_steps(conv.co, tile_rows(conv.ci, conv.pairs), 1));
  PrefetchQueue queue;
  for_chunks(
      plan->tiling, part,
      [&](const Chunk& chunk) {
        queue.clear();
        fetch_pixels(&queue, plan->x, chunk, conv.ci, false);
        fetch_pixels(&queue, plan->y, chunk, conv.co, true);
        load_pixels(plan->x, chunk.first, chunk.n, conv.ci, s.x, s.stride);
        if (conv.pairs) {
          const int vecs = static_cast<int>((chunk.n + kLanes - 1) / kLanes);
          pack_pairs(s.x, s.stride, conv.ci, vecs, s.x, s.stride);
        }
        pointwise_pixels(s.x, s.stride, conv, s.y, s.stride, chunk.n, &queue, lines);
        activate_rows(plan->activation, s.y, s.stride, conv.co, chunk.n);
        store_pixels(plan->y, chunk.first, chunk.n, conv.co, s.y, s.stride);
      },
      [](int64_t) {});
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
