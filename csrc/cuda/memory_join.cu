// Joins the sums over tokens of attention by a memory per sample, of which each tile of tokens has its part.
#include "memory_tiles.cuh"

namespace aia::cuda {
namespace {

constexpr int kThreads = kTileWarps * kWarp;

// A warp for each row; behind them a block for the total.
template <class A>
__global__ void __launch_bounds__(kThreads, 1) join_kernel(int64_t rows, int blocks, int parts,
                                                           const A* __restrict__ partial,  // [rows, parts], or null
                                                           A* __restrict__ sums,           // [rows]
                                                           int64_t count,
                                                           const A* __restrict__ others,  // [count], or null
                                                           A* __restrict__ total) {       // [1], or null
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  A sum = 0;
  if (blockIdx.x == blocks) {
    AIA_SHARED(A, shared, kTileWarps);
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += others[i];
    sum = team_sum(sum, kWarp);
    if (lane == 0) shared[warp] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int other = 1; other < kTileWarps; ++other) sum += shared[other];
    *total = sum;
    return;
  }
  const int64_t row = int64_t{blockIdx.x} * kTileWarps + warp;
  if (row < rows && partial) {
#pragma unroll 4
    for (int i = lane; i < parts; i += kWarp) sum += partial[row * parts + i];
  }
  sum = team_sum(sum, kWarp);
  if (row < rows && lane == 0) sums[row] = sum;
}

}  // namespace

int join_parts(Scalar scalar, int64_t rows, int parts, const void* partial, void* sums, int64_t count,
               const void* others, void* total, void* stream) {
  const int blocks = ceil_div(rows, kTileWarps);
  const auto join = [&](auto zero) {
    using A = decltype(zero);
    return launch(join_kernel<A>, blocks + (total ? 1 : 0), kThreads, stream, rows, blocks, parts,
                  static_cast<const A*>(partial), static_cast<A*>(sums), count, static_cast<const A*>(others),
                  static_cast<A*>(total));
  };
  return scalar == Scalar::kFloat64 ? join(0.0) : join(0.0f);
}

}  // namespace aia::cuda
