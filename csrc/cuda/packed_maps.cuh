// What the gate passes share: packed maps marched through, as shares.h has cut them, or read straight on, and the
// parameters of their gates.
//
// The convolutions march along the outermost axis: a block holds a tile of one plane with its frame of neighbours in
// shared memory, and each thread adds what its strip sees of that plane to the results of three planes. So an element
// is read once from memory (but for frames), and what a thread reads of shared memory meets up to nine taps. The
// transpose of the convolution is the same march, over dz with mirrored taps: dz is made on the way from memory to
// shared memory.
#pragma once

#include <algorithm>
#include <cmath>

#include "../common/norm.h"
#include "shares.h"
#include "teams.cuh"
#include "vector.cuh"

namespace aia::cuda {

constexpr int kGateThreads = 256, kGateWarps = kGateThreads / kWarp;

// An item of a map: a tile of some chunks of a clip. Those of a block are as far apart as there are blocks of the map.
struct Item {
  int64_t clip;
  int group, tile;

  __device__ __forceinline__ Item(const Map& map, int number) {
    tile = number % map.tiles(), number /= map.tiles();
    group = number % map.groups(), clip = number / map.groups();
  }
  __device__ __forceinline__ void advance(const Map& map, const Item& step) {
    tile += step.tile, group += step.group, clip += step.clip;
    if (tile >= map.tiles()) tile -= map.tiles(), ++group;
    if (group >= map.groups()) group -= map.groups(), ++clip;
  }
  __device__ __forceinline__ int chunk(const Map& map) const { return group * map.slabs; }
  __device__ __forceinline__ int row(const Map& map) const { return tile / map.tiles_across * map.rows(); }
  __device__ __forceinline__ int column(const Map& map) const { return tile % map.tiles_across * map.columns; }
};

// What a thread knows of its strip in an item: of how many planes and rows it has results, none where it lies outside;
// where the frame around its first row begins among the places of a plane, and where its first result lies in a packed
// clip.
struct Own {
  int planes, rows, place, offset;

  __device__ __forceinline__ Own(const Map& map, const Item& item, int thread) {
    const int column = thread % map.columns, strip = thread / map.columns % map.strips;
    const int slab = thread / (map.columns * map.strips), chunk = item.chunk(map) + slab;
    const int y = item.row(map) + strip * map.strip, x = item.column(map) + column, plane = chunk * map.length;
    const bool inside = slab < map.slabs && chunk < map.chunks && y < map.d1 && x < map.d2;
    planes = inside ? min(map.length, map.d0 - plane) : 0;
    rows = min(map.strip, map.d1 - y);
    place = (slab * map.height() + strip * map.strip) * map.pitch() + column;
    offset = map.start + (plane * map.d1 + y) * map.d2 + x;
  }
};

// The elements of a plane that a thread stages: where in the map the next one lies, and its place in shared memory.
// What lies outside of the map is zero there.
template <int kSlots>
struct Slots {
  int at[kSlots], place[kSlots], count, size, plane;

  __device__ __forceinline__ Slots(const Map& map, const Item& item) {
    count = map.staged(), plane = map.plane_size(), size = map.d0 * plane;
    const int columns = map.staged_columns(), rows = map.staged_rows();
    int x = threadIdx.x % columns, y = threadIdx.x / columns % rows, slab = threadIdx.x / (columns * rows);
    const int across = kGateThreads % columns, down = kGateThreads / columns % rows;
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      const int row = y - map.frame_down(), column = x - map.frame_across();
      const int in_row = item.row(map) + row, in_column = item.column(map) + column;
      const bool own = k * kGateThreads + static_cast<int>(threadIdx.x) < count;
      const bool inside = own && in_row >= 0 && in_row < map.d1 && in_column >= 0 && in_column < map.d2;
      const int first = (item.chunk(map) + slab) * map.length + map.first_visit();
      // Far below the map, whose planes come to fewer than 2^31 elements together.
      at[k] = inside ? first * plane + in_row * map.d2 + in_column : INT32_MIN;
      place[k] = own ? (slab * map.height() + row + 1) * map.pitch() + column + 1 : map.places();
      x += across, y += down, slab += kGateThreads / (columns * rows);
      if (x >= columns) x -= columns, ++y;
      if (y >= rows) y -= rows, ++slab;
    }
  }
  // Whether any thread has this one.
  __device__ __forceinline__ bool used(int k) const { return k * kGateThreads < count; }
  __device__ __forceinline__ bool present(int k) const {
    return static_cast<uint32_t>(at[k]) < static_cast<uint32_t>(size);
  }
};

// The buffers through which planes go, one after the other; results go round with them.
constexpr int kBuffers = 3;

// Zeros in all buffers, for the places in which nothing is staged, and behind them one for staged elements that are
// none.
template <int kPlaces, class Staged>
__device__ __forceinline__ void clear(const Map& map, Staged* buffers) {
  for (int e = threadIdx.x; e <= map.places(); e += kGateThreads)
#pragma unroll
    for (int b = 0; b < kBuffers; ++b) buffers[b * kPlaces + e] = {};
}

// Calls visit(turn, q) for the planes of an item from its first visit on and, for the last results, for the one behind
// them. The turn is that of buffers, a constant.
template <class Visit>
__device__ __forceinline__ void march(int first, int length, const Visit& visit) {
  for (int q = first;; q += kBuffers) {
    visit(std::integral_constant<int, 0>{}, q);
    if (q + 1 > length) break;
    visit(std::integral_constant<int, 1>{}, q + 1);
    if (q + 2 > length) break;
    visit(std::integral_constant<int, 2>{}, q + 2);
    if (q + 3 > length) break;
  }
}

// Calls each(k, kept) for vectors of a map of all clips that fall to this block of it: those of V elements from k + j *
// kRunStep on for j < kept, at most kRun.
constexpr int kRun = 4;
template <int V>
constexpr int kRunStep = kGateThreads * V;

template <int V, class Each>
__device__ __forceinline__ void for_each_run(const Maps& maps, const Map& map, const Each& each) {
  constexpr int kLong = kRun * kRunStep<V>;
  const int size = map.d0 * map.plane_size(), runs = (size + kLong - 1) / kLong;
  const int number = static_cast<int>(blockIdx.x) - map.first_block;
  int64_t clip = number / runs;
  int run = number % runs;
  const int clips = map.blocks / runs, step = map.blocks % runs;
  while (clip < maps.batch) {
    const int e = run * kLong + threadIdx.x * V, kept = (size - e + kRunStep<V> - 1) / kRunStep<V>;
    each(clip * maps.packed + map.start + e, kept);
    run += step, clip += clips;
    if (run >= runs) run -= runs, ++clip;
  }
}

// The parameters of each map's gate, or where the gradients of their weights go.
struct Gates {
  GateParameters at[3];
};

template <class A>
__device__ __forceinline__ Norm<A> load_norm(const A* norm, int m) {
  return {norm[4 * m], norm[4 * m + 1], norm[4 * m + 2], norm[4 * m + 3]};
}

// The sigmoid behind a norm, 1 / (1 + exp(-(xhat * weight + bias))) with xhat = (z - mean) * rstd, of z or of xhat; 0
// where the exponential is infinite.
template <class A>
struct Sigmoid {
  A mean, slope, scale, shift;  // of the exponent, which is one of 2 for floats

  __device__ __forceinline__ explicit Sigmoid(const Norm<A>& bn) : mean(bn.mean) {
    const A base = sizeof(A) == 4 ? A(-1.4426950408889634) : A(-1);
    scale = base * bn.weight, shift = base * bn.bias, slope = bn.rstd * scale;
  }
  __device__ __forceinline__ A of_exponent(A exponent) const {
    if constexpr (sizeof(A) == 4)
      return one_over(1 + power_of_two(exponent));
    else
      return 1 / (1 + std::exp(exponent));
  }
  __device__ __forceinline__ A of_normalized(A xhat) const { return of_exponent(xhat * scale + shift); }
  __device__ __forceinline__ A operator()(A z) const { return of_exponent((z - mean) * slope + shift); }
};

// The weight of a gate in shared memory: the taps of a feature, 27, and those of the other. Behind it a barrier is
// needed.
template <class A>
__device__ __forceinline__ void share_weight(const GateParameters& gate, A* weight) {
  const int k = threadIdx.x;
  if (k < 54) weight[k] = read<A>(gate.weight, tap_offset(gate, k / 27, k % 27));
}

// Sums N numbers over the threads of a block; afterwards the first warp has them. Shared: [kGateWarps, N].
template <int N>
__device__ __forceinline__ void sum_over_block(double (&numbers)[N], double* shared) {
#pragma unroll
  for (int i = 0; i < N; ++i) numbers[i] = team_sum(numbers[i], kWarp);
  if (threadIdx.x % kWarp == 0)
#pragma unroll
    for (int i = 0; i < N; ++i) shared[threadIdx.x / kWarp * N + i] = numbers[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    numbers[i] = 0;
#pragma unroll
    for (int w = 0; w < kGateWarps; ++w) numbers[i] += shared[w * N + i];
  }
}

// Calls body with a value of the type of the maps.
template <class Body>
int with_maps(Scalar scalar, Body&& body) {
  return scalar == Scalar::kFloat64 ? body(double{}) : body(float{});
}

// Calls body with the width of the vectors in which maps of packed clips at these addresses can be moved.
template <class A, class Body>
int with_width(const PackedDims& dims, std::initializer_list<const void*> addresses, Body&& body) {
  constexpr int kWide = 16 / sizeof(A);
  bool wide = are_aligned(addresses);
  for (int m = 0; m < dims.n; ++m) wide = wide && dims.numel(m) % kWide == 0;
  return wide ? body(std::integral_constant<int, kWide>{}) : body(std::integral_constant<int, 1>{});
}

inline Gates gates_of(const GateParameters* gates, int n) {
  Gates copied{};
  std::copy_n(gates, n, copied.at);
  return copied;
}

}  // namespace aia::cuda
