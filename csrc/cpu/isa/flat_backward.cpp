// The gradients of a depth-wise filter of few taps and of its bias, of channels_last images that
// are read where they lie:
//
//   sums[i][j][c] = sum over h, p of grad[h][p][c] x[h + i dh - pad_h][p + j dw - pad_w][c],
//
// pixels outside the image left out. A unit is the fewest pixels that whole vectors cover, so that
// a lane is a channel; a vector of the gradient, once loaded, serves all taps, whose sums over a
// chunk of units stay in registers. Those of some 64 chunks are added up in float32, the rest in
// double.
#include "flat.h"

#include "flat_conv.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

// Where the taps of a part are: floats from the gradient's place to the input's, and which they
// are.
struct PartTaps {
  int count;
  ptrdiff_t from[kMostFlatTaps];
  int which[kMostFlatTaps];
};

// totals[which] += the sums of one vector of `units` units.
template <int T>
SDAN_INLINE void chunk_sums(const PartTaps& taps, const float* grad, const float* x, ptrdiff_t unit,
                            int64_t units, float* totals) {
  // Fewer sums than multiply-adds under way at once are split.
  constexpr int kSplit = T >= 6 ? 1 : (T >= 3 ? 2 : 4);
  Vec acc[kSplit][T];
#pragma GCC unroll 4
  for (int k = 0; k < kSplit; ++k) {
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) acc[k][t] = zero();
  }
  const auto add = [&](int k) __attribute__((always_inline)) {
    const Vec g = load(grad);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) acc[k][t] = fma(load(x + taps.from[t]), g, acc[k][t]);
    grad += unit, x += unit;
  };
  int64_t u = 0;
  for (; u + kSplit <= units; u += kSplit) {
#pragma GCC unroll 4
    for (int k = 0; k < kSplit; ++k) add(k);
  }
  for (; u < units; ++u) add(0);
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
    float* total = totals + taps.which[t] * kLanes;
    Vec sum = acc[0][t];
#pragma GCC unroll 4
    for (int k = 1; k < kSplit; ++k) sum = sum + acc[k][t];
    store(total, load(total) + sum);
  }
}

template <int T>
SDAN_INLINE void any_chunk_sums(const PartTaps& taps, const float* grad, const float* x,
                                ptrdiff_t unit, int64_t units, float* totals) {
  if (taps.count == T) {
    chunk_sums<T>(taps, grad, x, unit, units, totals);
  } else if constexpr (T > 1) {
    any_chunk_sums<T - 1>(taps, grad, x, unit, units, totals);
  }
}

class StripSums {
 public:
  // In the thread's scratch.
  explicit StripSums(const FlatSums& a)
      : a_(a), row_(a.w * a.c), count_(static_cast<int>(a.kh * a.kw) + 1) {
    unit_ = 1;
    while (unit_ * a.c % kLanes != 0) unit_ *= 2;
    vecs_ = unit_ * a.c / kLanes;
    // What the chunk's taps see stays in a first-level cache.
    const int64_t chunk = 4096 / ((a.kh + 1) * unit_ * a.c);
    chunk_ = chunk < 4 ? 4 : (chunk > 16 ? 16 : chunk);
    const int64_t chunks = (a.w / unit_ + chunk_ - 1) / chunk_;
    rows_ = chunks < 64 ? 64 / (chunks + 1) + 1 : 1;
    floats_ = vecs_ * count_ * kLanes;
    wide_ = static_cast<double*>(
        thread_scratch(static_cast<size_t>(floats_) * (sizeof(double) + sizeof(float))));
    totals_ = reinterpret_cast<float*>(wide_ + floats_);
  }

  // Rows [h0, h1) of image n.
  void run(int64_t n, int64_t h0, int64_t h1, double* sums) {
    const float* x = a_.x + n * a_.h * row_;
    const float* grad = a_.grad + n * a_.h * row_;
    for (int64_t i = 0; i < floats_; ++i) wide_[i] = 0.0, totals_[i] = 0.0f;
    for (int64_t h = h0; h < h1; ++h) {
      if (a_.weights) add_row(x + h * row_, grad + h * row_, h);
      if (a_.bias) add_bias(grad + h * row_);
      if ((h - h0 + 1) % rows_ != 0 && h + 1 < h1) continue;
      for (int64_t i = 0; i < floats_; ++i) {
        wide_[i] += static_cast<double>(totals_[i]);
        totals_[i] = 0.0f;
      }
    }
    for (int t = 0; t < count_; ++t) {
      for (int64_t c = 0; c < a_.c; ++c) {
        double sum = 0.0;
        for (int64_t at = c; at < vecs_ * kLanes; at += a_.c) {
          sum += wide_[(at / kLanes * count_ + t) * kLanes + at % kLanes];
        }
        sums[t * a_.c + c] = sum;
      }
    }
  }

 private:
  void add_row(const float* x, const float* grad, int64_t h) {
    const int64_t pad_h = (a_.kh - 1) / 2 * a_.dh, pad_w = (a_.kw - 1) / 2 * a_.dw;
    const int64_t i0 = ceil_div(pad_h - h, a_.dh);
    int64_t i1 = ceil_div(a_.h + pad_h - h, a_.dh);
    if (i1 > a_.kh) i1 = a_.kh;
    const float* last = x + ((i1 - 1) * a_.dh - pad_h) * row_;
    for_each_part(a_.w, static_cast<int>(a_.kw), a_.dw, 0, a_.w,
                  [&](int64_t p, int64_t columns, int j0, int j1) {
                    PartTaps taps = {};
                    for (int64_t i = i0; i < i1; ++i) {
                      for (int64_t j = j0; j < j1; ++j) {
                        taps.from[taps.count] =
                            (i * a_.dh - pad_h) * row_ + (j * a_.dw - pad_w) * a_.c;
                        taps.which[taps.count++] = static_cast<int>(i * a_.kw + j);
                      }
                    }
                    add_part(taps, x + p * a_.c, last + p * a_.c, grad + p * a_.c, columns);
                  });
  }

  // `last`: the last row that the taps see, which no row before has seen.
  void add_part(const PartTaps& taps, const float* x, const float* last, const float* grad,
                int64_t columns) {
    const ptrdiff_t unit = unit_ * a_.c;
    for (int64_t left = columns / unit_; left > 0; left -= chunk_) {
      const int64_t units = left < chunk_ ? left : chunk_;
      last += units * unit;
      for (int64_t q = 0; q < vecs_; ++q) {
        // A part of the next chunk's lines, which no prefetcher makes out in such steps.
        for (int64_t k = q * units * kLanes; k < (q + 1) * units * kLanes; k += 16) {
          __builtin_prefetch(grad + units * unit + k);
          __builtin_prefetch(last + k);
        }
        any_chunk_sums<kMostFlatTaps>(taps, grad + q * kLanes, x + q * kLanes, unit, units,
                                      totals_ + q * count_ * kLanes);
      }
      x += units * unit, grad += units * unit;
    }
    const int64_t floats = columns % unit_ * a_.c;
    for (int64_t at = 0; at < floats; at += kLanes) {
      const int lanes = static_cast<int>(floats - at < kLanes ? floats - at : kLanes);
      const Vec g = load_n(grad + at, lanes);
      float* totals = totals_ + at * count_;
      for (int t = 0; t < taps.count; ++t) {
        float* total = totals + taps.which[t] * kLanes;
        store(total, fma(load_n(x + at + taps.from[t], lanes), g, load(total)));
      }
    }
  }

  void add_bias(const float* grad) {
    const ptrdiff_t unit = unit_ * a_.c;
    float* totals = totals_ + (count_ - 1) * kLanes;
    for (int64_t left = a_.w / unit_; left > 0; left -= chunk_) {
      const int64_t units = left < chunk_ ? left : chunk_;
      for (int64_t q = 0; q < vecs_; ++q) {
        Vec sum = zero();
        for (int64_t u = 0; u < units; ++u) sum = sum + load(grad + u * unit + q * kLanes);
        float* total = totals + q * count_ * kLanes;
        store(total, load(total) + sum);
      }
      grad += units * unit;
    }
    const int64_t floats = a_.w % unit_ * a_.c;
    for (int64_t at = 0; at < floats; at += kLanes) {
      const int lanes = static_cast<int>(floats - at < kLanes ? floats - at : kLanes);
      float* total = totals + at * count_;
      store(total, load(total) + load_n(grad + at, lanes));
    }
  }

  const FlatSums& a_;
  int64_t row_;  // floats
  int count_;    // sums of a channel
  int64_t unit_, vecs_, chunk_;
  int64_t rows_;  // whose sums are added up in float32
  int64_t floats_;
  double* wide_;
  float* totals_;  // of a unit's vectors, one after the other, count_ vectors each
};

void run(const FlatSums& a, int64_t begin, int64_t end) {
  StripSums strip(a);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t h0 = t % a.strips * a.strip_rows;
    const int64_t h1 = a.h - h0 < a.strip_rows ? a.h : h0 + a.strip_rows;
    strip.run(t / a.strips, h0, h1, a.sums + t * (a.kh * a.kw + 1) * a.c);
  }
}

}  // namespace

void flat_sums_run(const FlatSums& args, int64_t begin, int64_t end) {
  run(args, begin, end);
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
