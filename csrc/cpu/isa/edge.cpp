// The two ends of the network, streamed over image rows: a blueprint convolution (1x1, then
// depth-wise 3x3) with the activation before it and the residual after it, and the dense 3x3
// convolution with its pixel shuffle. Rings of rows between the steps, as in star_levels.cpp.
//
// The dense convolution computes two rows at a time by Winograd's F(2, 3): of the four input rows d
// that two output rows see, d0 - d2, d1 + d2, d2 - d1 and d1 - d3 are multiplied by combinations of
// the three weights of a column, and sums of the four products are the two rows: two thirds of the
// multiply-adds. Rounding errors grow by about a quarter, since the terms do: in the mean square,
// 5 to 3.
#include "band.h"
#include "by_dtype.h"

namespace sdan_fast {
namespace SDAN_ISA {

namespace {

constexpr int kMargin = 16;
constexpr int kRingA = 3, kRingF = 4;

// A block of combined input rows with the columns next to it.
constexpr int kSumsStride = kBlock + 2 * kMargin;

struct EdgeBand {
  const EdgePlan* plan;
  Region region;
  int64_t x0, width;  // the tile's columns, halo included
  int64_t next;       // the first row of output that is not computed yet
  bool right_edge;
  int vecs;
  int64_t stride;  // of rows with margins
  float *x, *a, *f, *block, *zeros;
  float* sums;      // four combinations of input rows x channels x kSumsStride
  float* parts[4];  // their products
};

int64_t place(const EdgePlan& plan, int64_t width, char* base, EdgeBand* band) {
  ScratchCursor cursor{base, 0};
  const int64_t padded = round_up(width, kLanes);
  band->vecs = static_cast<int>(padded / kLanes);
  band->stride = tile_stride(padded + 2 * kMargin);
  band->x = cursor.take(band->stride * plan.pw.ci);
  band->a = cursor.take(band->stride * kRingA * plan.pw.co);
  band->f = cursor.take(band->stride * kRingF * plan.pw.co);
  band->block = cursor.take(static_cast<int64_t>(plan.up.co) * kBlock);
  band->sums = cursor.take(plan.up.co > 0 ? 4 * static_cast<int64_t>(plan.pw.co) * kSumsStride : 0);
  for (float*& part : band->parts) part = cursor.take(static_cast<int64_t>(plan.up.co) * kBlock);
  band->zeros = cursor.take(band->stride);
  return cursor.used;
}

SDAN_INLINE int block_vecs(const EdgeBand& band, int block) {
  const int left = band.vecs - block * kBlockVecs;
  return left < kBlockVecs ? left : kBlockVecs;
}

// What lies outside the image on the right is zero to the next convolution.
void clear_tail(const EdgeBand& band, float* row, int channels) {
  if (!band.right_edge) return;
  const int64_t tail = static_cast<int64_t>(band.vecs) * kLanes - band.width;
  for (int c = 0; c < channels; ++c) fill_zero(row + c * band.stride + band.width, tail);
}

TileRow ring_row(const EdgeBand& band, const float* ring, int rows, int64_t y) {
  if (y < 0 || y >= band.plan->height) return {band.zeros + kMargin, 0};
  return {ring + (y % rows) * band.plan->pw.co * band.stride + kMargin,
          static_cast<ptrdiff_t>(band.stride)};
}

void depthwise_row(const EdgeBand& band, int64_t q, float* out) {
  const EdgePlan& plan = *band.plan;
  TileRow rows[3];
  for (int i = 0; i < 3; ++i) rows[i] = ring_row(band, band.a, kRingA, q - 1 + i);
  for (int c = 0; c < plan.pw.co; ++c) {
    const float* at[3];
    for (int i = 0; i < 3; ++i) at[i] = rows[i].data + c * rows[i].channel_stride;
    depthwise_row_3x3(at, plan.dw + c * 9, plan.dw_bias[c], out + c * band.stride, band.vecs);
  }
}

// out[c][y s + i][x s + j] = block[c s^2 + i s + j][x]
template <typename T>
void shuffle_as(const EdgePlan& plan, int64_t n, int64_t y, int64_t x, int64_t count,
                const float* block) {
  const int s = plan.scale;
  const ImageView& out = plan.out;
  for (int m = 0; m < plan.up.co; ++m) {
    const int c = m / (s * s), i = m / s % s, j = m % s;
    T* p = static_cast<T*>(out.data) + n * out.stride_n + c * out.stride_c +
           (y * s + i) * out.stride_h + (x * s + j) * out.stride_w;
    const float* b = block + m * kBlock;
    const int64_t step = s * out.stride_w;
    for (int64_t k = 0; k < count; ++k) p[k * step] = from_float<T>(b[k]);
  }
}

void shuffle(const EdgePlan& plan, int64_t n, int64_t y, int64_t x, int64_t count,
             const float* block) {
  by_dtype(plan.out.dtype, [&](auto t) { shuffle_as<decltype(t)>(plan, n, y, x, count, block); });
}

// f(column, vecs, begin, end) for every block of the tile that has columns [begin, end) of output.
template <typename F>
void for_each_block(const EdgeBand& band, const F& f) {
  const int64_t skip = band.region.x0 - band.x0;
  const int64_t limit = skip + band.region.x1 - band.region.x0;
  const int blocks = (band.vecs + kBlockVecs - 1) / kBlockVecs;
  for (int j = 0; j < blocks; ++j) {
    const int64_t column = static_cast<int64_t>(j) * kBlock;
    const int vecs = block_vecs(band, j);
    const int64_t begin = column > skip ? column : skip;
    const int64_t end = column + vecs * kLanes < limit ? column + vecs * kLanes : limit;
    if (begin < end) f(column, vecs, begin, end);
  }
}

// Row p of the output before its shuffle.
void up_row(EdgeBand& band, int64_t p) {
  const EdgePlan& plan = *band.plan;
  PointwiseInput inputs[9];
  for (int i = 0; i < 3; ++i) {
    const TileRow row = ring_row(band, band.f, kRingF, p - 1 + i);
    for (int j = 0; j < 3; ++j)
      inputs[3 * i + j] = {row.data + j - 1, row.channel_stride, plan.pw.co};
  }
  for_each_block(band, [&](int64_t column, int vecs, int64_t begin, int64_t end) {
    pointwise_block(inputs, 9, column, plan.up, band.block, kBlock, vecs);
    shuffle(plan, band.region.n, p, band.x0 + begin, end - begin, band.block + (begin - column));
  });
}

// The combinations of rows p - 1 to p + 2 of f for a block of columns and a margin on both sides.
void combine_rows(const EdgeBand& band, int64_t p, int64_t column, int vecs) {
  const int channels = band.plan->pw.co;
  TileRow d[4];
  for (int i = 0; i < 4; ++i) d[i] = ring_row(band, band.f, kRingF, p - 1 + i);
  const int64_t part = static_cast<int64_t>(channels) * kSumsStride;
  const int64_t width = vecs * kLanes + 2 * kMargin;
  for (int c = 0; c < channels; ++c) {
    const float* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = d[i].data + c * d[i].channel_stride + column - kMargin;
    float* out = band.sums + static_cast<int64_t>(c) * kSumsStride;
    for (int64_t x = 0; x < width; x += kLanes) {
      const Vec d0 = load(rows[0] + x), d1 = load(rows[1] + x), d2 = load(rows[2] + x),
                d3 = load(rows[3] + x);
      store(out + x, d0 - d2);
      store(out + part + x, d1 + d2);
      store(out + 2 * part + x, d2 - d1);
      store(out + 3 * part + x, d1 - d3);
    }
  }
}

// Rows p and p + 1 of the output before its shuffle.
void up_two_rows(EdgeBand& band, int64_t p) {
  const EdgePlan& plan = *band.plan;
  const int channels = plan.pw.co;
  for_each_block(band, [&](int64_t column, int vecs, int64_t begin, int64_t end) {
    combine_rows(band, p, column, vecs);
    for (int k = 0; k < 4; ++k) {
      const float* sums = band.sums + static_cast<int64_t>(k) * channels * kSumsStride + kMargin;
      const PointwiseInput inputs[3] = {{sums - 1, kSumsStride, channels},
                                        {sums, kSumsStride, channels},
                                        {sums + 1, kSumsStride, channels}};
      pointwise_block(inputs, 3, 0, plan.up_two[k], band.parts[k], kBlock, vecs);
    }
    for (int64_t i = 0; i < static_cast<int64_t>(plan.up.co) * kBlock; i += kLanes) {
      const Vec first = load(band.parts[1] + i), second = load(band.parts[2] + i);
      store(band.parts[0] + i, (load(band.parts[0] + i) + second) + first);
      store(band.parts[3] + i, (first - second) - load(band.parts[3] + i));
    }
    const int64_t n = band.region.n, at = begin - column;
    shuffle(plan, n, p, band.x0 + begin, end - begin, band.parts[0] + at);
    shuffle(plan, n, p + 1, band.x0 + begin, end - begin, band.parts[3] + at);
  });
}

// Row q of f, once the rows of `a` around it are there; then what it completes of `up`.
void f_row(EdgeBand& band, int64_t q) {
  const EdgePlan& plan = *band.plan;
  const int channels = plan.pw.co;
  float* f = band.f + (q % kRingF) * channels * band.stride + kMargin;
  depthwise_row(band, q, f);
  if (plan.residual.data != nullptr) {
    // The first row of x is free by now and takes the residual, one channel at a time.
    for (int c = 0; c < channels; ++c) {
      load_tile(plan.residual, band.region.n, q, band.x0, c, 1, band.width, band.x, 0);
      float* row = f + c * band.stride;
      for (int v = 0; v < band.vecs; ++v) {
        store(row + v * kLanes, load(row + v * kLanes) + load(band.x + v * kLanes));
      }
    }
  }
  if (plan.up.co == 0) {
    store_tile(plan.out, band.region.n, q, band.region.x0, 0, channels,
               band.region.x1 - band.region.x0, f + (band.region.x0 - band.x0), band.stride);
    return;
  }
  clear_tail(band, f, channels);
  // Two rows once the one below them is there, or the image ends; one where the region has no
  // second.
  const bool last = q + 1 == plan.height;
  int64_t& p = band.next;
  while (p < band.region.y1 && (p + 1 < q || last)) {
    if (p + 1 < band.region.y1) {
      up_two_rows(band, p);
      p += 2;
    } else {
      up_row(band, p++);
    }
  }
  if (p + 1 == band.region.y1 && p + 1 == q) up_row(band, p++);
}

SDAN_INLINE int64_t clip(int64_t v, int64_t low, int64_t high) {
  return v < low ? low : (v > high ? high : v);
}

}  // namespace

void edge_scratch(const EdgePlan* plan, int64_t width, int64_t* bytes) {
  EdgeBand band;
  const int64_t halo = plan->up.co > 0 ? 2 : 1;
  *bytes =
      place(*plan, width + 2 * halo < plan->width ? width + 2 * halo : plan->width, nullptr, &band);
}

void edge_run(const EdgePlan* plan, const Region* region, void* scratch) {
  EdgeBand band;
  band.plan = plan;
  band.region = *region;
  const int64_t halo = plan->up.co > 0 ? 2 : 1;
  band.x0 = clip(region->x0 - halo, 0, plan->width);
  const int64_t x1 = clip(region->x1 + halo, 0, plan->width);
  band.width = x1 - band.x0;
  band.right_edge = x1 == plan->width;
  place(*plan, band.width, static_cast<char*>(scratch), &band);
  const int co = plan->pw.co;
  fill_zero(band.zeros, band.stride);
  const int64_t padded = static_cast<int64_t>(band.vecs) * kLanes;
  const auto clear_margins = [&](float* ring, int rows) {
    for (int64_t r = 0; r < static_cast<int64_t>(rows) * co; ++r) {
      fill_zero(ring + r * band.stride, kMargin);
      fill_zero(ring + r * band.stride + kMargin + padded, band.stride - kMargin - padded);
    }
  };
  clear_margins(band.a, kRingA);
  clear_margins(band.f, kRingF);
  band.next = region->y0;
  const int64_t f_begin = clip(region->y0 - (halo - 1), 0, plan->height);
  const int64_t f_end = clip(region->y1 + (halo - 1), 0, plan->height);
  const int64_t a_begin = clip(f_begin - 1, 0, plan->height);
  const int64_t a_end = clip(f_end + 1, 0, plan->height);
  const int blocks = (band.vecs + kBlockVecs - 1) / kBlockVecs;
  for (int64_t y = a_begin; y < a_end; ++y) {
    load_tile(plan->x, region->n, y, band.x0, 0, plan->pw.ci, band.width, band.x, band.stride);
    float* a = band.a + (y % kRingA) * co * band.stride + kMargin;
    const PointwiseInput in{band.x, static_cast<ptrdiff_t>(band.stride), plan->pw.ci};
    for (int j = 0; j < blocks; ++j) {
      const int64_t column = static_cast<int64_t>(j) * kBlock;
      const int vecs = block_vecs(band, j);
      if (plan->gelu_input) gelu_block<false>(band.x + column, band.stride, plan->pw.ci, vecs);
      pointwise_block(&in, 1, column, plan->pw, a + column, band.stride, vecs);
    }
    clear_tail(band, a, co);
    if (y - 1 >= f_begin && y - 1 < f_end) f_row(band, y - 1);
    if (y + 1 == plan->height && y < f_end) f_row(band, y);
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
