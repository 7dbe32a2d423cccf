// Runs CUDA C++ kernels on the CPU for tests: one fiber a CUDA thread, blocks one after another.
//
// A fiber gives way only at a barrier or a warp collective; which ready fiber runs next, and the
// order of the blocks, are drawn from a seeded generator, so each seed is one legal schedule. It
// checks as it runs: barriers in divergent code, deadlocks, lanes outside a mask, launch limits.
// Shared memory is a fresh heap block of the exact size, filled with NaN, so that reads before
// writes and (under AddressSanitizer) overruns are seen. Under ThreadSanitizer every fiber is a
// thread of its own, and only barriers order memory within a block, nothing between blocks: a
// missing barrier and two owners of one output are data races in every schedule.
#pragma once
#if defined(__CUDACC__)
#error "cuemu.h is for host compilers only"
#endif
#define CUEMU 1
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#endif
#include "cuemu_context.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}  // NOLINT
};

namespace cuemu {

struct Error : std::runtime_error {
  using runtime_error::runtime_error;
};

enum class Order { kForward, kReverse, kRandom };

struct Options {
  Order order = Order::kRandom;
  uint64_t seed = 0;
  int64_t max_grid = 2147483647;  // launchers clip their grids to it
  bool tensor_cores = true;       // what launchers take the device to have, as the next
  int multiprocessors = 128;
  std::string skipped_barrier;  // FILE:LINE of one that threads run through: a planted bug
};

struct LaunchRecord {
  std::string what;
  unsigned grid, block;
  size_t shared_bytes, static_shared_bytes;
};

inline Options& options() {
  static Options instance;
  return instance;
}

inline std::set<std::string>& barriers() {  // FILE:LINE of those met since last cleared
  static std::set<std::string> instance;
  return instance;
}

inline std::vector<LaunchRecord>& launches() {  // since the caller last cleared it
  static std::vector<LaunchRecord> instance;
  return instance;
}

inline constexpr size_t kStackBytes = 128 << 10;
inline constexpr size_t kPage = 4096;
inline constexpr unsigned kLanes = 32;
inline constexpr unsigned kMaxThreads = 1024;
inline constexpr size_t kDepositBytes = 32;

enum class State : uint8_t { kRunning, kAtBarrier, kAtCollective, kDone };

struct Stack {  // and who ThreadSanitizer takes its owner for
  char* memory = nullptr;
  void* identity = nullptr;
  int uses = 0;
};

struct Fiber {
  Context context;
  Stack* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  dim3 thread;
  unsigned linear = 0;
  State state = State::kDone;
  const char* what = "";
  int line = 0;
};

// Of the lanes of one mask; two buffers, so that one round may overtake the last.
struct Rendezvous {
  char order[2] = {};  // addresses that ThreadSanitizer orders memory by
  uint32_t arrived = 0;
  uint64_t round = 0;
  const char* what = nullptr;
  int line = 0;
  alignas(16) unsigned char deposit[2][kLanes][kDepositBytes];
};

using Memory = std::unique_ptr<unsigned char, decltype(&std::free)>;

struct Machine {  // one, reused for every block of every launch
  std::vector<Fiber> fibers;
  std::vector<Stack> stacks;
  std::vector<unsigned> ready;
  std::map<std::pair<unsigned, uint32_t>, Rendezvous> rendezvous;
  std::map<const void*, Memory> static_shared;
  Memory dynamic_shared{nullptr, &std::free};
  Context main;
  void* main_fake_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;
  void* main_identity = nullptr;
  std::unique_ptr<char[]> barrier_order;  // new for every block: barriers order nothing beyond it
  char begin_order = 0, end_order = 0;    // of the launch
  Fiber* current = nullptr;
  dim3 block_index, block_size, grid_size;
  unsigned threads = 0, at_barrier = 0, live = 0, barrier_round = 0;
  int vote = 0, vote_result[2] = {0, 0};
  size_t static_shared_bytes = 0;
  std::mt19937_64 random;
  std::function<void()> kernel;
  std::exception_ptr error;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

// The emulator's own accesses, while one lives, are nobody's race.
struct Untracked {
#if defined(__SANITIZE_THREAD__)
  Untracked() { __tsan_ignore_thread_begin(); }
  ~Untracked() { __tsan_ignore_thread_end(); }
#else
  Untracked() {}
#endif
  Untracked(const Untracked&) = delete;
  Untracked& operator=(const Untracked&) = delete;
};

// What came before release(at) is seen after acquire(at).
#if defined(__SANITIZE_THREAD__)
inline void release(char* at) { __tsan_release(at); }
inline void acquire(char* at) { __tsan_acquire(at); }
#else
inline void release(char* /*at*/) {}
inline void acquire(char* /*at*/) {}
#endif

inline Memory fresh_shared(size_t bytes) {
  const size_t rounded = (bytes + 127) / 128 * 128;
  Memory memory(static_cast<unsigned char*>(std::aligned_alloc(128, rounded)), &std::free);
  std::memset(memory.get(), 0xff, bytes);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(memory.get() + bytes, rounded - bytes);
#endif
  return memory;
}

#if defined(__SANITIZE_THREAD__)
__attribute__((no_sanitize("thread"), noinline))
#endif
inline void switch_to(Fiber* next) {  // nullptr: the launching thread
  Machine& m = machine();
  Fiber* last = m.current;
  m.current = next;
#if defined(__SANITIZE_ADDRESS__)
  void** save = last == nullptr ? &m.main_fake_stack : &last->fake_stack;
  if (last != nullptr && last->state == State::kDone) save = nullptr;
  __sanitizer_start_switch_fiber(save, next ? next->stack->memory : m.main_stack,
                                 next ? kStackBytes : m.main_stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(next ? next->stack->identity : m.main_identity,
                         __tsan_switch_to_fiber_no_sync);
#endif
  swap_context(last ? &last->context : &m.main, next ? &next->context : &m.main);
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(m.current ? m.current->fake_stack : m.main_fake_stack, &stack,
                                  &size);
#endif
}

inline Fiber* pick() {
  Machine& m = machine();
  if (m.ready.empty()) return nullptr;
  size_t i = 0;
  switch (options().order) {
    case Order::kRandom:
      i = m.random() % m.ready.size();
      break;
    case Order::kForward:
      i = std::min_element(m.ready.begin(), m.ready.end()) - m.ready.begin();
      break;
    case Order::kReverse:
      i = std::max_element(m.ready.begin(), m.ready.end()) - m.ready.begin();
      break;
  }
  const unsigned thread = m.ready[i];
  m.ready[i] = m.ready.back();
  m.ready.pop_back();
  return &m.fibers[thread];
}

[[noreturn]] inline void fail(const std::string& message) {
  const Machine& m = machine();
  std::string where = "block " + std::to_string(m.block_index.x);
  if (m.current) where += " thread " + std::to_string(m.current->thread.x);
  throw Error("cuemu: " + where + ": " + message);
}

inline std::string at_line(const char* what, int line) {
  return std::string(what) + " line " + std::to_string(line);
}

inline void make_ready(unsigned thread) {
  machine().fibers[thread].state = State::kRunning;
  machine().ready.push_back(thread);
}

inline void release_barrier(const std::string& site) {
  Machine& m = machine();
  const Fiber* first = nullptr;
  for (unsigned i = 0; i < m.threads; ++i) {
    const Fiber& fiber = m.fibers[i];
    if (fiber.state != State::kAtBarrier) continue;
    if (first == nullptr) first = &fiber;
    if (fiber.line != first->line) {
      fail("barriers in divergent code: " + at_line(first->what, first->line) + " and " +
           at_line(fiber.what, fiber.line));
    }
    make_ready(i);
  }
  barriers().insert(site);
  m.at_barrier = 0;
  m.vote_result[m.barrier_round & 1] = m.vote;
  m.vote = 0;
  ++m.barrier_round;
}

inline void run_fiber() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
  if (m.main_stack == nullptr) {  // the first fiber of all comes from the launching thread
    m.main_stack = stack;
    m.main_stack_size = size;
  }
#endif
  acquire(&m.begin_order);
  try {
    m.kernel();
    const Untracked mine;
    m.current->state = State::kDone;
    --m.live;
    if (m.live > 0 && m.at_barrier == m.live) {
      fail("returned while the other threads wait at a barrier");
    }
  } catch (...) {
    const Untracked mine;
    if (!m.error) m.error = std::current_exception();
    m.current->state = State::kDone;
  }
  release(&m.end_order);
  Fiber* next;
  {
    const Untracked mine;
    next = m.error ? nullptr : pick();
  }
  switch_to(next);
  std::abort();  // a finished fiber is never resumed
}

inline void give_way() {
  Fiber* next = pick();
  if (next != machine().current) switch_to(next);  // nullptr: the launcher reports a deadlock
}

// Returns how many threads of the block came with a true predicate.
inline int block_barrier(int predicate, const char* what, const char* file, int line) {
  const Untracked mine;
  Machine& m = machine();
  const auto site = [&] { return std::string(file) + ":" + std::to_string(line); };
  if (!options().skipped_barrier.empty() && options().skipped_barrier == site()) return predicate;
  Fiber& me = *m.current;
  me.state = State::kAtBarrier;
  me.what = what;
  me.line = line;
  const unsigned round = m.barrier_round;
  m.vote += predicate != 0;
  release(&m.barrier_order[round & 1]);
  if (++m.at_barrier == m.live) {
    if (m.live != m.threads)
      fail(at_line(what, line) + ": some threads of the block have returned");
    release_barrier(site());
  }
  give_way();
  acquire(&m.barrier_order[round & 1]);
  return m.vote_result[round & 1];
}

// Every lane of mask deposits a value and waits for the others; then read(get, lane, mask) combines
// them, get(lane) being the deposit of a lane of the mask. CUDA lets none but __syncwarp order
// memory.
template <class T, class Read>
auto warp_collective(uint32_t mask, const T& value, const char* what, int line, bool orders,
                     Read read) {
  static_assert(sizeof(T) <= kDepositBytes);
  const Untracked mine;
  Machine& m = machine();
  Fiber& me = *m.current;
  const unsigned warp = me.linear / kLanes, lane = me.linear % kLanes;
  const unsigned lanes = std::min(kLanes, m.threads - warp * kLanes);
  const uint32_t present = lanes == kLanes ? ~0u : (1u << lanes) - 1;
  if (!(mask >> lane & 1)) fail(at_line(what, line) + ": the calling lane is not in its own mask");
  if (mask & ~present) fail(at_line(what, line) + ": the mask has lanes that the block lacks");
  for (unsigned l = 0; l < lanes; ++l) {
    if ((mask >> l & 1) && m.fibers[warp * kLanes + l].state == State::kDone) {
      fail(at_line(what, line) + ": lane " + std::to_string(l) +
           " is in the mask but has returned");
    }
  }
  Rendezvous& meeting = m.rendezvous[{warp, mask}];
  if (meeting.arrived != 0 && (meeting.what != what || meeting.line != line)) {
    fail("warp collectives in divergent code: " + at_line(what, line) + " and " +
         at_line(meeting.what, meeting.line));
  }
  meeting.what = what;
  meeting.line = line;
  const unsigned round = meeting.round & 1;
  auto& deposit = meeting.deposit[round];
  std::memcpy(deposit[lane], &value, sizeof(T));
  meeting.arrived |= 1u << lane;
  if (orders) release(&meeting.order[round]);
  me.state = State::kAtCollective;
  me.what = what;
  me.line = line;
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    ++meeting.round;
    for (unsigned l = 0; l < lanes; ++l) {
      if (mask >> l & 1) make_ready(warp * kLanes + l);
    }
  }
  give_way();
  if (orders) acquire(&meeting.order[round]);
  const auto get = [&](unsigned from) {
    if (from >= kLanes || !(mask >> from & 1)) {
      fail(at_line(what, line) + ": reads lane " + std::to_string(from) + ", outside the mask");
    }
    T result;
    std::memcpy(&result, deposit[from], sizeof(T));
    return result;
  };
  return read(get, lane, mask);
}

inline void run_block(unsigned index, size_t dynamic_bytes) {
  Machine& m = machine();
  m.block_index = dim3(index);
  m.rendezvous.clear();
  m.ready.clear();
  m.error = nullptr;
  m.current = nullptr;
  m.static_shared.clear();
  m.static_shared_bytes = 0;
  m.dynamic_shared = fresh_shared(dynamic_bytes);
  m.live = m.threads;
  m.at_barrier = 0;
  m.vote = 0;
  m.barrier_order = std::make_unique<char[]>(2);
  // A thread index has another stack and identity in every block: else thread 0 of two blocks,
  // which are most likely to write one place, would pass for one thread.
  const unsigned shift = m.random() % m.threads;
  for (unsigned i = 0; i < m.threads; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.stack = &m.stacks[(i + shift) % m.threads];
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack->memory, kStackBytes);
#endif
    make_context(&fiber.context, fiber.stack->memory, kStackBytes, run_fiber);
    fiber.linear = i;
    fiber.thread = dim3(i);
    fiber.fake_stack = nullptr;
    make_ready(i);
  }
  switch_to(pick());
  if (m.error) {
    for (Stack& stack : m.stacks) stack.uses = 0;  // threads that were left standing
    std::rethrow_exception(m.error);
  }
  if (m.live > 0) {
    std::map<std::string, int> waiting;
    for (unsigned i = 0; i < m.threads; ++i) {
      const Fiber& fiber = m.fibers[i];
      if (fiber.state != State::kDone) ++waiting[at_line(fiber.what, fiber.line)];
    }
    std::string message = "deadlock:";
    for (const auto& [where, count] : waiting)
      message += " " + std::to_string(count) + " at " + where;
    fail(message);
  }
}

// Stacks for the threads of a block, each with a page below it that faults.
inline void prepare_stacks(unsigned threads) {
  Machine& m = machine();
  if (m.fibers.size() < threads) m.fibers.resize(threads);
  if (m.stacks.size() < threads) m.stacks.resize(threads);
  for (Stack& stack : m.stacks) {
    if (stack.memory == nullptr) {
      void* pages = mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (pages == MAP_FAILED) throw std::bad_alloc();
      mprotect(pages, kPage, PROT_NONE);
      stack.memory = static_cast<char*>(pages) + kPage;
    }
#if defined(__SANITIZE_THREAD__)
    // Finished fibers leave frames on ThreadSanitizer's books; making an identity takes 0.2 ms.
    if (stack.uses++ % 64 != 0) continue;
    if (stack.identity != nullptr) __tsan_destroy_fiber(stack.identity);
    stack.identity = __tsan_create_fiber(0);
#endif
  }
}

// Runs kernel() once per thread of every block. Grids and blocks have one dimension here.
template <class Kernel>
void launch(const char* what, unsigned grid, unsigned block, size_t dynamic_bytes,
            Kernel&& kernel) {
  const Untracked mine;
  Machine& m = machine();
  if (grid == 0 || grid > 2147483647u) throw Error("cuemu: invalid grid size");
  if (block == 0 || block > kMaxThreads) throw Error("cuemu: invalid block size");
  m.threads = block;
  m.block_size = dim3(block);
  m.grid_size = dim3(grid);
  m.random.seed(options().seed * 0x9e3779b97f4a7c15ull + 1);
  m.kernel = std::forward<Kernel>(kernel);
  prepare_stacks(block);
#if defined(__SANITIZE_THREAD__)
  m.main_identity = __tsan_get_current_fiber();
#endif
  release(&m.begin_order);
  std::vector<unsigned> order(grid);
  std::iota(order.begin(), order.end(), 0u);
  if (options().order == Order::kRandom) std::shuffle(order.begin(), order.end(), m.random);
  if (options().order == Order::kReverse) std::reverse(order.begin(), order.end());
  for (unsigned index : order) run_block(index, dynamic_bytes);
  acquire(&m.end_order);
  launches().push_back({what, grid, block, dynamic_bytes, m.static_shared_bytes});
  m.kernel = nullptr;
  m.dynamic_shared.reset();
  m.static_shared.clear();
}

inline void* dynamic_shared() { return machine().dynamic_shared.get(); }

// The block's memory of the static __shared__ variable declared at `site`.
inline void* shared_at(const void* site, size_t bytes) {
  const Untracked mine;
  Machine& m = machine();
  auto [entry, is_new] = m.static_shared.try_emplace(site, nullptr, &std::free);
  if (is_new) {
    entry->second = fresh_shared(bytes);
    m.static_shared_bytes += bytes;
  }
  return entry->second.get();
}

}  // namespace cuemu

#include "cuemu_device.h"
