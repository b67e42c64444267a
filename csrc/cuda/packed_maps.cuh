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

  __device__ __forceinline__ Item(const Map& map, int number) : tile(number) {
    group = map.by_tiles.divide(tile), clip = map.by_groups.divide(group);
  }
  __device__ __forceinline__ void advance(const Map& map, const Item& step) {
    tile += step.tile, group += step.group, clip += step.clip;
    if (tile >= map.tiles()) tile -= map.tiles(), ++group;
    if (group >= map.groups()) group -= map.groups(), ++clip;
  }
  __device__ __forceinline__ int chunk(const Map& map) const { return group * map.slabs; }
  // The first of the tile.
  __device__ __forceinline__ void place(const Map& map, int& row, int& column) const {
    column = tile, row = map.by_tiles_across.divide(column) * map.rows();
    column *= map.columns;
  }
};

// What a thread knows of its strip: its slab, its first row and column in a tile, and where these lie among the places
// of a plane. In an item: of how many planes and rows it has results, none where it lies outside, and where the first
// one lies in a packed clip.
struct Own {
  int slab, row, column, place;
  int planes, rows, offset;

  __device__ __forceinline__ Own(const Map& map, int thread) : row(thread) {
    column = row, row = map.by_strips_across.divide(column);
    slab = map.by_strips.divide(row), row *= map.strip, column *= map.across;
    place = slab * map.slab_step + map.place(row, column);
  }
  __device__ __forceinline__ void begin(const Map& map, const Item& item) {
    int y, x;
    item.place(map, y, x);
    y += row, x += column;
    const int chunk = item.chunk(map) + slab, plane = chunk * map.length;
    const bool inside = slab < map.slabs && chunk < map.chunks && y < map.d1 && x < map.d2;
    planes = inside ? min(map.length, map.d0 - plane) : 0;
    rows = min(map.strip, map.d1 - y);
    offset = map.start + (plane * map.d1 + y) * map.d2 + x;
  }
};

// The vectors of a plane that a thread stages: their rows and columns in a tile with its frame, and their places in
// shared memory. In an item: where in the map the next one lies. What lies outside of the map is zero there.
template <int kStaged, int kWide>
struct Slots {
  static constexpr int kSlots = kStaged / (kGateThreads * kWide);
  static_assert(kSlots * kGateThreads * kWide == kStaged);
  // Far below the map, whose planes come to fewer than 2^31 elements together.
  static constexpr int kNowhere = INT32_MIN;
  int row[kSlots], column[kSlots], from[kSlots], place[kSlots], at[kSlots], size, plane;

  __device__ __forceinline__ explicit Slots(const Map& map) {
    plane = map.plane_size(), size = map.d0 * plane;
    const int count = map.staged(), columns = map.staged_columns(), rows = map.staged_rows();
    int x = threadIdx.x, y = map.by_vectors.divide(x), slab = map.by_staged_rows.divide(y);
    y -= map.frame_down(), x = x * kWide - map.frame_across();
    int across = kGateThreads, down = map.by_vectors.divide(across), on = map.by_staged_rows.divide(down);
    across *= kWide;
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      const bool own = (k * kGateThreads + static_cast<int>(threadIdx.x)) * kWide < count;
      row[k] = y, column[k] = x;
      from[k] = own ? (slab * map.length + map.first_visit()) * plane + y * map.d2 + x : kNowhere;
      place[k] = own ? slab * map.slab_step + map.place(y, x) : map.places();
      x += across, y += down, slab += on;
      if (x >= columns - map.frame_across()) x -= columns, ++y;
      if (y >= rows - map.frame_down()) y -= rows, ++slab;
    }
  }
  __device__ __forceinline__ void begin(const Map& map, const Item& item) {
    int y, x;
    item.place(map, y, x);
    const int first = item.chunk(map) * map.length * plane + y * map.d2 + x;
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      const bool inside = from[k] != kNowhere && static_cast<uint32_t>(y + row[k]) < static_cast<uint32_t>(map.d1) &&
                          static_cast<uint32_t>(x + column[k]) < static_cast<uint32_t>(map.d2);
      at[k] = inside ? first + from[k] : kNowhere;
    }
  }
  __device__ __forceinline__ bool present(int k) const {
    return static_cast<uint32_t>(at[k]) < static_cast<uint32_t>(size);
  }
};

// The buffers through which planes go, one after the other; results go round with them.
constexpr int kBuffers = 3;

// Zeros in so many arrays of places side by side, for those in which nothing is staged, and behind them for staged
// vectors that are none.
template <int kArrays, int kStride, class Staged>
__device__ __forceinline__ void clear(const Map& map, Staged* arrays) {
  constexpr int kVector = 16 / sizeof(Staged);
  static_assert(kStride % kVector == 0);
  for (int e = threadIdx.x * kVector; e < map.places() + map.wide; e += kGateThreads * kVector)
#pragma unroll
    for (int b = 0; b < kArrays; ++b) store_vector(arrays + b * kStride + e, Vector<Staged, kVector>{});
}

// Calls visit(turn, q) for the planes of an item from its first visit on and, for the last results, for the one behind
// them. The turn is that of buffers, a constant. What belongs to a plane goes round with them, one place on: in the
// turn of plane q what belongs to the plane before has the place kTurn, to q kTurn + 1, to the one after kTurn + 2.
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

// Numbers of a strip.
template <class A, int kWide>
using Strip = Vector<A, kAcross<kWide>>[kStrip<A>];

// Writes the rows of a strip that are there, which lie `pitch` apart.
template <int kWide, class A>
__device__ __forceinline__ void store_strip(A* to, int pitch, int rows, const Strip<A, kWide>& values) {
  if (rows >= kStrip<A>) {
#pragma unroll
    for (int r = 0; r < kStrip<A>; ++r, to += pitch) opaque(to), store_vector(to, values[r]);
  } else {
#pragma unroll
    for (int r = 0; r < kStrip<A> - 1; ++r)
      if (r < rows) store_vector(to + r * pitch, values[r]);
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

// Whether an item of so many planes has this one.
__device__ __forceinline__ bool in_item(int length, int plane) {
  return static_cast<uint32_t>(plane) < static_cast<uint32_t>(length);
}

// Where the rows of a strip, and those above and below it, begin in a buffer, in bytes; found once, so that no visit
// adds them up.
template <class A, class Staged>
struct FrameRows {
  int at[kStrip<A> + 2];

  __device__ __forceinline__ FrameRows(const Own& own, int pitch) {
#pragma unroll
    for (int i = 0; i < kStrip<A> + 2; ++i) {
      at[i] = (own.place + (i - 1) * pitch) * static_cast<int>(sizeof(Staged));
      opaque(at[i]);
    }
  }
  __device__ __forceinline__ const Staged* row(const Staged* buffer, int row) const {
    return reinterpret_cast<const Staged*>(reinterpret_cast<const unsigned char*>(buffer) + at[row]);
  }
};

// What a strip sees of a plane in a buffer, a column to its left and one to its right among it. Floats are held in
// registers for the planes that meet them, doubles are read anew by each, as registers are short.
template <class A, class Staged, int kWide>
class FrameWindow {
  static constexpr bool kHeld = sizeof(A) == 4;
  static constexpr int kColumns = kAcross<kWide> + 2;
  const Staged* buffer_;
  const FrameRows<A, Staged>& rows_;
  Staged held_[kHeld ? kStrip<A> + 2 : 1][kColumns];

 public:
  __device__ __forceinline__ FrameWindow(const Staged* buffer, const FrameRows<A, Staged>& rows)
      : buffer_(buffer), rows_(rows) {
    if constexpr (kHeld)
#pragma unroll
      for (int i = 0; i < kStrip<A> + 2; ++i) {
        const Staged* const row = rows.row(buffer, i);
        const auto own = load_vector<kColumns - 2>(row);
        held_[i][0] = row[-1], held_[i][kColumns - 1] = row[kColumns - 2];
#pragma unroll
        for (int j = 1; j < kColumns - 1; ++j) held_[i][j] = own.at[j - 1];
      }
  }
  __device__ __forceinline__ Staged at(int row, int column) const {
    if constexpr (kHeld)
      return held_[row][column];
    else
      return rows_.row(buffer_, row)[column - 1];
  }
};

// The weight of a gate in shared memory: the taps of a feature, 27, and those of the other. Behind it a barrier is
// needed.
constexpr int kSharedWeight = 56;  // whole vectors

template <class A>
__device__ __forceinline__ void share_weight(const GateParameters& gate, A* weight) {
  const int k = threadIdx.x;
  if (k < 54) weight[k] = read<A>(gate.weight, tap_offset(gate, k / 27, k % 27));
}

// From there into registers.
template <class A>
__device__ __forceinline__ void load_weight(const A* weight, A (&w)[2][27]) {
  constexpr int kWide = 16 / sizeof(A);
#pragma unroll
  for (int from = 0; from < 54; from += kWide) {
    const Vector<A, kWide> vector = load_vector<kWide>(weight + from);
#pragma unroll
    for (int k = from; k < from + kWide && k < 54; ++k) w[k / 27][k % 27] = vector.at[k - from];
  }
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

// Calls body with the width of the vectors in which packed clips at these addresses can be moved, map by map: of 16
// bytes, or 1.
template <class A, class Body>
int with_straight_width(const PackedDims& dims, std::initializer_list<const void*> addresses, Body&& body) {
  constexpr int kWide = 16 / sizeof(A);
  bool wide = are_aligned(addresses);
  for (int m = 0; m < dims.n; ++m) wide = wide && dims.numel(m) % kWide == 0;
  return wide ? body(std::integral_constant<int, kWide>{}) : body(std::integral_constant<int, 1>{});
}

// The same, behind the width of the vectors in which their rows can be moved: of floats 4, 2 or 1, of doubles 1.
template <class A, class Body>
int with_widths(const PackedDims& dims, std::initializer_list<const void*> addresses, Body&& body) {
  return with_straight_width<A>(dims, addresses, [&](auto straight) {
    if constexpr (straight.value == 4) {
      int64_t rows = 0;
      for (int m = 0; m < dims.n; ++m) rows |= dims.dims[m][2];
      if (rows % 4 == 0) return body(straight, straight);
      if (rows % 2 == 0) return body(std::integral_constant<int, 2>{}, straight);
    }
    return body(std::integral_constant<int, 1>{}, straight);
  });
}

inline Gates gates_of(const GateParameters* gates, int n) {
  Gates copied{};
  std::copy_n(gates, n, copied.at);
  return copied;
}

}  // namespace aia::cuda
