// Tiles of a few channels x a row of pixels: moving them between an image and float32 scratch, and
// the LayerNorm and depth-wise steps that run on them while they are in cache.
#pragma once

#include "../fused.h"
#include "gelu.h"
#include "pointwise.h"
#include "transpose.h"
#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

// Pixels of one block: few enough that a chain of steps keeps all channels of it in L1.
constexpr int kBlock = 32;
constexpr int kBlockVecs = kBlock / kLanes;
static_assert(kBlock % kLanes == 0 && kBlockVecs % kPointwiseVecs == 0);

SDAN_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Distance in floats between the rows of a tile `width` wide: an odd number of cache lines, so that
// the channels of one pixel spread over the cache's sets.
SDAN_INLINE int64_t tile_stride(int64_t width) {
  const int64_t lines = round_up(width, 16) / 16;
  return 16 * (lines | 1);
}

// Hands out 64-byte aligned pieces of one scratch area; with a null base it only adds up.
struct ScratchCursor {
  char* base;
  int64_t used;

  SDAN_INLINE float* take(int64_t floats) {
    float* p = base == nullptr ? nullptr : reinterpret_cast<float*>(base + used);
    used += round_up(floats * static_cast<int64_t>(sizeof(float)), 64);
    return p;
  }
};

SDAN_INLINE void fill_zero(float* p, int64_t n) {
  std::memset(p, 0, static_cast<size_t>(n) * sizeof(float));
}

// ---- image <-> tile
// ------------------------------------------------------------------------------

// dst[c][0, n) = image row; up to the next multiple of kLanes dst is filled with zeros.
template <typename T>
static void load_tile_as(const ImageView& view, int64_t image, int64_t y, int64_t x,
                         int first_channel, int channels, int64_t n, float* dst,
                         ptrdiff_t dst_stride) {
  const T* src = static_cast<const T*>(view.data) + image * view.stride_n + y * view.stride_h +
                 x * view.stride_w + first_channel * view.stride_c;
  if (view.stride_w == 1) {
    for (int c = 0; c < channels; ++c) {
      const T* s = src + c * view.stride_c;
      float* d = dst + c * dst_stride;
      if (n == kBlock) {
#pragma GCC unroll 8
        for (int v = 0; v < kBlock; v += kLanes) store(d + v, load(s + v));
        continue;
      }
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(d + i, load(s + i));
      if (i < n) store(d + i, load_n(s + i, static_cast<int>(n - i)));
    }
    return;
  }
  if (view.stride_c == 1) {
    for (int c = 0; c < channels; c += kLanes) {
      const int rows = channels - c < kLanes ? channels - c : kLanes;
      for (int64_t i = 0; i < n; i += kLanes) {
        const int pixels = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
        const T* s = src + i * view.stride_w + c;
        Vec r[kLanes];
        for (int k = 0; k < kLanes; ++k) {
          r[k] = k >= pixels      ? zero()
                 : rows == kLanes ? load(s + k * view.stride_w)
                                  : load_n(s + k * view.stride_w, rows);
        }
        transpose(r);
        float* d = dst + c * dst_stride + i;
        for (int k = 0; k < rows; ++k) store(d + k * dst_stride, r[k]);
      }
    }
    return;
  }
  const int64_t padded = round_up(n, kLanes);
  for (int64_t i = 0; i < n; ++i) {
    const T* s = src + i * view.stride_w;
    for (int c = 0; c < channels; ++c) dst[c * dst_stride + i] = to_float(s[c * view.stride_c]);
  }
  for (int c = 0; c < channels; ++c) {
    for (int64_t i = n; i < padded; ++i) dst[c * dst_stride + i] = 0.0f;
  }
}

static inline void load_tile(const ImageView& view, int64_t image, int64_t y, int64_t x,
                             int first_channel, int channels, int64_t n, float* dst,
                             ptrdiff_t dst_stride) {
  switch (view.dtype) {
    case DType::kFloat32:
      load_tile_as<float>(view, image, y, x, first_channel, channels, n, dst, dst_stride);
      break;
    case DType::kBFloat16:
      load_tile_as<bfloat16>(view, image, y, x, first_channel, channels, n, dst, dst_stride);
      break;
    case DType::kFloat16:
      load_tile_as<float16>(view, image, y, x, first_channel, channels, n, dst, dst_stride);
      break;
  }
}

// Image row = src[c][0, n).
// All channels of a tile in pairs (pairs.h).
static inline void load_pair_tile(const ImageView& view, int64_t image, int64_t y, int64_t x,
                                  int channels, int64_t n, float* dst, ptrdiff_t dst_stride) {
#if SDAN_IS_AVX512
  if (view.dtype == DType::kBFloat16 && view.stride_w == 1) {
    const auto* src =
        static_cast<const bfloat16*>(view.data) + image * view.stride_n + y * view.stride_h + x;
    return load_pairs(src, view.stride_c, channels, n, dst, dst_stride);
  }
#endif
  load_tile(view, image, y, x, 0, channels, n, dst, dst_stride);
  pack_pairs(dst, dst_stride, channels, static_cast<int>(round_up(n, kLanes) / kLanes), dst,
             dst_stride);
}

template <typename T>
static void store_tile_as(const ImageView& view, int64_t image, int64_t y, int64_t x,
                          int first_channel, int channels, int64_t n, const float* src,
                          ptrdiff_t src_stride) {
  T* dst = static_cast<T*>(view.data) + image * view.stride_n + y * view.stride_h +
           x * view.stride_w + first_channel * view.stride_c;
  if (view.stride_w == 1) {
    for (int c = 0; c < channels; ++c) {
      const float* s = src + c * src_stride;
      T* d = dst + c * view.stride_c;
      if (n == kBlock) {
#pragma GCC unroll 8
        for (int v = 0; v < kBlock; v += kLanes) store(d + v, load(s + v));
        continue;
      }
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(d + i, load(s + i));
      if (i < n) store_n(d + i, load_n(s + i, static_cast<int>(n - i)), static_cast<int>(n - i));
    }
    return;
  }
  if (view.stride_c == 1) {
    for (int c = 0; c < channels; c += kLanes) {
      const int rows = channels - c < kLanes ? channels - c : kLanes;
      for (int64_t i = 0; i < n; i += kLanes) {
        const int pixels = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
        const float* s = src + c * src_stride + i;
        Vec r[kLanes];
        for (int k = 0; k < kLanes; ++k) {
          r[k] = k >= rows          ? zero()
                 : pixels == kLanes ? load(s + k * src_stride)
                                    : load_n(s + k * src_stride, pixels);
        }
        transpose(r);
        T* d = dst + i * view.stride_w + c;
        for (int k = 0; k < pixels; ++k) {
          if (rows == kLanes) {
            store(d + k * view.stride_w, r[k]);
          } else {
            store_n(d + k * view.stride_w, r[k], rows);
          }
        }
      }
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    T* d = dst + i * view.stride_w;
    for (int c = 0; c < channels; ++c)
      d[c * view.stride_c] = from_float<T>(src[c * src_stride + i]);
  }
}

static inline void store_tile(const ImageView& view, int64_t image, int64_t y, int64_t x,
                              int first_channel, int channels, int64_t n, const float* src,
                              ptrdiff_t src_stride) {
  switch (view.dtype) {
    case DType::kFloat32:
      store_tile_as<float>(view, image, y, x, first_channel, channels, n, src, src_stride);
      break;
    case DType::kBFloat16:
      store_tile_as<bfloat16>(view, image, y, x, first_channel, channels, n, src, src_stride);
      break;
    case DType::kFloat16:
      store_tile_as<float16>(view, image, y, x, first_channel, channels, n, src, src_stride);
      break;
  }
}

// ---- LayerNorm
// -----------------------------------------------------------------------------------

// z[c] = (x[c] - mean) / sqrt(var + eps) over the channels, for V vectors of pixels. A mean far
// above the deviation costs no digits: it is subtracted before squaring, and what its own rounding
// left over, the mean of the differences, is taken off as well. Two sums at a time, to have more
// additions in flight. Meanwhile the lines `ahead` floats further on in x are fetched. With kPairs
// z is written as pairs, and x too, unless `raw` is null.
template <bool kPairs, int V>
static void normalise_vecs(const float* x, ptrdiff_t x_stride, int channels, float eps, float* z,
                           ptrdiff_t z_stride, ptrdiff_t ahead, float* raw) {
  const Vec inverse = set1(1.0f / static_cast<float>(channels));
  Vec sum[2][V], square[2][V], mean[V];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[i][v] = zero();
  }
  const float* p = x;
  int c = 0;
  for (; c + 2 <= channels; c += 2, p += 2 * x_stride) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] = sum[i][v] + load(p + i * x_stride + v * kLanes);
    }
  }
  if (c < channels) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[0][v] = sum[0][v] + load(p + v * kLanes);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    mean[v] = (sum[0][v] + sum[1][v]) * inverse;
    sum[0][v] = sum[1][v] = square[0][v] = square[1][v] = zero();
  }
  p = x;
  for (c = 0; c + 2 <= channels; c += 2, p += 2 * x_stride) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec d = load(p + i * x_stride + v * kLanes) - mean[v];
        sum[i][v] = sum[i][v] + d;
        square[i][v] = fma(d, d, square[i][v]);
      }
    }
  }
  if (c < channels) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec d = load(p + v * kLanes) - mean[v];
      sum[0][v] = sum[0][v] + d;
      square[0][v] = fma(d, d, square[0][v]);
    }
  }
  Vec scale[V], shift[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const Vec rest = (sum[0][v] + sum[1][v]) * inverse;
    const Vec variance = fnma(rest, rest, (square[0][v] + square[1][v]) * inverse);
    scale[v] = set1(1.0f) / sqrt(variance + set1(eps));
    shift[v] = zero() - rest * scale[v];
  }
  p = x;
  float* q = z;
  c = 0;
  if constexpr (kPairs) {
    for (; c < channels; c += 2, p += 2 * x_stride, q += z_stride) {
      const bool both = c + 1 < channels;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec even = load(p + v * kLanes);
        const Vec odd = both ? load(p + x_stride + v * kLanes) : mean[v];
        if (v * kLanes % 16 == 0) {
          __builtin_prefetch(p + v * kLanes + ahead);
          __builtin_prefetch(p + x_stride + v * kLanes + ahead);
        }
        store(q + v * kLanes, make_pairs(fma(even - mean[v], scale[v], shift[v]),
                                         fma(odd - mean[v], scale[v], shift[v])));
        if (raw != nullptr) store(raw + (q - z) + v * kLanes, make_pairs(even, odd));
      }
    }
    return;
  }
  for (; c < channels; ++c, p += x_stride, q += z_stride) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec y = load(p + v * kLanes);
      if (v * kLanes % 16 == 0) __builtin_prefetch(p + v * kLanes + ahead);
      store(q + v * kLanes, fma(y - mean[v], scale[v], shift[v]));
    }
  }
}

template <bool kPairs>
static inline void normalise_block(const float* x, ptrdiff_t x_stride, int channels, float eps,
                                   float* z, ptrdiff_t z_stride, int vecs, ptrdiff_t ahead = 0,
                                   float* raw = nullptr) {
  int v = 0;
  for (; v + 2 <= vecs; v += 2) {
    normalise_vecs<kPairs, 2>(x + v * kLanes, x_stride, channels, eps, z + v * kLanes, z_stride,
                              ahead, raw == nullptr ? raw : raw + v * kLanes);
  }
  for (; v < vecs; ++v) {
    normalise_vecs<kPairs, 1>(x + v * kLanes, x_stride, channels, eps, z + v * kLanes, z_stride,
                              ahead, raw == nullptr ? raw : raw + v * kLanes);
  }
}

// The degree of GELU's polynomials (gelu.h); the coarse one is for values that are rounded to
// bfloat16 afterwards.
template <bool kCoarse>
constexpr int kGeluDegree = kCoarse ? 3 : 4;

template <bool kCoarse, int V>
SDAN_INLINE void gelu_vecs(float* p) {
  Vec x[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) x[v] = load(p + v * kLanes);
  gelu<kGeluDegree<kCoarse>>(x);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) store(p + v * kLanes, x[v]);
}

template <bool kCoarse>
static inline void gelu_block(float* p, ptrdiff_t stride, int channels, int vecs) {
  for (int c = 0; c < channels; ++c) {
    float* q = p + c * stride;
    int v = 0;
    for (; v + 4 <= vecs; v += 4) gelu_vecs<kCoarse, 4>(q + v * kLanes);
    for (; v + 2 <= vecs; v += 2) gelu_vecs<kCoarse, 2>(q + v * kLanes);
    for (; v < vecs; ++v) gelu_vecs<kCoarse, 1>(q + v * kLanes);
  }
}

// ---- the star
// ------------------------------------------------------------------------------------

// A row of all channels; channel_stride is 0 for the row of zeros outside the image.
struct TileRow {
  const float* data;
  ptrdiff_t channel_stride;
};

// out = outer(gelu(s) * b) for V vectors of s.
template <Activation kOuter, bool kCoarse, int V>
SDAN_INLINE void star_store(Vec (&s)[V], const float* b, float* out) {
  gelu<kGeluDegree<kCoarse>>(s);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) s[v] = s[v] * load(b + v * kLanes);
  if constexpr (kOuter == Activation::kGelu) {
    gelu<kGeluDegree<kCoarse>>(s);
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) s[v] = activate<kOuter>(s[v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(out + v * kLanes, s[v]);
}

// out = outer(gelu(out) * b)
template <Activation kOuter, bool kCoarse, int V>
SDAN_INLINE void star_vecs(const float* b, float* out) {
  Vec s[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) s[v] = load(out + v * kLanes);
  star_store<kOuter, kCoarse, V>(s, b, out);
}

// A row of the depth-wise 3x3 convolution of one channel: out = dw(rows) + bias. Each tap column is
// summed over the three rows where it stands, from aligned loads only, and the sums of the outer
// two are shifted by a lane: two shifts a vector, where taps loaded at their own place would be six
// loads that each touch two cache lines. Nothing beyond the `vecs` vectors is read, it counts as
// zero.
static inline void depthwise_row_3x3(const float* const* rows, const float* weight, float bias,
                                     float* out, int vecs) {
  const float *above = rows[0], *middle = rows[1], *below = rows[2];
  Vec w[3][3];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) w[i][j] = set1(weight[3 * i + j]);
  }
  const Vec last = set1(bias);
  Vec before = zero();  // the left column's sums of the vector before;
  Vec left = zero();    // what that vector has of its own result already;
  Vec right = zero();   // its right column's sums, which wait for those of this vector
  const auto step = [&](int v) __attribute__((always_inline)) {
    Vec u[3];
    const Vec a = load(above + v * kLanes), b = load(middle + v * kLanes),
              c = load(below + v * kLanes);
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) u[j] = fma(c, w[2][j], fma(b, w[1][j], a * w[0][j]));
    if (v > 0) store(out + (v - 1) * kLanes, (left + lanes_left(right, u[2])) + last);
    left = u[1] + lanes_right(before, u[0]);
    before = u[0];
    right = u[2];
  };
  step(0);
  int v = 1;
  for (; v + 4 <= vecs; v += 4) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) step(v + k);
  }
  for (; v < vecs; ++v) step(v);
  store(out + (vecs - 1) * kLanes, (left + lanes_left(right, zero())) + last);
}

// out = outer(gelu(dw(rows) + bias) * b) for one channel and `vecs` vectors. rows[i] is already
// advanced to this channel and to this block's first pixel. A loop for each step: one of all of
// them is so long that a processor overlaps hardly any of the next pass with its chain of dependent
// instructions.
template <Activation kOuter, bool kCoarse>
static void star_channel_3x3(const float* const* rows, const float* weight, float bias,
                             const float* b, float* out, int vecs) {
  depthwise_row_3x3(rows, weight, bias, out, vecs);
  int v = 0;
  constexpr bool kTwice = kOuter == Activation::kGelu;
  constexpr Activation kFirst = kTwice ? Activation::kNone : kOuter;
  for (; v + 4 <= vecs; v += 4) star_vecs<kFirst, kCoarse, 4>(b + v * kLanes, out + v * kLanes);
  for (; v + 2 <= vecs; v += 2) star_vecs<kFirst, kCoarse, 2>(b + v * kLanes, out + v * kLanes);
  for (; v < vecs; ++v) star_vecs<kFirst, kCoarse, 1>(b + v * kLanes, out + v * kLanes);
  if constexpr (kTwice) gelu_block<kCoarse>(out, 0, 1, vecs);
}

template <Activation kOuter, bool kCoarse>
static void star_channel_any(const float* const* rows, int kh, int kw, const float* weight,
                             float bias, const float* b, float* out, int vecs) {
  for (int v = 0; v < vecs; ++v) {
    const ptrdiff_t x = v * kLanes - kw / 2;
    Vec s[1] = {set1(bias)};
    for (int i = 0; i < kh; ++i) {
      for (int j = 0; j < kw; ++j)
        s[0] = fma(load(rows[i] + x + j), set1(weight[i * kw + j]), s[0]);
    }
    star_store<kOuter, kCoarse, 1>(s, b + v * kLanes, out + v * kLanes);
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
