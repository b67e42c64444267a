// Reductions of matrices [B, rows, M] over their rows. A block owns a chunk of rows and a tile of columns. Its threads
// form slices: the `across` threads of a slice have V columns each, and the slices share the rows. The results of the
// slices are joined in shared memory, those of the chunks in a second launch, both in a fixed order.
//
// The operation Op says what is reduced:
//   Op::Partial                        with none() and merge
//   op.accumulate(partials, place)     called by all threads of a block, for their slice of the rows
//   op.store(place, column, partial)   the result of a chunk
#pragma once

#include "split.h"
#include "vector.cuh"

namespace aia::cuda {

constexpr int kColumnThreads = 256;

// Where a thread stands: its rows are first + slice, first + slice + slices, ..., below last.
struct Place {
  int64_t b, first, last;
  int chunk, chunks, slice, slices, tile, column;
  bool active;
};

// That of a thread with V columns, of `across` side by side.
template <int V>
__device__ __forceinline__ Place place_of(int64_t rows, int M, int64_t length, int chunks, int across) {
  const int tiles = (M + across * V - 1) / (across * V), block = blockIdx.x / tiles, thread = threadIdx.x;
  Place at;
  at.tile = blockIdx.x % tiles;
  at.b = block / chunks, at.chunk = block % chunks, at.chunks = chunks;
  at.first = at.chunk * length, at.last = min(rows, at.first + length);
  at.slice = thread / across, at.slices = kColumnThreads / across;
  at.column = (at.tile * across + thread % across) * V;
  at.active = at.slice < at.slices && at.column < M;
  return at;
}

template <int V, class Op>
__global__ void __launch_bounds__(kColumnThreads, 1)
    reduce_columns(Op op, int64_t rows, int M, int64_t length, int chunks, int across) {
  using Partial = typename Op::Partial;
  AIA_SHARED(Partial, shared, kColumnThreads * V);
  const Place at = place_of<V>(rows, M, length, chunks, across);
  const int thread = threadIdx.x, width = across * V, first = at.tile * width;

  Partial partial[V];
#pragma unroll
  for (int k = 0; k < V; ++k) partial[k] = Partial::none();
  op.accumulate(partial, at);
#pragma unroll
  for (int k = 0; k < V; ++k) shared[thread * V + k] = partial[k];
  __syncthreads();
  for (int j = thread; j < width && first + j < M; j += kColumnThreads) {
    Partial total = shared[j];
    for (int s = 1; s < at.slices; ++s) total.merge(shared[s * width + j]);
    op.store(at, first + j, total);
  }
}

template <class A>
struct Total {
  A sum;

  static __device__ __forceinline__ Total none() { return {0}; }
  __device__ __forceinline__ void merge(const Total& other) { sum += other.sum; }
  __device__ __forceinline__ Total exchanged(int bits) const { return {shuffle_xor(sum, bits)}; }
};

// Sums of partial sums.
template <class A>
struct JoinTotals {
  using Partial = Total<A>;
  const A* from;  // [B, rows, M]
  A* to;          // [B, chunks, M]
  int64_t rows;
  int M;

  __device__ __forceinline__ void accumulate(Partial* partial, const Place& at) const {
    if (!at.active) return;
#pragma unroll 4
    for (int64_t n = at.first + at.slice; n < at.last; n += at.slices)
      partial->sum += from[(at.b * rows + n) * M + at.column];
  }
  __device__ __forceinline__ void store(const Place& at, int column, const Partial& total) const {
    to[(at.b * at.chunks + at.chunk) * M + column] = total.sum;
  }
};

// Queues a kernel whose threads stand as place_of says, `across` of them side by side.
template <int V, class Op>
int launch_places(void (*kernel)(Op, int64_t, int, int64_t, int, int), const Op& op, int64_t B, int64_t rows, int M,
                  const Split& split, int across, void* stream) {
  return launch(kernel, B * split.chunks * ceil_div(M, across * V), kColumnThreads, stream, op, rows, M, split.length,
                split.chunks, across);
}

// Queues a reduction of B matrices by an operation, with at most this many threads across a row.
template <int V, class Op>
int launch_columns(const Op& op, int64_t B, int64_t rows, int M, const Split& split, int most, void* stream) {
  return launch_places<V>(reduce_columns<V, Op>, op, B, rows, M, split, std::min(ceil_div(M, V), most), stream);
}

// Joins the results of the chunks: few threads across, so that many chunks are read at a time.
template <class Op>
int join_columns(const Op& op, int64_t B, int chunks, int M, void* stream) {
  Split whole(chunks, 1, chunks);
  return launch_columns<1>(op, B, chunks, M, whole, 8, stream);
}

}  // namespace aia::cuda
