// The point-wise half of MM-LKA and what follows it in a block, one block of pixels at a time: the
// gate, and the residual, LayerNorm and running sum behind it.
#include "gate.h"

namespace sdan_fast {
namespace SDAN_ISA {

namespace {

struct GateScratch {
  float *u, *x, *p, *q, *r, *w;
};

int64_t place_gate(const GatePlan& plan, char* base, GateScratch* s) {
  ScratchCursor cursor{base, 0};
  s->u = cursor.take(static_cast<int64_t>(plan.gate.ci) * kBlock);
  const int widest = plan.gate.co > plan.collect.co ? plan.gate.co : plan.collect.co;
  s->x = cursor.take(static_cast<int64_t>(widest) * kBlock);
  s->p = cursor.take(static_cast<int64_t>(plan.gate.co) * kBlock);
  s->q = cursor.take(static_cast<int64_t>(plan.project.co) * kBlock);
  s->r = cursor.take(static_cast<int64_t>(plan.collect.co) * kBlock);
  s->w = cursor.take(static_cast<int64_t>(plan.collect_both ? plan.project.co : 0) * kBlock);
  return cursor.used;
}

// A block of channels x kBlock floats wherever it lies: in the image itself, or in a tile of its
// own.
struct Block {
  float* data;
  ptrdiff_t stride;
};

// The block of `view` from (y, x) on: in place if it is whole and float32 planes, else `tile`.
Block block_of(const ImageView& view, const Region& region, int64_t y, int64_t x, int64_t n,
               float* tile) {
  if (n != kBlock || view.dtype != DType::kFloat32 || view.stride_w != 1) return {tile, kBlock};
  float* data = static_cast<float*>(view.data) + region.n * view.stride_n + y * view.stride_h + x;
  return {data, static_cast<ptrdiff_t>(view.stride_c)};
}

Block load_block(const ImageView& view, const Region& region, int64_t y, int64_t x, int channels,
                 int64_t n, float* tile) {
  const Block block = block_of(view, region, y, x, n, tile);
  if (block.data == tile) load_tile(view, region.n, y, x, 0, channels, n, tile, kBlock);
  return block;
}

void finish_block(const ImageView& view, const Region& region, int64_t y, int64_t x, int channels,
                  int64_t n, const Block& block, const float* tile) {
  if (block.data == tile) store_tile(view, region.n, y, x, 0, channels, n, tile, kBlock);
}

// out = p * x
void multiply_block(const float* p, const Block& x, const Block& out, int channels) {
  for (int c = 0; c < channels; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < kBlock; v += kLanes) {
      store(out.data + c * out.stride + v,
            load(p + c * kBlock + v) * load(x.data + c * x.stride + v));
    }
  }
}

// y = residual + z * weight + bias, written to `out` as well.
void affine_block(const float* z, const Block& residual, const float* weight, const float* bias,
                  const Block& y, const Block& out, int channels) {
  for (int c = 0; c < channels; ++c) {
    const Vec w = set1(weight[c]), b = set1(bias[c]);
#pragma GCC unroll 8
    for (int v = 0; v < kBlock; v += kLanes) {
      const Vec sum =
          fma(load(z + c * kBlock + v), w, b) + load(residual.data + c * residual.stride + v);
      store(y.data + c * y.stride + v, sum);
      store(out.data + c * out.stride + v, sum);
    }
  }
}

// out = p + r
void add_block(const float* p, const Block& r, const Block& out, int channels) {
  for (int c = 0; c < channels; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < kBlock; v += kLanes) {
      store(out.data + c * out.stride + v,
            load(p + c * kBlock + v) + load(r.data + c * r.stride + v));
    }
  }
}

// out = x, or its pairs.
void copy_block(const Block& x, int channels, bool pairs, float* out) {
  if (pairs) return pack_pairs(x.data, x.stride, channels, kBlockVecs, out, kBlock);
  for (int c = 0; c < channels; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < kBlock; v += kLanes) {
      store(out + c * kBlock + v, load(x.data + c * x.stride + v));
    }
  }
}

// out = the 1x1 convolution of a block, in pairs where that takes them.
void multiply(const float* x, const Pointwise& pw, float* out, int vecs, PrefetchQueue* queue,
              int lines) {
  const PointwiseInput in{x, kBlock, tile_rows(pw.ci, pw.pairs)};
  pointwise_block(&in, 1, 0, pw, out, kBlock, vecs, queue, lines);
}

// How many lines to take at a step of the products so that those of a block have asked for as many
// as another block takes.
int lines_a_step(const GatePlan& plan) {
  const int images = 3 + (plan.project.co > 0 ? 1 : 0) + (plan.collect.co > 0 ? 1 : 0);
  const auto steps_of = [](const Pointwise& pw, int inputs) {
    return pw.co > 0 ? prefetch_steps(pw.co, tile_rows(pw.ci / inputs, pw.pairs), inputs) : 0;
  };
  const int steps = (steps_of(plan.gate, 1) + steps_of(plan.project, 1) +
                     steps_of(plan.collect, plan.collect_both ? 2 : 1)) *
                    (kBlockVecs / kPointwiseVecs);
  return (images * plan.gate.co * (kBlock / 16) + steps - 1) / steps;
}

// The n pixels from (y, x) on. `row` takes the result of a plan that projects as well, unless its
// data is null.
void gate_block(const GatePlan& plan, const GateScratch& s, const Region& region, int64_t y,
                int64_t x, int64_t n, PrefetchQueue* queue, int lines, const Block& row) {
  const int channels = plan.gate.co;
  const int vecs = static_cast<int>((n + kLanes - 1) / kLanes);
  if (plan.gate.pairs) {
    load_pair_tile(plan.u, region.n, y, x, plan.gate.ci, n, s.u, kBlock);
  } else {
    load_tile(plan.u, region.n, y, x, 0, plan.gate.ci, n, s.u, kBlock);
  }
  multiply(s.u, plan.gate, s.p, vecs, queue, lines);
  const Block gated = load_block(plan.x, region, y, x, channels, n, s.x);
  if (plan.project.co == 0) {
    const Block out = block_of(plan.out, region, y, x, n, s.p);
    multiply_block(s.p, gated, out, channels);
    finish_block(plan.out, region, y, x, channels, n, out, s.p);
    return;
  }
  multiply_block(s.p, gated, {s.p, kBlock}, channels);
  const int co = plan.project.co;
  if (plan.project.pairs) pack_pairs(s.p, kBlock, channels, vecs, s.p, kBlock);
  multiply(s.p, plan.project, s.q, vecs, queue, lines);
  normalise_block<false>(s.q, kBlock, co, plan.eps, s.q, kBlock, vecs);
  // A whole block's result may go where it is wanted at once; the last of a row might reach beyond.
  const bool direct = row.data != nullptr && n == kBlock;
  const Block result = direct ? row : Block{s.q, kBlock};
  {
    const Block residual = load_block(plan.residual, region, y, x, co, n, s.x);
    if (plan.collect_both) {
      copy_block(residual, co, plan.collect.pairs, s.w);  // `out` may replace it
    }
    const Block out = block_of(plan.out, region, y, x, n, s.q);
    affine_block(s.q, residual, plan.norm_weight, plan.norm_bias, result, out, co);
    finish_block(plan.out, region, y, x, co, n, out, s.q);
  }
  if (row.data != nullptr && !direct) {
    for (int c = 0; c < co; ++c) {
      for (int v = 0; v < vecs; ++v) {
        store(row.data + c * row.stride + v * kLanes, load(s.q + c * kBlock + v * kLanes));
      }
    }
  }
  if (plan.collect.co == 0) return;
  const int collected = plan.collect.co;
  const bool pairs = plan.collect.pairs;
  if (pairs) pack_pairs(result.data, result.stride, co, vecs, s.q, kBlock);
  const int rows = tile_rows(co, pairs);
  const PointwiseInput both[2] = {
      {s.w, kBlock, rows}, {pairs ? s.q : result.data, pairs ? kBlock : result.stride, rows}};
  pointwise_block(plan.collect_both ? both : both + 1, plan.collect_both ? 2 : 1, 0, plan.collect,
                  s.r, kBlock, vecs, queue, lines);
  const Block sum = block_of(plan.collected, region, y, x, n, s.r);
  if (plan.collect_first) {
    alignas(64) float zeros[kBlock] = {};
    add_block(s.r, {zeros, 0}, sum, collected);
  } else {
    add_block(s.r, load_block(plan.collected, region, y, x, collected, n, s.x), sum, collected);
  }
  finish_block(plan.collected, region, y, x, collected, n, sum, s.r);
}

}  // namespace

void gate_prefetch(const GatePlan& plan, int64_t image, int64_t y, int64_t x, int64_t n,
                   PrefetchQueue* queue) {
  const int channels = plan.gate.co;
  queue->add(plan.u, image, y, x, plan.gate.ci, n, false);
  queue->add(plan.x, image, y, x, channels, n, false);
  if (plan.project.co > 0) {
    queue->add(plan.residual, image, y, x, plan.project.co, n, plan.out.data == plan.residual.data);
  }
  if (plan.collect.co > 0) queue->add(plan.collected, image, y, x, plan.collect.co, n, true);
  if (plan.out.data != plan.u.data && plan.out.data != plan.residual.data) {
    queue->add(plan.out, image, y, x, channels, n, true);
  }
}

void gate_scratch(const GatePlan* plan, int64_t* bytes) {
  GateScratch s;
  *bytes = place_gate(*plan, nullptr, &s);
}

void gate_run(const GatePlan* plan, const Region* region, void* scratch) {
  const TileScope tiles(plan->gate);
  GateScratch s;
  place_gate(*plan, static_cast<char*>(scratch), &s);
  PrefetchQueue queue;
  const int lines = lines_a_step(*plan);
  const int64_t width = region->x1 - region->x0;
  for (int64_t y = region->y0; y < region->y1; ++y) {
    // The products of a row ask for the next one.
    queue.clear();
    if (y + 1 < region->y1) gate_prefetch(*plan, region->n, y + 1, region->x0, width, &queue);
    for (int64_t x = region->x0; x < region->x1; x += kBlock) {
      const int64_t n = region->x1 - x < kBlock ? region->x1 - x : kBlock;
      gate_block(*plan, s, *region, y, x, n, &queue, lines, {nullptr, 0});
    }
  }
}

void gate_row(const GatePlan& plan, int64_t image, int64_t y, void* scratch, float* row,
              ptrdiff_t stride) {
  GateScratch s;
  place_gate(plan, static_cast<char*>(scratch), &s);
  const Region region{image, y, y + 1, 0, plan.width};
  PrefetchQueue queue;
  queue.clear();
  const int lines = lines_a_step(plan);
  for (int64_t x = 0; x < plan.width; x += kBlock) {
    const int64_t n = plan.width - x < kBlock ? plan.width - x : kBlock;
    if (x % kGateAhead == 0 && x + kGateAhead < plan.width) {
      const int64_t next = x + kGateAhead, left = plan.width - next;
      queue.clear();
      gate_prefetch(plan, image, y, next, left < kGateAhead ? left : kGateAhead, &queue);
    }
    gate_block(plan, s, region, y, x, n, &queue, lines, {row + x, stride});
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
