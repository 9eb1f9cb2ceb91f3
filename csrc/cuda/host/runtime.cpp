// The scheduler behind runtime.h: fibers, barriers, shared memory and cp.async on the host.
#include "runtime.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define SDAN_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SDAN_ASAN 1
#endif
#endif
#ifdef SDAN_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace sdan_fast::cuda_host {

uint3 thread_index{}, block_index{};
dim3 block_dim, grid_dim;

namespace {

constexpr size_t kStackBytes = 128 * 1024;  // ASan frames are large
constexpr size_t kGuardBytes = 64;
constexpr unsigned char kPoison = 0xff;  // a NaN in every float format
constexpr unsigned char kGuard = 0xa5;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // sm_90 and sm_100, the largest of all

// ---- fibers

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer of this context, then loads the other
// one's.
extern "C" void sdan_cuda_host_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.type sdan_cuda_host_switch, @function
sdan_cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sdan_cuda_host_switch, .-sdan_cuda_host_switch
)");
struct Context {
  void* sp = nullptr;
};
void switch_context(Context& from, Context& to) {
  sdan_cuda_host_switch(&from.sp, to.sp);
}
void make_context(Context& c, char* stack, size_t bytes, void (*entry)()) {
  void** top =
      reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
  *--top = nullptr;  // the return address of `entry`, which never returns
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c.sp = top;
}
#else
struct Context {
  ucontext_t uc;
};
void switch_context(Context& from, Context& to) {
  swapcontext(&from.uc, &to.uc);
}
void make_context(Context& c, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&c.uc);
  c.uc.uc_stack.ss_sp = stack;
  c.uc.uc_stack.ss_size = bytes;
  c.uc.uc_link = nullptr;
  makecontext(&c.uc, entry, 0);
}
#endif

struct Fiber {
  char* stack = nullptr;
  Context context;
  void* fake_stack = nullptr;
  int thread = -1;  // the CUDA thread that runs on it

  Fiber() {
    void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    stack = static_cast<char*>(p);
    mprotect(stack, static_cast<size_t>(sysconf(_SC_PAGESIZE)),
             PROT_NONE);  // overflow faults instead of corrupting
  }
  ~Fiber() { munmap(stack, kStackBytes); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
};

// ---- a block

enum class State : uint8_t { kFresh, kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct PendingCopy {
  void* to;
  unsigned char data[16];
  int bytes;
};

struct Thread {
  State state = State::kFresh;
  Fiber* fiber = nullptr;
  uint32_t mask = 0;                             // of the warp barrier that it waits at
  int generation = 0;                            // warp exchanges so far, modulo 2
  std::vector<std::vector<PendingCopy>> copies;  // committed groups; the last one is still open
};

struct Warp {
  uint64_t slot[2][kWarpSize];
};

struct SharedArray {
  std::unique_ptr<unsigned char[]> memory;
  size_t offset = 0, bytes = 0;  // of the array inside `memory`
  unsigned char* data() const { return memory.get() + offset; }

  SharedArray(size_t n, size_t align) : bytes(n) {
    memory = std::make_unique<unsigned char[]>(n + 2 * kGuardBytes + align);
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory.get()) + kGuardBytes;
    offset = (at + align - 1) / align * align - reinterpret_cast<uintptr_t>(memory.get());
    std::memset(data() - kGuardBytes, kGuard, kGuardBytes);
    std::memset(data() + bytes, kGuard, kGuardBytes);
#ifdef SDAN_ASAN
    __asan_poison_memory_region(data() + bytes, kGuardBytes - bytes % 8);
#endif
  }
  SharedArray(SharedArray&&) = default;
#ifdef SDAN_ASAN
  ~SharedArray() {
    if (memory) __asan_unpoison_memory_region(data() + bytes, kGuardBytes - bytes % 8);
  }
#endif
  bool intact() const {
    const auto is_guard = [](unsigned char c) { return c == kGuard; };
#ifdef SDAN_ASAN
    return std::all_of(data() - kGuardBytes, data(),
                       is_guard);  // the rest is poisoned: ASan watches it
#else
    return std::all_of(data() - kGuardBytes, data(), is_guard) &&
           std::all_of(data() + bytes, data() + bytes + kGuardBytes, is_guard);
#endif
  }
};

Order chosen_order = Order::kNormal;
uint64_t chosen_seed = 0;
std::mutex launch_mutex;

struct Launch {
  const char* kernel;
  const std::function<void()>* body;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unordered_map<const void*, SharedArray> statics;
  std::unique_ptr<SharedArray> dynamic;
  std::mt19937_64 random;
  std::vector<Fiber*> idle;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  int current = -1;
  std::string error;
};

Launch* active = nullptr;
std::vector<std::unique_ptr<Fiber>> all_fibers;  // kept from launch to launch

std::string describe(int thread) {
  const unsigned t = static_cast<unsigned>(thread);
  const auto triple = [](unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
  };
  return "block " + triple(block_index.x, block_index.y, block_index.z) + ", thread " +
         triple(t % block_dim.x, t / block_dim.x % block_dim.y, t / (block_dim.x * block_dim.y));
}

void to_scheduler(Fiber* f) {
  Launch& la = *active;
#ifdef SDAN_ASAN
  __sanitizer_start_switch_fiber(&f->fake_stack, la.scheduler_stack, la.scheduler_stack_bytes);
#endif
  switch_context(f->context, la.scheduler);
#ifdef SDAN_ASAN
  __sanitizer_finish_switch_fiber(f->fake_stack, &active->scheduler_stack,
                                  &active->scheduler_stack_bytes);
#endif
}

Fiber* current_fiber() {
  return active->threads[static_cast<size_t>(active->current)].fiber;
}

void fiber_main() {
#ifdef SDAN_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &active->scheduler_stack,
                                  &active->scheduler_stack_bytes);
#endif
  for (;;) {
    Launch& la = *active;
    const int id = la.current;
    Fiber* f = current_fiber();
    try {
      (*la.body)();
      Thread& t = la.threads[static_cast<size_t>(id)];
      for (const auto& group : t.copies)
        if (!group.empty()) fail("a cp.async is never waited for");
    } catch (const std::exception& e) {
      la.error = std::string(e.what()) + " in " + describe(id);
    } catch (...) {
      la.error = "an exception in " + describe(id);
    }
    Thread& t = la.threads[static_cast<size_t>(id)];
    t.state = State::kDone;
    t.fiber = nullptr;
    la.idle.push_back(f);
    to_scheduler(f);
  }
}

void resume(int id) {
  Launch& la = *active;
  Thread& t = la.threads[static_cast<size_t>(id)];
  if (t.state == State::kFresh) {
    if (la.idle.empty()) {
      all_fibers.push_back(std::make_unique<Fiber>());
      Fiber* f = all_fibers.back().get();
      make_context(f->context, f->stack, kStackBytes, fiber_main);
      la.idle.push_back(f);
    }
    t.fiber = la.idle.back();
    la.idle.pop_back();
  }
  t.state = State::kReady;
  la.current = id;
  const unsigned u = static_cast<unsigned>(id);
  thread_index = {u % block_dim.x, u / block_dim.x % block_dim.y, u / (block_dim.x * block_dim.y)};
#ifdef SDAN_ASAN
  __sanitizer_start_switch_fiber(&la.scheduler_fake_stack, t.fiber->stack, kStackBytes);
#endif
  switch_context(la.scheduler, t.fiber->context);
#ifdef SDAN_ASAN
  __sanitizer_finish_switch_fiber(la.scheduler_fake_stack, nullptr, nullptr);
#endif
}

Thread& self() {
  return active->threads[static_cast<size_t>(active->current)];
}

// Parks the calling thread until the scheduler resumes it.
void park(State state) {
  self().state = state;
  to_scheduler(current_fiber());
}

std::vector<int> turns(int n) {
  std::vector<int> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  if (chosen_order == Order::kReversed) std::reverse(order.begin(), order.end());
  if (chosen_order == Order::kShuffled) std::shuffle(order.begin(), order.end(), active->random);
  return order;
}

void run_block() {
  Launch& la = *active;
  const int n = static_cast<int>(la.threads.size());
  for (Thread& t : la.threads) {
    t.state = State::kFresh;
    t.fiber = nullptr;
    t.generation = 0;
    t.copies.assign(1, {});
  }
  for (auto& s : la.statics) std::memset(s.second.data(), kPoison, s.second.bytes);
  if (la.dynamic) std::memset(la.dynamic->data(), kPoison, la.dynamic->bytes);
  for (;;) {
    bool progress = false;
    for (int id : turns(n)) {
      const State s = la.threads[static_cast<size_t>(id)].state;
      if (s != State::kFresh && s != State::kReady) continue;
      resume(id);
      progress = true;
      if (!la.error.empty()) return;
    }
    if (progress) continue;
    const auto count = [&](State s) {
      return std::count_if(la.threads.begin(), la.threads.end(),
                           [s](const Thread& t) { return t.state == s; });
    };
    const auto done = count(State::kDone), waiting = count(State::kAtBlockBarrier);
    if (done == n) break;
    if (waiting == n) {
      for (Thread& t : la.threads) t.state = State::kReady;
      continue;
    }
    la.error = "deadlock: " + std::to_string(waiting) + " threads wait at __syncthreads, " +
               std::to_string(count(State::kAtWarpBarrier)) + " at a warp barrier, " +
               std::to_string(done) + " have left, in block (" + std::to_string(block_index.x) +
               ", " + std::to_string(block_index.y) + ", " + std::to_string(block_index.z) + ")";
    return;
  }
  for (const auto& s : la.statics)
    if (!s.second.intact()) la.error = "a write outside a shared array in " + describe(0);
  if (la.dynamic && !la.dynamic->intact())
    la.error = "a write outside dynamic shared memory in " + describe(0);
}

void refuse(const char* kernel, const std::string& why) {
  throw std::runtime_error(std::string(kernel) + ": " + why);
}

bool in_shared(const void* p, int bytes) {
  const auto* c = static_cast<const unsigned char*>(p);
  const auto inside = [&](const SharedArray& s) {
    return c >= s.data() && c + bytes <= s.data() + s.bytes;
  };
  for (const auto& s : active->statics)
    if (inside(s.second)) return true;
  return active->dynamic && inside(*active->dynamic);
}

}  // namespace

void set_order(Order order, uint64_t seed) {
  chosen_order = order;
  chosen_seed = seed;
}

void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  const uint64_t per_block = uint64_t{block.x} * block.y * block.z;
  if (per_block == 0 || per_block > 1024 || block.z > 64)
    refuse(kernel, "a block of more than 1024 threads, or of none");
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
      grid.z > 65535)
    refuse(kernel, "a grid that is empty or above 2^31-1 x 65535 x 65535");
  if (shared_bytes > kMaxSharedBytes) refuse(kernel, "more than 227 KiB of shared memory");
  Launch la;
  la.kernel = kernel;
  la.body = &body;
  la.threads.resize(per_block);
  la.warps.resize((per_block + kWarpSize - 1) / kWarpSize);
  la.random.seed(chosen_seed);
  if (shared_bytes) la.dynamic = std::make_unique<SharedArray>(shared_bytes, 128);
  for (auto& f : all_fibers) {
#ifdef SDAN_ASAN
    __asan_unpoison_memory_region(f->stack, kStackBytes);  // a failed launch leaves frames behind
#endif
    make_context(f->context, f->stack, kStackBytes, fiber_main);
    la.idle.push_back(f.get());
  }
  block_dim = block;
  grid_dim = grid;
  active = &la;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> sequence(blocks);
  std::iota(sequence.begin(), sequence.end(), uint64_t{0});
  if (chosen_order == Order::kReversed) std::reverse(sequence.begin(), sequence.end());
  if (chosen_order == Order::kShuffled) std::shuffle(sequence.begin(), sequence.end(), la.random);
  for (const uint64_t b : sequence) {
    block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / (uint64_t{grid.x} * grid.y))};
    run_block();
    if (!la.error.empty()) break;
  }
  active = nullptr;
  if (!la.error.empty()) refuse(kernel, la.error);
}

void fail(const char* message) {
  throw std::runtime_error(message);
}

void sync_block() {
  park(State::kAtBlockBarrier);
}

int lane_id() {
  return active->current % kWarpSize;
}

void sync_warp(uint32_t mask) {
  Launch& la = *active;
  const int lane = lane_id(), first = la.current - lane;
  const int live = std::min<int>(kWarpSize, static_cast<int>(la.threads.size()) - first);
  if (live < kWarpSize) mask &= (1u << live) - 1;  // the last warp of a block may be partial
  if (!(mask >> lane & 1)) fail("a warp barrier whose mask leaves out the calling lane");
  Thread& me = self();
  me.mask = mask;
  for (int i = 0; i < live; ++i) {
    const Thread& t = la.threads[static_cast<size_t>(first + i)];
    if (!(mask >> i & 1) || i == lane) continue;
    if (t.state != State::kAtWarpBarrier) return park(State::kAtWarpBarrier);
    if (t.mask != mask) fail("the lanes of a warp barrier name different masks");
  }
  for (int i = 0; i < live; ++i)  // the last one to arrive frees the others
    if ((mask >> i & 1) && i != lane)
      la.threads[static_cast<size_t>(first + i)].state = State::kReady;
}

uint64_t exchange(uint32_t mask, uint64_t value, int source_lane) {
  Launch& la = *active;
  Warp& warp = la.warps[static_cast<size_t>(la.current / kWarpSize)];
  Thread& me = self();
  const int g = me.generation ^= 1, lane = lane_id();
  warp.slot[g][lane] = value;
  sync_warp(mask);
  // Two sets of slots suffice: nobody can write this set again before every lane has passed the
  // next exchange.
  if (source_lane < 0 || source_lane >= kWarpSize) source_lane = lane;
  if (!(mask >> source_lane & 1)) fail("a shuffle reads a lane that is not in its mask");
  return warp.slot[g][source_lane];
}

uint32_t ballot(uint32_t mask, bool predicate) {
  Launch& la = *active;
  Warp& warp = la.warps[static_cast<size_t>(la.current / kWarpSize)];
  const int g = self().generation ^= 1, lane = lane_id(), first = la.current - lane;
  warp.slot[g][lane] = predicate;
  sync_warp(mask);
  uint32_t bits = 0;
  for (int i = 0; i < kWarpSize && first + i < static_cast<int>(la.threads.size()); ++i)
    if (mask >> i & 1) bits |= static_cast<uint32_t>(warp.slot[g][i] != 0) << i;
  return bits;
}

void* static_shared(const void* key, size_t bytes, size_t align) {
  auto found = active->statics.find(key);
  if (found == active->statics.end()) {
    size_t total = bytes + (active->dynamic ? active->dynamic->bytes : 0);
    for (const auto& s : active->statics) total += s.second.bytes;
    if (total - (active->dynamic ? active->dynamic->bytes : 0) > 48 * 1024)
      fail("more than 48 KiB of static shared memory");
    if (total > kMaxSharedBytes) fail("more than 227 KiB of shared memory");
    found = active->statics.emplace(key, SharedArray(bytes, std::max<size_t>(align, 16))).first;
    std::memset(found->second.data(), kPoison, bytes);
  }
  return found->second.data();
}

void* dynamic_shared() {
  if (!active->dynamic) fail("the kernel uses dynamic shared memory, the launch gave none");
  return active->dynamic->data();
}

void copy_async(void* shared, const void* global, int bytes, int source_bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async of a size other than 4, 8 or 16");
  check_aligned(shared, static_cast<size_t>(bytes));
  check_aligned(global, static_cast<size_t>(bytes));
  if (source_bytes < 0 || source_bytes > bytes) fail("cp.async reads more than it writes");
  if (!in_shared(shared, bytes)) fail("cp.async writes outside shared memory");
  PendingCopy c{shared, {}, bytes};
  std::memcpy(c.data, global, static_cast<size_t>(source_bytes));
  std::memset(shared, kPoison, static_cast<size_t>(bytes));
  self().copies.back().push_back(c);
}

void copy_async_commit() {
  self().copies.emplace_back();
}

void copy_async_wait(int groups_left) {
  auto& groups = self().copies;
  while (static_cast<int>(groups.size()) - 1 > groups_left) {
    for (const PendingCopy& c : groups.front())
      std::memcpy(c.to, c.data, static_cast<size_t>(c.bytes));
    groups.erase(groups.begin());
  }
}

}  // namespace sdan_fast::cuda_host

// For the tests, through ctypes. Order: 0 normal, 1 reversed, 2 shuffled.
extern "C" __attribute__((visibility("default"))) void sdan_cuda_host_set_order(
    int order, unsigned long long seed) {
  sdan_fast::cuda_host::set_order(static_cast<sdan_fast::cuda_host::Order>(order), seed);
}
