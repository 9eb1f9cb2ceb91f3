// Prefetching of the next image tile, a few cache lines at a time between the steps of a product.
//
// A tile is a short piece of many image rows, tens of kilobytes apart: no hardware prefetcher sees
// it coming, and asking for all of it at once would stall on the few outstanding misses that a core
// may have.
#pragma once

#include "../fused.h"
#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

// A line that is about to be written. Asked for as one to read, it comes to the second-level cache
// and, if no other core has it, is this core's own all the same; the instruction for writing would
// bring it to the first level, by one of the few misses that may be outstanding there. With AVX2
// that instruction, which GCC leaves out unless told that the processor has it, was measured alone.
SDAN_INLINE void prefetch_write(const void* p) {
#if SDAN_IS_AVX512
  __builtin_prefetch(p, 0, 2);
#elif SDAN_IS_AVX2
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 1, 2);
#endif
}

class PrefetchQueue {
 public:
  SDAN_INLINE void clear() { count_ = current_ = 0; }

  // Pixels [x, x + n) of row y in all channels, to be read, or written if `write`. Only planes are
  // taken: where the channels of a pixel are neighbours, so are the pixels.
  SDAN_INLINE void add(const ImageView& view, int64_t image, int64_t y, int64_t x, int channels,
                       int64_t n, bool write) {
    if (view.stride_w != 1 || n <= 0 || count_ == kMost) return;
    const int64_t size = view.dtype == DType::kFloat32 ? 4 : 2;
    const char* p = static_cast<const char*>(view.data) +
                    (image * view.stride_n + y * view.stride_h + x) * size;
    items_[count_++] = {p,    static_cast<ptrdiff_t>(view.stride_c * size), n * size, 0, channels,
                        write};
  }

  // `rows` rows of n elements, `stride` elements apart.
  template <typename T>
  SDAN_INLINE void add_rows(const T* p, int64_t stride, int rows, int64_t n, bool write) {
    if (n <= 0 || rows <= 0 || count_ == kMost) return;
    const int64_t size = static_cast<int64_t>(sizeof(T));
    items_[count_++] = {reinterpret_cast<const char*>(p),
                        static_cast<ptrdiff_t>(stride * size),
                        n * size,
                        0,
                        rows,
                        write};
  }

  // The next `lines` lines. A row's are asked for in a loop of their own, two instructions each.
  SDAN_INLINE void step(int lines) {
    while (lines > 0 && current_ < count_) {
      Item& item = items_[current_];
      const char* p = item.row + item.at;
      const int64_t left = (item.bytes - item.at + 63) / 64;
      const int n = left < lines ? static_cast<int>(left) : lines;
      if (item.write) {
        for (int i = 0; i < n; ++i) prefetch_write(p + i * 64);
      } else {
        for (int i = 0; i < n; ++i) __builtin_prefetch(p + i * 64, 0, 2);
      }
      lines -= n;
      item.at += n * 64;
      if (item.at < item.bytes) continue;
      item.at = 0;
      item.row += item.stride;
      if (--item.rows_left == 0) ++current_;
    }
  }

 private:
  static constexpr int kMost = 6;
  struct Item {
    const char* row;
    ptrdiff_t stride;
    int64_t bytes, at;
    int rows_left;
    bool write;
  };
  Item items_[kMost];
  int count_ = 0, current_ = 0;
};

}  // namespace SDAN_ISA
}  // namespace sdan_fast
