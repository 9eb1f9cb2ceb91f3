// The Python module sdan_fast._C_cpu: loading it registers the CPU kernels; it tells which
// instruction set they were picked for. Also the pick itself and the threads' scratch memory.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "dispatch.h"
#include "fma_rate.h"

namespace sdan_fast {
namespace {

constexpr const char* kIsaVariable = "SDAN_FAST_CPU_ISA";
constexpr Isa kCompiled[] = {
    Isa::kPortable,
#if defined(__x86_64__)
    Isa::kAvx2,
    Isa::kAvx512,
#endif
};

Isa best_of_processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

// The cap in the environment; false if the variable holds no known name.
bool read_cap(Isa* cap) {
  const char* value = std::getenv(kIsaVariable);
  *cap = Isa::kAvx512;
  if (value == nullptr || *value == '\0') return true;
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (std::strcmp(value, isa_name(isa)) == 0) {
      *cap = isa;
      return true;
    }
  }
  return false;
}

// Grows and never shrinks while its thread lives.
struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
};

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

Isa picked_isa() {
  static const Isa picked = [] {
    Isa cap;
    read_cap(&cap);
    const Isa best = best_of_processor();
    return static_cast<int>(cap) < static_cast<int>(best) ? cap : best;
  }();
  return picked;
}

namespace {

bool picked_bf16() {
#if defined(__x86_64__)
  const char* cap = std::getenv(kIsaVariable);
  return picked_isa() == Isa::kAvx512 && (cap == nullptr || *cap == '\0') &&
         __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Whether the processor has matrix tiles, and products of bfloat16 for them.
bool has_tiles() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 && (d & kTiles) != 0;
#else
  return false;
#endif
}

// Their state is so large that Linux saves it only for a process that has asked.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kAsk = 0x1023 /* ARCH_REQ_XCOMP_PERM */, kTileData = 18;
  return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool picked_tiles() {
  static const bool picked = picked_bf16() && has_tiles() && may_use_tiles();
  return picked;
}

bool picked_pairs() {
  // Processors with tiles multiply pairs of vectors at half the rate of float32.
  static const bool picked = picked_tiles() || (picked_bf16() && !has_tiles());
  return picked;
}

const bool rounds_bf16 = picked_bf16();

constexpr size_t kHugePage = size_t{2} << 20;

void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void wait_for(const int* counter, int value) {
  // About a millisecond: a yield hands the core to whatever else wants it, for a whole time slice.
  constexpr int kSpins = 50'000;
  for (int i = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < value; i += i < kSpins ? 1 : 0) {
    if (i == kSpins) {
      std::this_thread::yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
}

void* thread_scratch(size_t bytes, int slot) {
  thread_local Scratch slots[2];
  Scratch& scratch = slots[slot];
#if defined(SDAN_EXACT_SCRATCH)  // a sanitizer shall see where it ends
  if (bytes != scratch.size || bytes == 0) {
    std::free(scratch.data);
    scratch.size = bytes;
    if (posix_memalign(&scratch.data, 64, bytes) != 0) throw std::bad_alloc();
  }
  return scratch.data;
#endif
  if (bytes > scratch.size) {
    std::free(scratch.data);
    scratch.size = 0;
    const size_t page = bytes > kHugePage / 2 ? kHugePage : 4096;
    const size_t rounded = (bytes + page - 1) & ~(page - 1);
    scratch.data = std::aligned_alloc(page, rounded);
    if (scratch.data == nullptr) throw std::bad_alloc();
    prefer_huge_pages(scratch.data, rounded);
    scratch.size = rounded;
  }
  return scratch.data;
}

}  // namespace sdan_fast

namespace {

PyObject* isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(sdan_fast::isa_name(sdan_fast::picked_isa()));
}

PyObject* isas(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  if (list == nullptr) return nullptr;
  for (const sdan_fast::Isa i : sdan_fast::kCompiled) {
    PyObject* name = PyUnicode_FromString(sdan_fast::isa_name(i));
    if (name == nullptr || PyList_Append(list, name) != 0) {
      Py_XDECREF(name);
      Py_DECREF(list);
      return nullptr;
    }
    Py_DECREF(name);
  }
  return list;
}

PyObject* bf16_pairs(PyObject*, PyObject*) {
  return PyBool_FromLong(sdan_fast::picked_pairs() ? 1 : 0);
}

PyObject* bf16_tiles(PyObject*, PyObject*) {
  return PyBool_FromLong(sdan_fast::picked_tiles() ? 1 : 0);
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS,
     "isa() -> str: the instruction set that the kernels of this process use."},
    {"bf16_pairs", bf16_pairs, METH_NOARGS,
     "bf16_pairs() -> bool: whether bfloat16 ops multiply pairs of them (AVX512-BF16)."},
    {"bf16_tiles", bf16_tiles, METH_NOARGS,
     "bf16_tiles() -> bool: whether they do so in matrix tiles (AMX)."},
    {"isas", isas, METH_NOARGS, "isas() -> list[str]: the instruction sets compiled in."},
    {"fma_loop", sdan_fast::fma_loop, METH_O,
     "fma_loop(rounds) -> float: multiply-adds on registers; how many operations they were."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_C_cpu",
    "The SIMD kernels of sdan_fast for CPUs.",
    0,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C_cpu(void) {
  sdan_fast::Isa cap;
  if (!sdan_fast::read_cap(&cap)) {
    PyErr_Format(PyExc_ImportError, "%s must be portable, avx2 or avx512, got '%s'",
                 sdan_fast::kIsaVariable, std::getenv(sdan_fast::kIsaVariable));
    return nullptr;
  }
  return PyModule_Create(&definition);
}
