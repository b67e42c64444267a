// CUDA kernels on the host, for tests: stands in for the toolkit when csrc/cuda is compiled by a C++ compiler.
//
// The threads of a block are fibers: one runs until its next barrier, then the next one of its warp does, and when all
// of the warp have arrived it goes on, until it waits for the other warps; then the next warp runs so far. Blocks run
// one after the other, those of a cluster or of a launch_together likewise up to their next barrier. So a missing
// barrier shows as a thread that reads what its neighbours have not yet written, or overwrites what they have not yet
// read, the same way on every run, in forward or in backward order of blocks, warps and threads. Shared memory starts
// as NaN, is NaN again after the end of its block, and lies on the heap where AddressSanitizer sees its bounds.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

using std::min;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define AIA_SHARED(type, name, count) type* const name = aia::emulator::running->shared<type>(count)
#define AIA_DYNAMIC_SHARED(type, name) type* const name = aia::emulator::running->dynamic_shared<type>()

namespace aia::emulator {

struct Index {
  int x;
};

// Where a barrier stands in the source, and which step of it a thread waits at.
struct Site {
  const char* file = "";
  unsigned line = 0;
  int step = 0;

  Site() = default;
  explicit Site(const std::source_location& where, int step = 0)
      : file(where.file_name()), line(where.line()), step(step) {}
  bool operator==(const Site&) const = default;
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

// How launches run, and what they met.
struct Schedule {
  bool backward = false;           // the order in which blocks run, and warps and threads between barriers
  std::string dropped;             // a barrier that is to be skipped, to see whether anything notices
  std::set<std::string> barriers;  // all that were met, as file:line
  int launches = 0;

  int64_t in_order(int64_t i, int64_t count) const { return backward ? count - 1 - i : i; }
};

inline Schedule schedule;

// Who waits at a barrier, and which blocks of a launch run together; from the fewest threads to the most.
enum class Scope { kWarp, kBlock, kCluster, kGrid };

class Block {
 public:
  // Makes ready to run. The kernel must live as long.
  void start(int index, int rank, Scope together, int threads, size_t dynamic_bytes,
             const std::function<void()>& kernel);

  // Runs until all threads have finished, which is true, or wait for other blocks.
  bool run();

  // Called by a thread: waits for the others.
  void barrier(const std::source_location& where, Scope scope = Scope::kBlock) {
    const Site site(where);
    if (scope == Scope::kGrid && together_ != scope) fail("a barrier of all blocks, which do not run together");
    const bool of_blocks = scope > Scope::kBlock && together_ == scope;
    if (!of_blocks) scope = min(scope, Scope::kBlock);  // a cluster of one block
    if (site != met_) {
      met_ = site;
      schedule.barriers.insert(site.text());
      skipped_ = site.text() == schedule.dropped;
    }
    // Without its barrier of several blocks, a kernel keeps that of the block: only the former is in question.
    if (!skipped_)
      wait(site, scope);
    else if (of_blocks)
      wait(site, Scope::kBlock);
  }

  // Called by a thread: the value that another one of its warp brings to the same exchange, to which all come.
  template <class T>
  T exchange(T value, int partner, const std::source_location& where) {
    static_assert(sizeof(T) <= sizeof(double));
    if (partner / kWarp != current_ / kWarp || partner >= threads_) fail("a thread exchanges with none of its warp");
    std::memcpy(&fibers_[current_]->exchanged, &value, sizeof(T));
    wait(Site(where), Scope::kWarp);
    std::memcpy(&value, &fibers_[partner]->exchanged, sizeof(T));
    wait(Site(where, 1), Scope::kWarp);
    return value;
  }

  // Called by a thread: the array declared there, the same one for all threads of the block.
  template <class T>
  T* shared(size_t count, const std::source_location& where = std::source_location::current()) {
    return reinterpret_cast<T*>(array(Site(where).text(), count * sizeof(T)).bytes.get());
  }
  template <class T>
  T* dynamic_shared() {
    return reinterpret_cast<T*>(array("", dynamic_bytes_).bytes.get());
  }

  // Called by a thread: this block's address in the shared memory of another one.
  void* shared_of(Block& other, const void* mine);

  int rank() const { return rank_; }
  const Site& waits_at() const { return fibers_[0]->waits_at; }

 private:
  static constexpr size_t kStack = size_t{128} << 10;
  static constexpr int kWarp = 32;

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<std::byte[]> stack = std::make_unique_for_overwrite<std::byte[]>(kStack);
    Site waits_at;
    Scope waits_for;
    double exchanged;  // bits of any type
    bool done;
  };
  struct Array {
    std::unique_ptr<std::byte[]> bytes;
    size_t size;
  };

  Array& array(const std::string& name, size_t size) {
    Array& found = shared_[name];
    if (!found.bytes) {
      found = {std::make_unique_for_overwrite<std::byte[]>(size), size};
      std::memset(found.bytes.get(), 0xff, size);
    }
    return found;
  }

  // Called by a thread, from which no exception finds its way out.
  void fail(const std::string& error) {
    error_ = error;
    wait(Site(), Scope::kBlock);
  }

  void wait(const Site& site, Scope scope) {
    Fiber& self = *fibers_[current_];
    self.waits_at = site;
    self.waits_for = scope;
    swapcontext(&self.context, &scheduler_);
  }

  static void enter();
  void start(Fiber& fiber);
  int run_warp(int first);
  bool resume(int thread);
  void check_round(int first, int count, int finished) const;

  const std::function<void()>* kernel_;
  int index_, rank_, threads_;
  Scope together_;
  size_t dynamic_bytes_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::map<std::string, Array> shared_;
  ucontext_t scheduler_;
  int current_ = 0;
  Site met_;  // the last barrier, and whether it is the dropped one
  bool skipped_ = false, begun_ = false, ended_ = false;
  std::string error_;
};

// The blocks that run together, and which of them runs.
inline std::vector<std::unique_ptr<Block>> blocks;
inline Block* running = nullptr;

// Runs blocks [first, first + count) of a launch together.
void run_together(Scope, int64_t first, int count, int threads, size_t dynamic_bytes,
                  const std::function<void()>& kernel);

}  // namespace aia::emulator

inline aia::emulator::Index threadIdx, blockIdx;

inline void __threadfence() {}  // what a block writes, the others see

inline unsigned atomicInc(unsigned* address, unsigned last) {
  const unsigned old = *address;
  *address = old >= last ? 0 : old + 1;
  return old;
}

inline void __syncthreads(const std::source_location& where = std::source_location::current()) {
  aia::emulator::running->barrier(where);
}

namespace aia::emulator {

inline void Block::enter() {
  (*running->kernel_)();
  running->fibers_[running->current_]->done = true;
}

inline void Block::start(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = &scheduler_;
  fiber.done = false;
  fiber.waits_at = Site();
  makecontext(&fiber.context, enter, 0);
}

void forget_copies(const Block* block);

inline void Block::start(int index, int rank, Scope together, int threads, size_t dynamic_bytes,
                         const std::function<void()>& kernel) {
  kernel_ = &kernel;
  index_ = index, rank_ = rank, threads_ = threads;
  forget_copies(this);
  together_ = together;
  dynamic_bytes_ = dynamic_bytes;
  shared_.clear();
  met_ = Site();
  begun_ = ended_ = false;
  error_.clear();
  while (fibers_.size() < static_cast<size_t>(threads)) fibers_.push_back(std::make_unique<Fiber>());
  for (int i = 0; i < threads; ++i) start(*fibers_[i]);
}

inline bool Block::run() {
  running = this;
  blockIdx.x = index_;
  begun_ = true;
  const int warps = (threads_ + kWarp - 1) / kWarp;
  do {
    int finished = 0;
    for (int i = 0; i < warps; ++i) finished += run_warp(static_cast<int>(schedule.in_order(i, warps)) * kWarp);
    check_round(0, threads_, finished);
    if (finished < threads_) continue;
    for (auto& [name, array] : shared_) std::memset(array.bytes.get(), 0xff, array.size);
    return ended_ = true;
  } while (fibers_[0]->waits_for == Scope::kBlock);
  return false;
}

// Runs a warp until all its threads have finished or wait for other warps; how many have finished.
inline int Block::run_warp(int first) {
  const int count = min(kWarp, threads_ - first);
  for (;;) {
    int finished = 0;
    for (int i = 0; i < count; ++i) finished += resume(first + static_cast<int>(schedule.in_order(i, count)));
    check_round(first, count, finished);
    if (finished == count || fibers_[first]->waits_for > Scope::kWarp) return finished;
  }
}

// Runs a thread up to its next barrier; true when it has come to its end.
inline bool Block::resume(int thread) {
  Fiber& fiber = *fibers_[thread];
  if (fiber.done) return true;
  current_ = threadIdx.x = thread;
  swapcontext(&scheduler_, &fiber.context);
  if (!error_.empty()) throw std::runtime_error(error_);
  return fiber.done;
}

// After a round of threads, either all have finished or all wait at one barrier.
inline void Block::check_round(int first, int count, int finished) const {
  if (finished == count) return;
  const Site site = fibers_[first]->waits_at;
  for (int i = first; i < first + count; ++i)
    if (fibers_[i]->done || fibers_[i]->waits_at != site)
      throw std::runtime_error("thread " + std::to_string(i) + " does not reach the barrier that others wait at");
}

inline void* Block::shared_of(Block& other, const void* mine) {
  const auto* const address = static_cast<const std::byte*>(mine);
  if (!other.begun_) fail("a thread asks for the shared memory of a block that has not begun");
  if (other.ended_) fail("a thread asks for the shared memory of a block that has ended");
  for (const auto& [name, array] : shared_)
    if (address >= array.bytes.get() && address <= array.bytes.get() + array.size)
      return other.array(name, array.size).bytes.get() + (address - array.bytes.get());
  fail("a thread asks where in another block lies what is not in shared memory");
  return nullptr;
}

inline void run_together(Scope scope, int64_t first, int count, int threads, size_t dynamic_bytes,
                         const std::function<void()>& kernel) {
  while (blocks.size() < static_cast<size_t>(count)) blocks.push_back(std::make_unique<Block>());
  for (int i = 0; i < count; ++i)
    blocks[i]->start(static_cast<int>(first) + i, i, scope, threads, dynamic_bytes, kernel);
  for (int finished = 0; finished < count;) {
    finished = 0;
    for (int i = 0; i < count; ++i) finished += blocks[schedule.in_order(i, count)]->run();
    for (int i = 0; i < count && finished < count; ++i)
      if (finished > 0 || blocks[i]->waits_at() != blocks[0]->waits_at())
        throw std::runtime_error("not all blocks reach the barrier that others wait at");
  }
}

}  // namespace aia::emulator

namespace aia::emulator {

// Copies that a thread has asked for, by group, the last one still open. They are made as late as can be: when it
// waits.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
inline std::map<std::pair<const Block*, int>, std::vector<std::vector<Copy>>> copies;

inline void forget_copies(const Block* block) {
  std::erase_if(copies, [&](const auto& of_thread) { return of_thread.first.first == block; });
}

inline std::vector<std::vector<Copy>>& copies_of_thread() {
  auto& groups = copies[{running, threadIdx.x}];
  if (groups.empty()) groups.emplace_back();
  return groups;
}

}  // namespace aia::emulator

namespace aia::cuda {

inline void opaque(int&) {}
inline void issue_in_order() {}
inline uint32_t byte_everywhere(uint32_t word, int byte) { return (word >> 8 * byte & 0xff) * 0x01010101u; }
template <class T>
void opaque(T*&) {}

inline float settled(float value) { return value != value ? std::numeric_limits<float>::quiet_NaN() : value + 0.0f; }
inline float larger_or_nan(float a, float b) { return settled(a != a || a > b ? a : b); }
inline bool same_bits(float a, float b) { return std::bit_cast<int>(a) == std::bit_cast<int>(b); }

inline void replace_byte_if_greater(float a, float b, uint32_t& word, int place, uint32_t byte) {
  if (a > b) word = (word & ~(0xffu << 8 * place)) | (byte & 0xff) << 8 * place;
}
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

inline float power_of_two(float exponent) { return std::exp2(exponent); }
inline float one_over(float value) { return 1 / value; }

template <int kBytes>
void copy_async(void* to, const void* from) {
  emulator::copies_of_thread().back().push_back({to, from, kBytes});
}
using SharedPlace = char*;
inline SharedPlace shared_place(void* address) { return static_cast<SharedPlace>(address); }
template <int kBytes, int kOffset>
void copy_async_or_zero(SharedPlace to, const void* from, bool wanted) {
  alignas(16) static const double zeros[2] = {};
  copy_async<kBytes>(to + kOffset, wanted ? from : zeros);
}
inline void end_of_copies() { emulator::copies_of_thread().emplace_back(); }
template <int kLater>
void wait_for_copies() {
  auto& groups = emulator::copies_of_thread();
  while (groups.size() > kLater + 1) {
    for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

inline void warp_barrier(const std::source_location& where = std::source_location::current()) {
  emulator::running->barrier(where, emulator::Scope::kWarp);
}

inline void grid_barrier(const std::source_location& where = std::source_location::current()) {
  emulator::running->barrier(where, emulator::Scope::kGrid);
}

inline int cluster_rank() { return emulator::running->rank(); }

inline void cluster_barrier(const std::source_location& where = std::source_location::current()) {
  emulator::running->barrier(where, emulator::Scope::kCluster);
}

template <class T>
T* cluster_shared(T* mine, int rank) {
  return static_cast<T*>(emulator::running->shared_of(*emulator::blocks[rank], mine));
}

template <class T>
T shuffle_xor(T value, int bits, const std::source_location& where = std::source_location::current()) {
  return emulator::running->exchange(value, threadIdx.x ^ bits, where);
}

}  // namespace aia::cuda
