// A chain of strip convolutions on a channels_last image that is read in place, a band of rows at a
// time.
//
// The strips run in their own order, so that biases need no care. Between a stage's horizontal and
// its vertical strip lies a window of rows that slides down the image; what the vertical strip of
// one stage makes goes through a band of rows into the next stage's window. 16-bit numbers become
// float32 in that band before the first stage, and 16-bit ones after the last.
#include <cstring>
#include <type_traits>

#include "by_dtype.h"
#include "flat.h"
#include "flat_conv.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

// One stage. The window holds rows [first, last) of what its horizontal strip makes.
struct Stage {
  FlatConv<float> horizontal, vertical;
  float* rows;
  int64_t capacity, first, last;
};

SDAN_INLINE int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

Stage stage_geometry(const StripChainArgs& a, int64_t s) {
  const StripArgs& h = a.horizontal[s];
  const StripArgs& v = a.vertical[s];
  Stage stage = {};
  stage.horizontal = flat_geometry<float>(a.h, a.w, a.c, {1, h.used, 1, h.d});
  stage.vertical = flat_geometry<float>(a.h, a.w, a.c, {v.used, 1, v.d, 1});
  stage.capacity = strip_level_rows(a.band, 2 * stage.vertical.pad_h);
  if (stage.capacity > a.h) stage.capacity = a.h;
  return stage;
}

int64_t stage_floats(const StripChainArgs& a, const Stage& stage) {
  return round_up(stage.capacity * a.w * a.c, kLanes) + flat_floats(stage.horizontal) +
         flat_floats(stage.vertical);
}

template <typename T>
class Chain {
 public:
  // In the thread's scratch.
  explicit Chain(const StripChainArgs& a) : a_(a), row_(a.w * a.c) {
    const int64_t stage_bytes = round_up(static_cast<int64_t>(sizeof(Stage)) * a.stages, 64);
    int64_t floats = a.band * row_;
    for (int64_t s = 0; s < a.stages; ++s) floats += stage_floats(a, stage_geometry(a, s));
    char* scratch = static_cast<char*>(thread_scratch(
        static_cast<size_t>(stage_bytes + floats * static_cast<int64_t>(sizeof(float)))));
    stages_ = reinterpret_cast<Stage*>(scratch);
    float* out = reinterpret_cast<float*>(scratch + stage_bytes);
    for (int64_t s = 0; s < a.stages; ++s) {
      const StripArgs& h = a.horizontal[s];
      const StripArgs& v = a.vertical[s];
      Stage& stage = stages_[s] = stage_geometry(a, s);
      stage_flat<float, T>(
          stage.horizontal, out,
          {static_cast<const T*>(h.weight) + h.first, h.k, h.k, static_cast<const T*>(h.bias)});
      stage_flat<float, T>(
          stage.vertical, out + flat_floats(stage.horizontal),
          {static_cast<const T*>(v.weight) + v.first, v.k, 1, static_cast<const T*>(v.bias)});
      stage.rows = out + flat_floats(stage.horizontal) + flat_floats(stage.vertical);
      out += stage_floats(a, stage);
    }
    band_ = out;
  }

  // Rows [h0, h1) of image n.
  void run(int64_t n, int64_t h0, int64_t h1) {
    const int64_t image = n * a_.h * row_;
    x_ = static_cast<const T*>(a_.x) + image;
    T* y = static_cast<T*>(a_.y) + image;
    int64_t pad = a_.halo_h / 2;
    for (int64_t s = 0; s < a_.stages; ++s) {
      stages_[s].first = stages_[s].last = h0 > pad ? h0 - pad : 0;
      pad -= stages_[s].vertical.pad_h;
    }
    for (int64_t h = h0; h < h1; h += a_.band) {
      const int64_t end = h1 - h < a_.band ? h1 : h + a_.band;
      if constexpr (kFloat) {
        if (a_.gate == nullptr) {
          vertical(a_.stages - 1, h, end, y);
          continue;
        }
      }
      vertical(a_.stages - 1, h, end, band_ - h * row_);
      const T* gate = static_cast<const T*>(a_.gate);
      finish(gate == nullptr ? nullptr : gate + image + h * row_, y + h * row_, (end - h) * row_);
    }
  }

 private:
  static constexpr bool kFloat = std::is_same_v<T, float>;

  // Rows [from, to) of what stage s makes, where `y` is the image that they belong to.
  void vertical(int64_t s, int64_t from, int64_t to, float* y) {
    Stage& stage = stages_[s];
    const int64_t pad = stage.vertical.pad_h;
    fill(s, from > pad ? from - pad : 0, a_.h - to < pad ? a_.h : to + pad);
    stage.vertical.x = stage.rows - stage.first * row_;
    stage.vertical.y = y;
    flat_image_rows(stage.vertical, from, to);
  }

  // The window of stage s shall hold rows [from, to), the last of which it may lack.
  void fill(int64_t s, int64_t from, int64_t to) {
    Stage& stage = stages_[s];
    if (to - stage.first > stage.capacity) {
      std::memmove(stage.rows, stage.rows + (from - stage.first) * row_,
                   static_cast<size_t>((stage.last - from) * row_) * sizeof(float));
      stage.first = from;
    }
    stage.horizontal.y = stage.rows - stage.first * row_;
    while (stage.last < to) {
      int64_t end = to;
      if (s == 0 && kFloat) {
        stage.horizontal.x = reinterpret_cast<const float*>(x_);
      } else {
        if (end - stage.last > a_.band) end = stage.last + a_.band;
        float* image = band_ - stage.last * row_;
        if (s == 0) {
          widen(x_ + stage.last * row_, (end - stage.last) * row_);
        } else {
          vertical(s - 1, stage.last, end, image);
        }
        stage.horizontal.x = image;
      }
      flat_image_rows(stage.horizontal, stage.last, end);
      stage.last = end;
    }
  }

  void widen(const T* x, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(band_ + i, load(x + i));
    for (; i < n; ++i) band_[i] = to_float(x[i]);
  }

  // The band, times `gate` unless that is null.
  void finish(const T* gate, T* y, int64_t n) const {
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t at = i + kLanes <= n ? i : n - kLanes;
      const Vec sums = load(band_ + at);
      store(y + at, gate == nullptr ? sums : sums * load(gate + at));
    }
  }

  const StripChainArgs& a_;
  int64_t row_;  // elements
  Stage* stages_;
  const T* x_;   // the image
  float* band_;  // rows on their way to the next stage or out
};

template <typename T>
void run(const StripChainArgs& a, int64_t begin, int64_t end) {
  Chain<T> chain(a);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t h0 = t % a.grid.tiles_h * a.grid.tile_h;
    chain.run(t / a.grid.tiles_h, h0, a.h - h0 < a.grid.tile_h ? a.h : h0 + a.grid.tile_h);
  }
}

}  // namespace

void flat_chain_run(const StripChainArgs& args, int64_t begin, int64_t end) {
  if constexpr (kHasFlat) {
    by_dtype(args.dtype, [&](auto t) { run<decltype(t)>(args, begin, end); });
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
