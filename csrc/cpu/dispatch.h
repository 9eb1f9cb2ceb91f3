// Picks the instruction set of the CPU kernels once, at load, and names the per-set entry points.
//
// This header is included both by baseline sources and by the sources compiled once per instruction
// set, so it holds no code that the linker could merge from the latter into the former: plain
// structs, enums, declarations and macros only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sdan_fast {

// Storage types. Kernels convert them to float32 lanes on load and round on store.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

enum class Activation : int { kNone = 0, kGelu = 1, kRelu6 = 2, kRelu = 3, kSilu = 4 };

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The best set that this processor has and SDAN_FAST_CPU_ISA allows; read once, then constant.
Isa picked_isa();
const char* isa_name(Isa isa);

// Whether the picked set's kernels may multiply pairs of bfloat16 (AVX512-BF16): the processor can,
// faster than it multiplies float32, and SDAN_FAST_CPU_ISA names no set, not even avx512.
bool picked_pairs();

// Whether those pairs go through the processor's matrix tiles (AMX).
bool picked_tiles();

// Whether the picked set rounds to bfloat16 in one instruction (AVX512-BF16), where a function's
// call would cost as much as what depends on it. Kernels may
// read it, constants that are made when the library is loaded may not.
extern const bool rounds_bf16;

// At least `bytes` bytes, 64-byte aligned, owned by the calling thread and reused by its next call
// for the same slot: the kernels' scratch, so that a hot path allocates nothing but its output.
// Slot 0 is for the body of a parallel loop, slot 1 for what the caller prepares and its threads
// share.
void* thread_scratch(size_t bytes, int slot = 0);

// Returns once another thread has stored `value` or more there, what it wrote before included. For
// waits that are short unless the other thread has lost its core.
void wait_for(const int* counter, int value);

// Asks the system to back fresh memory by huge pages, those that lie inside it whole; no more than
// a hint.
void prefer_huge_pages(void* data, size_t bytes);

}  // namespace sdan_fast

// SDAN_DECLARE_KERNEL(f, args...) declares void f(args...) in the namespace of every instruction
// set; SDAN_PICK_KERNEL(f) is a pointer to the one of the picked set. Use it to initialise a
// constant:
//   static const auto kernel = SDAN_PICK_KERNEL(star_run);
#if defined(__x86_64__)
#define SDAN_DECLARE_KERNEL(NAME, ...) \
  namespace sdan_fast {                \
  namespace portable {                 \
  void NAME(__VA_ARGS__);              \
  }                                    \
  namespace avx2 {                     \
  void NAME(__VA_ARGS__);              \
  }                                    \
  namespace avx512 {                   \
  void NAME(__VA_ARGS__);              \
  }                                    \
  }
#define SDAN_PICK_KERNEL(NAME)                                                            \
  (::sdan_fast::picked_isa() == ::sdan_fast::Isa::kAvx512                                 \
       ? &::sdan_fast::avx512::NAME                                                       \
       : (::sdan_fast::picked_isa() == ::sdan_fast::Isa::kAvx2 ? &::sdan_fast::avx2::NAME \
                                                               : &::sdan_fast::portable::NAME))
#else
#define SDAN_DECLARE_KERNEL(NAME, ...) \
  namespace sdan_fast {                \
  namespace portable {                 \
  void NAME(__VA_ARGS__);              \
  }                                    \
  }
#define SDAN_PICK_KERNEL(NAME) (&::sdan_fast::portable::NAME)
#endif
