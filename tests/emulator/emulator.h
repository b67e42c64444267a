// CUDA on the host, for tests: stands in for the toolkit when csrc/cuda is compiled by a C++ compiler.
//
// Blocks run one after the other. The threads of a block are fibers: one runs until its next barrier, then the next
// one does, and when all have arrived the round starts again. So a missing barrier shows as a thread that reads what
// its neighbours have not yet written, the same way on every run, in forward or in backward order of blocks and
// threads. Shared memory starts as NaN, and lies on the heap where AddressSanitizer sees its bounds.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define AIA_SHARED(type, name, count) type* const name = aia::emulator::block.shared<type>(count)

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

class Block {
 public:
  bool backward = false;           // the order in which blocks run, and threads between barriers
  std::string dropped;             // a barrier that is to be skipped, to see whether anything notices
  std::set<std::string> barriers;  // all that were met, as file:line

  // Runs one block to its end.
  void run(int threads, std::function<void()> kernel) {
    kernel_ = std::move(kernel);
    shared_.clear();
    met_ = Site();
    while (fibers_.size() < static_cast<size_t>(threads)) fibers_.push_back(std::make_unique<Fiber>());
    for (int i = 0; i < threads; ++i) start(*fibers_[i]);
    for (int finished = 0; finished < threads;) {
      for (int i = 0; i < threads; ++i) finished += resume(backward ? threads - 1 - i : i);
      check_round(threads, finished);
    }
  }

  // Called by a thread: waits for the others.
  void barrier(const std::source_location& where) {
    const Site site(where);
    if (site != met_) {
      met_ = site;
      barriers.insert(site.text());
      skipped_ = site.text() == dropped;
    }
    if (!skipped_) wait(site);
  }

  // Called by a thread: the value that another one brings to the same exchange. All threads of the block must come,
  // which is more than CUDA asks for.
  template <class T>
  T exchange(T value, int partner, const std::source_location& where) {
    static_assert(sizeof(T) <= sizeof(double));
    std::memcpy(&fibers_[current_]->exchanged, &value, sizeof(T));
    wait(Site(where));
    std::memcpy(&value, &fibers_[partner]->exchanged, sizeof(T));
    wait(Site(where, 1));
    return value;
  }

  // Called by a thread: the array declared there, the same one for all threads of the block.
  template <class T>
  T* shared(size_t count, const std::source_location& where = std::source_location::current()) {
    std::unique_ptr<std::byte[]>& bytes = shared_[Site(where).text()];
    if (!bytes) {
      bytes = std::make_unique<std::byte[]>(count * sizeof(T));
      std::memset(bytes.get(), 0xff, count * sizeof(T));
    }
    return reinterpret_cast<T*>(bytes.get());
  }

 private:
  static constexpr size_t kStack = size_t{128} << 10;

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<std::byte[]> stack = std::make_unique<std::byte[]>(kStack);
    Site waits_at;
    double exchanged;  // bits of any type
    bool done;
  };

  void wait(const Site& site) {
    Fiber& self = *fibers_[current_];
    self.waits_at = site;
    swapcontext(&self.context, &scheduler_);
  }

  static void enter();
  void start(Fiber& fiber);
  bool resume(int thread);
  void check_round(int threads, int finished) const;

  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::map<std::string, std::unique_ptr<std::byte[]>> shared_;
  ucontext_t scheduler_;
  int current_ = 0;
  Site met_;  // the last barrier, and whether it is the dropped one
  bool skipped_ = false;
};

inline Block block;

}  // namespace aia::emulator

inline aia::emulator::Index threadIdx, blockIdx;

inline void __threadfence() {}  // blocks do not overlap here

inline unsigned atomicInc(unsigned* address, unsigned last) {
  const unsigned old = *address;
  *address = old >= last ? 0 : old + 1;
  return old;
}

inline void __syncthreads(const std::source_location& where = std::source_location::current()) {
  aia::emulator::block.barrier(where);
}

using std::min;

namespace aia::emulator {

inline void Block::enter() {
  block.kernel_();
  block.fibers_[block.current_]->done = true;
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

// Runs a thread up to its next barrier; true when it has come to its end.
inline bool Block::resume(int thread) {
  Fiber& fiber = *fibers_[thread];
  if (fiber.done) return false;
  current_ = threadIdx.x = thread;
  swapcontext(&scheduler_, &fiber.context);
  return fiber.done;
}

// After a round, either all threads have finished or all wait at one barrier.
inline void Block::check_round(int threads, int finished) const {
  if (finished == threads) return;
  const Site site = fibers_[0]->waits_at;
  for (int i = 0; i < threads; ++i)
    if (fibers_[i]->done || fibers_[i]->waits_at != site)
      throw std::runtime_error("thread " + std::to_string(i) + " does not reach the barrier that others wait at");
}

}  // namespace aia::emulator

namespace aia::cuda {

template <class... Parameters>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void*,
           std::type_identity_t<Parameters>... parameters) {
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = static_cast<int>(emulator::block.backward ? blocks - 1 - i : i);
    emulator::block.run(threads, [&] { kernel(parameters...); });
  }
  return 0;
}

template <class T>
T shuffle_xor(T value, int bits, const std::source_location& where = std::source_location::current()) {
  return emulator::block.exchange(value, threadIdx.x ^ bits, where);
}

inline bool captures(void*) { return false; }

inline const char* describe(int) { return ""; }

}  // namespace aia::cuda
