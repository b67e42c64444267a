// Sums over a launch without floating-point atomics: threads of a block add up in shared memory, blocks of a
// launch_together in a workspace. Every order is fixed by the sizes and the device, so equal inputs give equal bits.
#pragma once

#include "launch.cuh"

namespace aia::cuda {

// Merges what the threads of a block have, those of equal number modulo kLeft with one another, into shared[0, kLeft)
// of kThreads / 2 elements; afterwards every thread may read them.
template <int kThreads, int kLeft, class Partial>
__device__ __forceinline__ void reduce_block(Partial* shared, Partial& mine) {
  const int thread = threadIdx.x;
#pragma unroll
  for (int n = kThreads / 2; n >= kLeft; n /= 2) {
    if (thread >= n && thread < 2 * n) shared[thread - n] = mine;
    __syncthreads();
    if (thread < n) mine.merge(shared[thread]);
    if (n == kLeft && thread < n) shared[thread] = mine;
    __syncthreads();
  }
}

}  // namespace aia::cuda
