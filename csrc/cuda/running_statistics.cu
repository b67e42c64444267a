// move_statistics_ (aia_kernels/schemas.py): a block for each BN.
#include "../common/norm.h"
#include "launch.cuh"
#include "passes.h"

namespace aia::cuda {
namespace {

constexpr int kThreads = 128;

template <class A>
__global__ void __launch_bounds__(kThreads, 1) move_statistics_kernel(Running running, A momentum) {
  const int i = blockIdx.x;
  if (threadIdx.x == 0 && i < running.numbers) ++*running.tracked[i];
  if (i >= running.norms) return;
  for (int64_t c = threadIdx.x; c < running.channels[i]; c += kThreads)
    aia::move_statistics(static_cast<const A*>(running.statistics[i]) + 3 * c, momentum, running.mean[i],
                         running.var[i], c);
}

}  // namespace

int move_statistics(const Running& running, Scalar scalar, double momentum, void* stream) {
  const int blocks = running.norms > running.numbers ? running.norms : running.numbers;
  if (scalar == Scalar::kFloat64)
    return launch(move_statistics_kernel<double>, blocks, kThreads, stream, running, momentum);
  return launch(move_statistics_kernel<float>, blocks, kThreads, stream, running, static_cast<float>(momentum));
}

}  // namespace aia::cuda
