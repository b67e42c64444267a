// The kernels of csrc/cuda as the stand-in for the CUDA runtime takes them: the emulator's, with the launches of
// csrc/cuda/launch.cuh, which reach cudaLaunchKernel and its kin as those of nvcc's code do.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>

// The toolkit's words; the emulator has its own.
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#include "../emulator/kernels.h"
#include "kernel.h"

namespace aia::rehearsal {

// Runs the blocks of a launch as the emulator does: a cluster or a cooperative grid together, others one by one.
inline void run_blocks(const Launch& launch, const std::function<void()>& kernel) {
  using emulator::Scope;
  if (launch.grid[1] * launch.grid[2] * launch.block[1] * launch.block[2] != 1)
    throw std::runtime_error("the emulator knows one dimension of blocks and threads");
  const int64_t blocks = launch.grid[0], together = launch.cooperative ? blocks : launch.cluster;
  const Scope scope = launch.cooperative ? Scope::kGrid : launch.cluster > 1 ? Scope::kCluster : Scope::kBlock;
  for (int64_t i = 0; i < blocks / together; ++i)
    emulator::run_together(scope, i * together, static_cast<int>(together), static_cast<int>(launch.block[0]),
                           launch.dynamic_bytes, kernel);
}

template <class... Parameters>
struct BoundKernel : Bound {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> values;

  template <size_t... I>
  BoundKernel(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>)
      : kernel(kernel), values(*static_cast<Parameters*>(arguments[I])...) {}

  void run(const Launch& launch) override {
    run_blocks(launch, [this] { std::apply(kernel, values); });
  }

  std::vector<const void*> pointers() const override {
    std::vector<const void*> found;
    const auto add = [&](const auto& value) {
      if constexpr (std::is_pointer_v<std::remove_cvref_t<decltype(value)>>) found.push_back(value);
    };
    std::apply([&](const auto&... value) { (add(value), ...); }, values);
    return found;
  }
};

template <class... Parameters>
Bound* bind(const void* function, void** arguments) {
  auto* const kernel = reinterpret_cast<void (*)(Parameters...)>(const_cast<void*>(function));
  return new BoundKernel<Parameters...>(kernel, arguments, std::index_sequence_for<Parameters...>{});
}

}  // namespace aia::rehearsal

namespace aia::cuda {

// The address of a kernel, which the runtime knows from then on, as nvcc's code makes its own known when it is loaded.
template <class... Parameters>
const void* function_of(void (*kernel)(Parameters...)) {
  const auto* const address = reinterpret_cast<const void*>(kernel);
  rehearsal_register(address, rehearsal::bind<Parameters...>);
  return address;
}

}  // namespace aia::cuda
