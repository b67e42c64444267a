// Launches on the host, for tests: a kernel runs at once, on a small device of no name. Streams mean nothing here, and
// what does not fit throws. tests/rehearsal has launches that go through a CUDA runtime.
#pragma once

#include "kernels.h"

namespace aia::cuda {

template <class... Parameters>
int launch(void (*kernel)(Parameters...), int64_t blocks, BlockSize size, void*,
           std::type_identity_t<Parameters>... parameters) {
  ++emulator::schedule.launches;
  const std::function<void()> call = [&] { kernel(parameters...); };
  for (int64_t i = 0; i < blocks; ++i)
    emulator::run_together(emulator::Scope::kBlock, emulator::schedule.in_order(i, blocks), 1, size.threads,
                           size.shared_bytes, call);
  return 0;
}

// Of no device: few, and yet several for each of three maps.
inline int multiprocessors() { return 6; }

template <class... Parameters>
int launch_together(void (*kernel)(Parameters...), int64_t blocks, BlockSize size, void*,
                    std::type_identity_t<Parameters>... parameters) {
  ++emulator::schedule.launches;
  if (blocks > multiprocessors()) throw std::runtime_error("these blocks do not fit together");
  const std::function<void()> call = [&] { kernel(parameters...); };
  emulator::run_together(emulator::Scope::kGrid, 0, static_cast<int>(blocks), size.threads, size.shared_bytes, call);
  return 0;
}

// Of no device: small, so that small inputs outgrow it.
inline int cache_bytes() { return 16 << 10; }

struct Answer {
  int error, value;
};

// As on an H200.
template <class... Parameters>
Answer clusters_together(void (*)(Parameters...), int cluster, int, int shared_bytes) {
  return {0, cluster <= 16 && shared_bytes <= 227 << 10 ? 1 : 0};
}

template <class... Parameters>
int launch_clusters(void (*kernel)(Parameters...), int64_t blocks, int cluster, int threads, int shared_bytes, void*,
                    std::type_identity_t<Parameters>... parameters) {
  ++emulator::schedule.launches;
  if (blocks % cluster != 0 || clusters_together(kernel, cluster, threads, shared_bytes).value == 0)
    throw std::runtime_error("these clusters do not fit");
  const std::function<void()> call = [&] { kernel(parameters...); };
  const int64_t clusters = blocks / cluster;
  for (int64_t i = 0; i < clusters; ++i)
    emulator::run_together(emulator::Scope::kCluster, emulator::schedule.in_order(i, clusters) * cluster, cluster,
                           threads, shared_bytes, call);
  return 0;
}

inline const char* describe(int) { return ""; }

}  // namespace aia::cuda
