// What the files that register CPU operators share: the choice of the instruction level, the split over threads, and
// allocations.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../cpu/passes.h"
#include "checks.h"

namespace aia::cpu {

// The instruction levels that the passes are compiled for, the least first, and how many of them the processor has.
constexpr const char* kLevels[] = {"base", "v3", "v4"};

inline int levels_here() {
#ifdef AIA_CPU_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) return 1;
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512cd");
  return v4 ? 3 : 2;
#else
  return 1;
#endif
}

// The level that a name stands for, or the best one without a name; refused if the processor has none of that name.
inline int level_named(const std::string& name) {
  const int here = levels_here();
  if (name.empty()) return here - 1;
  for (int level = 0; level < here; ++level)
    if (name == kLevels[level]) return level;
  std::string known = kLevels[0];
  for (int level = 1; level < here; ++level) known = known + ", " + kLevels[level];
  refuse("AIA_KERNELS_CPU_LEVEL must be a level that this processor has (", known, "), got ", name);
}

// The level in force: what AIA_KERNELS_CPU_LEVEL says when it is first asked for, until it is set.
inline std::atomic<int> level_in_force{-1};

inline void set_level(const char* name) {
  if (!name) name = std::getenv("AIA_KERNELS_CPU_LEVEL");
  level_in_force = level_named(name ? name : "");
}

inline int level() {
  if (level_in_force < 0) set_level(nullptr);
  return level_in_force;
}

// The table of passes of the level in force (cpu/passes.h), for all scalars or for one.
template <class Passes>
const auto& passes() {
  using Table = decltype(Passes::base);
#ifdef AIA_CPU_X86
  constexpr Table* kTables[] = {&Passes::base, &Passes::v3, &Passes::v4};
#else
  constexpr Table* kTables[] = {&Passes::base};
#endif
  return *kTables[level()];
}
template <class Passes>
const Passes& passes(Scalar scalar) {
  return passes<Passes>()[static_cast<int>(scalar)];
}

// Calls body(begin, end) for parts of the units, on several threads. An unknown level is refused before: raised in a
// thread, the error would lose its words. AIA_CPU_THREADS is for ThreadSanitizer, which does not see how torch's own
// threads wait for each other.
template <class Body>
void parallel(int64_t units, const Body& body) {
  level();
#ifdef AIA_CPU_THREADS
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < AIA_CPU_THREADS; ++i)
    threads.emplace_back(body, units * i / AIA_CPU_THREADS, units * (i + 1) / AIA_CPU_THREADS);
  for (std::thread& thread : threads) thread.join();
#else
  torch::stable::parallel_for(0, units, 1, body);
#endif
}

// The same, on several threads only if there are so many elements that waking these pays: as many as torch's own
// elementwise operators ask for.
constexpr int64_t kElementsAlone = 32768;
template <class Body>
void split(int64_t units, int64_t elements, const Body& body) {
  if (elements < kElementsAlone)
    body(int64_t{0}, units);
  else
    parallel(units, body);
}

// An activation as passes see it that so many threads share, and whose vectors have so many lanes.
inline Volume volume_of(const Activation& a, int64_t threads = 1, int lanes = 1) {
  const int64_t plane = a.H * a.W;
  Volume v{a.B, a.T, a.C, a.H, a.W, a.T * a.C * plane, a.C * plane, plane, 1, a.scalar, lanes};
  if (a.order == Order::kTHWC) v.stride_c = 1, v.stride_p = a.C;
  if (a.order == Order::kCTHW) v.stride_t = plane, v.stride_c = a.T * plane;
  // Where channels lie side by side several blocks of them make longer pieces, if each of several threads still has a
  // few units.
  if (channels_side_by_side(v)) {
    constexpr int64_t kMostChannels = 64;
    const int64_t units = v.B * channel_blocks(v);
    v.blocks = std::clamp<int64_t>(threads > 1 ? units / (4 * threads) : units, 1, kMostChannels / lanes);
  }
  return v;
}

// Large blocks go back to the system when they are freed, so each new one is paid for page by page, several times what
// writing it costs. Large pages take most of that away. The advice may be refused, which changes nothing.
inline void advise_large_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kLarge = size_t{4} << 20, kPage = size_t{2} << 20;
  if (bytes < kLarge) return;
  const auto start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + kPage - 1) / kPage * kPage, last = (start + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}
inline Tensor with_large_pages(Tensor out) {
  advise_large_pages(out.mutable_data_ptr(), static_cast<size_t>(out.numel()) * out.element_size());
  return out;
}

inline Tensor output_like(const Tensor& x) { return with_large_pages(new_like(x)); }

}  // namespace aia::cpu
