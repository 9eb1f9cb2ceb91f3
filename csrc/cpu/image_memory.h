// The memory of the images between a network's sweeps, kept from one call to the next: fresh pages
// would be zeroed by the system on every call, which costs as much as a sweep.
//
// For baseline sources only.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>

#include "fused.h"

namespace sdan_fast {

class ImageMemory {
 public:
  explicit ImageMemory(size_t bytes) : block_(kept().exchange(nullptr)) {
    if (block_ != nullptr && block_->bytes >= bytes) return;
    release(block_);
    block_ = new Block;
    const size_t page = bytes >= kHugePage ? kHugePage : 4096;
    block_->bytes = (bytes + page - 1) & ~(page - 1);
    block_->data = static_cast<char*>(std::aligned_alloc(page, block_->bytes));
    if (block_->data == nullptr) {
      release(block_);
      throw std::bad_alloc();
    }
    prefer_huge_pages(block_->data, block_->bytes);
  }

  // The process keeps one block, of at most kMostKept bytes; with several threads in calls at a
  // time the last one to return leaves its own.
  ~ImageMemory() {
    if (block_->bytes > kMostKept) {
      release(block_);
    } else {
      release(kept().exchange(block_));
    }
  }

  ImageMemory(const ImageMemory&) = delete;
  ImageMemory& operator=(const ImageMemory&) = delete;

  static size_t bytes_of(int64_t n, int64_t c, int64_t h, int64_t w, DType dtype) {
    const size_t bytes = static_cast<size_t>(n * c * h * w) * (dtype == DType::kFloat32 ? 4 : 2);
    // An odd number of cache lines, so that the same pixel of two images is not in the same set.
    return ((bytes + 63) / 64 | 1) * 64;
  }

  // The next image, n x c contiguous planes of h x w.
  ImageView take(int64_t n, int64_t c, int64_t h, int64_t w, DType dtype) {
    const ImageView view{block_->data + used_, dtype, c * h * w, h * w, w, 1};
    used_ += bytes_of(n, c, h, w, dtype);
    return view;
  }

 private:
  struct Block {
    char* data = nullptr;
    size_t bytes = 0;
  };
  static constexpr size_t kHugePage = size_t{2} << 20;
  static constexpr size_t kMostKept = size_t{256} << 20;

  static std::atomic<Block*>& kept() {
    static std::atomic<Block*> block{nullptr};
    return block;
  }

  static void release(Block* block) {
    if (block == nullptr) return;
    std::free(block->data);
    delete block;
  }

  Block* block_;
  size_t used_ = 0;
};

}  // namespace sdan_fast
