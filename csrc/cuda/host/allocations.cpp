// Preloaded beside the launch recorder: remembers where aligned allocations begin and end, so that
// a pointer that a kernel gets can be traced back to its whole tensor.
#include <dlfcn.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

namespace {

struct Entry {
  std::atomic<uintptr_t> begin{0};
  size_t bytes = 0;
};
constexpr size_t kEntries = 1 << 14;  // a ring: the oldest are forgotten
Entry entries[kEntries];
std::atomic<size_t> next{0};

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int posix_memalign(void** memory, size_t alignment,
                                                          size_t bytes) {
  using Function = int (*)(void**, size_t, size_t);
  static const Function real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "posix_memalign"));
  if (!real) return ENOMEM;
  const int error = real(memory, alignment, bytes);
  if (error == 0 && *memory) {
    Entry& e = entries[next.fetch_add(1) % kEntries];
    e.bytes = bytes;
    e.begin = reinterpret_cast<uintptr_t>(*memory);
  }
  return error;
}

// The latest allocation that holds `pointer`: its address, or 0, and its size.
__attribute__((visibility("default"))) uintptr_t sdan_find_allocation(uintptr_t pointer,
                                                                      size_t* bytes) {
  const size_t newest = next;
  for (size_t back = 1; back <= kEntries && back <= newest; ++back) {
    const Entry& e = entries[(newest - back) % kEntries];
    if (e.begin && pointer >= e.begin && pointer < e.begin + e.bytes) {
      *bytes = e.bytes;
      return e.begin;
    }
  }
  return 0;
}

}  // extern "C"
