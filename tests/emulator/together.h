// Kernels by which the emulator itself is tested. Two have blocks that run together: each block of kTurnThreads threads
// hands its values to the next one, the last to the first. In one, threads hand them on within a warp and a block.
#pragma once

#include "../../csrc/cuda/launch.cuh"

namespace aia::cuda {

constexpr int kTurnThreads = 4;

// Through global memory. Blocks beyond the first `waiting` do not come to the second barrier.
inline __global__ void turn_among_blocks_kernel(int blocks, int waiting, float* values) {
  const float mine = values[blockIdx.x * kTurnThreads + threadIdx.x];
  grid_barrier();
  values[(blockIdx.x + 1) % blocks * kTurnThreads + threadIdx.x] = mine + 1;
  if (blockIdx.x < waiting) grid_barrier();
  values[blockIdx.x * kTurnThreads + threadIdx.x] *= 2;
}

// Through shared memory.
inline __global__ void turn_in_clusters_kernel(int cluster, float* values) {
  AIA_SHARED(float, begin, 1);
  AIA_DYNAMIC_SHARED(float, mine);
  const int rank = cluster_rank(), next = (rank + 1) % cluster, thread = threadIdx.x;
  if (thread == 0) *begin = 1;
  mine[thread] = values[blockIdx.x * kTurnThreads + thread];
  cluster_barrier();
  const int reversed = kTurnThreads - 1 - thread;
  const float theirs = cluster_shared(mine, next)[reversed] + *cluster_shared(begin, next);
  cluster_barrier();
  values[blockIdx.x * kTurnThreads + thread] = theirs;
}

// Each thread gets the value of a neighbour in its warp, and that of the thread as far from the end of the block as it
// is from the begin.
inline __global__ void turn_in_warps_kernel(float* values) {
  constexpr int kThreads = 64;
  AIA_SHARED(float, mine, kThreads);
  const int thread = threadIdx.x;
  mine[thread] = values[thread];
  warp_barrier();
  const float near = shuffle_xor(mine[thread ^ 1], 2);
  __syncthreads();
  values[thread] = kThreads * near + mine[kThreads - 1 - thread];
}

inline int turn_in_warps(float* values) { return launch(turn_in_warps_kernel, 1, 64, nullptr, values); }

inline int turn_among_blocks(int64_t blocks, int waiting, float* values) {
  return launch_together(turn_among_blocks_kernel, blocks, kTurnThreads, nullptr, static_cast<int>(blocks), waiting,
                         values);
}

inline int turn_in_clusters(int64_t blocks, int cluster, int unused_bytes, float* values) {
  const int bytes = kTurnThreads * static_cast<int>(sizeof(float)) + unused_bytes;
  return launch_clusters(turn_in_clusters_kernel, blocks, cluster, kTurnThreads, bytes, nullptr, cluster, values);
}

}  // namespace aia::cuda
