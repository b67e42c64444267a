// Sums over a launch, without floating-point atomics: the threads of a block meet in shared memory, the blocks in a
// workspace that the last of them adds up. Every order is fixed by the sizes alone, so equal inputs give equal bits.
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

// Whether this block is the last of `blocks` to arrive, told to all of its threads. What thread 0 of the others wrote
// before they arrived is then visible to all. The ticket must be 0 before the launch and is 0 again after it.
__device__ __forceinline__ bool last_to_arrive(unsigned* ticket, unsigned blocks) {
  AIA_SHARED(unsigned, earlier, 1);
  if (threadIdx.x == 0) {
    __threadfence();
    *earlier = atomicInc(ticket, blocks - 1);
  }
  __syncthreads();
  const bool last = *earlier == blocks - 1;
  if (last) __threadfence();
  return last;
}

}  // namespace aia::cuda
