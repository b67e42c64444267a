// Reductions of matrices [B, rows, M] over their columns, to a result for each row. A team of lanes has kRows
// neighbouring rows, so that what belongs to a column is loaded once for all of them. Where there are few rows, a team
// has several warps, which meet in shared memory. Every order is fixed by the sizes.
//
// The operation Op says what is reduced:
//   Op::kVector                  columns of a vector
//   Op::Partial                  with none(), merge and exchanged(bits)
//   op.accumulate(partials, at)  called for a lane: of the columns at.column, at.column + at.step, ...
//   op.store(at, row, partial)   the result of a row
#pragma once

#include "split.h"
#include "teams.cuh"
#include "vector.cuh"

namespace aia::cuda {

constexpr int kRowThreads = 256, kRows = 4;

// Where a lane stands: its rows are row, ..., row + kRows - 1, below rows, of sample b.
struct RowPlace {
  int64_t b, rows, row;
  int column, step;

  // That of a row that is there: of those beyond the last, nothing is kept.
  __device__ __forceinline__ int64_t existing(int r) const { return min(row + r, rows - 1); }
};

// How the rows are shared out.
struct RowTeams {
  int lanes, blocks;  // of a team; of a sample

  RowTeams(int64_t B, int64_t rows, int64_t vectors) {
    const int64_t wanted = int64_t{kMultiprocessors} * 1024, teams = B * ((rows + kRows - 1) / kRows);
    lanes = std::min(1 << bits_of((vectors + kRows - 1) / kRows), kWarp);
    while (lanes < kRowThreads && lanes * 2 <= vectors && teams * lanes < wanted) lanes *= 2;
    blocks = ceil_div(rows, kRowThreads / lanes * kRows);
  }
};

template <class Op>
__global__ void __launch_bounds__(kRowThreads, 1) reduce_rows(Op op, int64_t rows, RowTeams teams) {
  using Partial = typename Op::Partial;
  constexpr int kWarps = kRowThreads / kWarp;
  const int lanes = teams.lanes, thread = threadIdx.x, lane = thread & (lanes - 1);
  const int64_t block = blockIdx.x % teams.blocks;
  const RowPlace at{blockIdx.x / teams.blocks, rows, (block * (kRowThreads / lanes) + thread / lanes) * kRows,
                    lane * Op::kVector, lanes * Op::kVector};
  Partial mine[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) mine[r] = Partial::none();
  if (at.row < rows) op.accumulate(mine, at);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    for (int bits = min(lanes, kWarp) / 2; bits > 0; bits /= 2) mine[r].merge(mine[r].exchanged(bits));
  AIA_SHARED(Partial, shared, kWarps * kRows);
  if (lanes > kWarp) {
    const int warp = thread / kWarp;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (thread % kWarp == 0) shared[warp * kRows + r] = mine[r];
    __syncthreads();
    if (lane == 0)
      for (int other = 1; other < lanes / kWarp; ++other)
#pragma unroll
        for (int r = 0; r < kRows; ++r) mine[r].merge(shared[(warp + other) * kRows + r]);
  }
  if (lane != 0) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (at.row + r < rows) op.store(at, at.row + r, mine[r]);
}

// Queues a reduction of B matrices by an operation.
template <class Op>
int launch_rows(const Op& op, int64_t B, int64_t rows, int M, void* stream) {
  const RowTeams teams(B, rows, ceil_div(M, Op::kVector));
  return launch(reduce_rows<Op>, B * teams.blocks, kRowThreads, stream, op, rows, teams);
}

}  // namespace aia::cuda
