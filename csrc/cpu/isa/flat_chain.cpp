// A chain of strip convolutions on a channels_last image that is read in place, a band of rows of a
// tile at a time.
//
// The strips run in their own order, so that biases need no care. Between a stage's horizontal and
// its vertical strip lies a window of rows that slides down the tile; what the vertical strip of
// one stage makes goes through a band of rows into the next stage's window. 16-bit numbers become
// float32 in that band before the first stage, and 16-bit ones after the last. Stages before the
// last also make the columns beside the tile that the later ones see.
#include <cstring>
#include <type_traits>

#include "by_dtype.h"
#include "flat.h"
#include "flat_conv.h"

namespace sdan_fast {
namespace SDAN_ISA {
namespace {

// One stage: it makes columns [w0, w1). The window holds rows [first, last) of what its horizontal
// strip makes.
struct Stage {
  FlatConv<float> horizontal, vertical;
  float* rows;
  int64_t capacity, first, last;
  int64_t w0, w1;
};

SDAN_INLINE int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// Columns [w0 - by, w1 + by) of the image.
SDAN_INLINE void widened(int64_t* w0, int64_t* w1, int64_t by, int64_t w) {
  *w0 = *w0 > by ? *w0 - by : 0;
  *w1 = w - *w1 > by ? *w1 + by : w;
}

// Columns that the horizontal strip of a stage sees on either side.
SDAN_INLINE int64_t reach(const StripArgs& strip) {
  return (strip.used - 1) / 2 * strip.d;
}

template <typename T>
class Chain {
 public:
  // In the thread's scratch.
  explicit Chain(const StripChainArgs& a) : a_(a), row_(a.w * a.c), pitch_(pitch_of(a)) {
    const int64_t stage_bytes = round_up(static_cast<int64_t>(sizeof(Stage)) * a.stages, 64);
    int64_t floats = round_up(a.band * pitch_, kLanes);
    for (int64_t s = 0; s < a.stages; ++s) floats += stage_floats(stage_geometry(s));
    char* scratch = static_cast<char*>(thread_scratch(
        static_cast<size_t>(stage_bytes + floats * static_cast<int64_t>(sizeof(float)))));
    stages_ = reinterpret_cast<Stage*>(scratch);
    band_ = reinterpret_cast<float*>(scratch + stage_bytes);
    float* out = band_ + round_up(a.band * pitch_, kLanes);
    for (int64_t s = 0; s < a.stages; ++s) {
      const StripArgs& h = a.horizontal[s];
      const StripArgs& v = a.vertical[s];
      Stage& stage = stages_[s] = stage_geometry(s);
      stage.rows = out;
      out += round_up(stage.capacity * pitch_, kLanes);
      stage_flat<float, T>(
          stage.horizontal, out,
          {static_cast<const T*>(h.weight) + h.first, h.k, h.k, static_cast<const T*>(h.bias)});
      out += flat_floats(stage.horizontal);
      stage_flat<float, T>(
          stage.vertical, out,
          {static_cast<const T*>(v.weight) + v.first, v.k, 1, static_cast<const T*>(v.bias)});
      out += flat_floats(stage.vertical);
    }
  }

  // Rows [h0, h1) of columns [w0, w1) of image n.
  void run(int64_t n, int64_t h0, int64_t h1, int64_t w0, int64_t w1) {
    const int64_t image = n * a_.h * row_;
    x_ = static_cast<const T*>(a_.x) + image;
    T* y = static_cast<T*>(a_.y) + image;
    const T* gate = a_.gate == nullptr ? nullptr : static_cast<const T*>(a_.gate) + image;
    int64_t pad = 0, side = 0;
    for (int64_t s = a_.stages - 1; s >= 0; --s) {
      Stage& stage = stages_[s];
      pad += stage.vertical.pad_h;
      stage.first = stage.last = h0 > pad ? h0 - pad : 0;
      stage.w0 = w0, stage.w1 = w1;
      widened(&stage.w0, &stage.w1, side, a_.w);
      side += reach(a_.horizontal[s]);
    }
    for (int64_t h = h0; h < h1; h += a_.band) {
      const int64_t end = h1 - h < a_.band ? h1 : h + a_.band;
      if constexpr (kFloat) {
        if (gate == nullptr) {
          vertical(a_.stages - 1, h, end, y, row_);
          continue;
        }
      }
      vertical(a_.stages - 1, h, end, band_ - h * pitch_ - w0 * a_.c, pitch_);
      for (int64_t r = h; r < end; ++r) {
        const int64_t at = r * row_ + w0 * a_.c;
        finish(band_ + (r - h) * pitch_, gate == nullptr ? nullptr : gate + at, y + at,
               (w1 - w0) * a_.c);
      }
    }
  }

 private:
  static constexpr bool kFloat = std::is_same_v<T, float>;

  // Floats of a row of windows and band: the tile's columns and the halo's, not a power of two,
  // whose rows would share cache sets.
  static int64_t pitch_of(const StripChainArgs& a) {
    int64_t columns = a.grid.tile_w + a.halo_w;
    if (columns > a.w) columns = a.w;
    return (columns * a.c % 256 == 0 ? columns + 1 : columns) * a.c;
  }

  Stage stage_geometry(int64_t s) const {
    const StripArgs& h = a_.horizontal[s];
    const StripArgs& v = a_.vertical[s];
    Stage stage = {};
    stage.horizontal = flat_geometry<float>(a_.h, a_.w, a_.c, {1, h.used, 1, h.d});
    stage.vertical = flat_geometry<float>(a_.h, a_.w, a_.c, {v.used, 1, v.d, 1});
    stage.capacity = strip_level_rows(a_.band, 2 * stage.vertical.pad_h);
    if (stage.capacity > a_.h) stage.capacity = a_.h;
    return stage;
  }

  int64_t stage_floats(const Stage& stage) const {
    return round_up(stage.capacity * pitch_, kLanes) + flat_floats(stage.horizontal) +
           flat_floats(stage.vertical);
  }

  // Rows [from, to) of what stage s makes, where `y` is the image that they belong to, with rows
  // `y_row` elements apart.
  void vertical(int64_t s, int64_t from, int64_t to, float* y, ptrdiff_t y_row) {
    Stage& stage = stages_[s];
    const int64_t pad = stage.vertical.pad_h;
    fill(s, from > pad ? from - pad : 0, a_.h - to < pad ? a_.h : to + pad);
    stage.vertical.x = stage.rows - stage.first * pitch_ - stage.w0 * a_.c;
    stage.vertical.y = y;
    set_pitches(stage.vertical, pitch_, y_row);
    flat_rectangle(stage.vertical, from, to, stage.w0, stage.w1);
  }

  // The window of stage s shall hold rows [from, to), the last of which it may lack.
  void fill(int64_t s, int64_t from, int64_t to) {
    Stage& stage = stages_[s];
    if (to - stage.first > stage.capacity) {
      std::memmove(stage.rows, stage.rows + (from - stage.first) * pitch_,
                   static_cast<size_t>((stage.last - from) * pitch_) * sizeof(float));
      stage.first = from;
    }
    stage.horizontal.y = stage.rows - stage.first * pitch_ - stage.w0 * a_.c;
    set_pitches(stage.horizontal, s == 0 && kFloat ? row_ : pitch_, pitch_);
    while (stage.last < to) {
      int64_t end = to;
      if (s == 0 && kFloat) {
        stage.horizontal.x = reinterpret_cast<const float*>(x_);
      } else {
        if (end - stage.last > a_.band) end = stage.last + a_.band;
        int64_t w0 = stage.w0, w1 = stage.w1;
        widened(&w0, &w1, reach(a_.horizontal[s]), a_.w);
        float* image = band_ - stage.last * pitch_ - w0 * a_.c;
        if (s == 0) {
          for (int64_t r = stage.last; r < end; ++r) {
            widen(x_ + r * row_ + w0 * a_.c, image + r * pitch_ + w0 * a_.c, (w1 - w0) * a_.c);
          }
        } else {
          vertical(s - 1, stage.last, end, image, pitch_);
        }
        stage.horizontal.x = image;
      }
      flat_rectangle(stage.horizontal, stage.last, end, stage.w0, stage.w1);
      stage.last = end;
    }
  }

  static void widen(const T* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t at = i + kLanes <= n ? i : n - kLanes;
      store(out + at, load(x + at));
    }
  }

  // A row of the band, times `gate` unless that is null.
  static void finish(const float* band, const T* gate, T* y, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t at = i + kLanes <= n ? i : n - kLanes;
      const Vec sums = load(band + at);
      store(y + at, gate == nullptr ? sums : sums * load(gate + at));
    }
  }

  const StripChainArgs& a_;
  int64_t row_;    // elements of the image
  int64_t pitch_;  // of windows and band
  Stage* stages_;
  const T* x_;   // the image
  float* band_;  // rows on their way to the next stage or out
};

template <typename T>
void run(const StripChainArgs& a, int64_t begin, int64_t end) {
  Chain<T> chain(a);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t tiles = a.grid.tiles_h * a.grid.tiles_w;
    const int64_t h0 = t % tiles / a.grid.tiles_w * a.grid.tile_h;
    const int64_t w0 = t % a.grid.tiles_w * a.grid.tile_w;
    chain.run(t / tiles, h0, a.h - h0 < a.grid.tile_h ? a.h : h0 + a.grid.tile_h, w0,
              a.w - w0 < a.grid.tile_w ? a.w : w0 + a.grid.tile_w);
  }
}

}  // namespace

void flat_chain_run(const StripChainArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto t) { run<decltype(t)>(args, begin, end); });
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast
