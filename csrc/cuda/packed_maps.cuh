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

constexpr int kGateWarps = kGateThreads / kWarp;

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
template <Form kForm>
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
    rows = kWholeRows<kForm> ? min(map.across, map.d2 - x) / kAcross<kForm> : min(map.strip, map.d1 - y);
    offset = map.start + (plane * map.d1 + y) * map.d2 + x;
  }
};

// The vectors of a plane that a thread stages, one in each of its slots: their places in shared memory and, in an item,
// where in the map the next one lies. What lies outside of the map is zero there.
template <int kStaged, Form kForm>
struct SlotsOfPlane {
  // Planes of whole rows may be staged by single elements.
  static constexpr bool kAlone = kForm == kRowsOf7;
  static constexpr int kVectors = (kStaged + kGateThreads * kWide<kForm> - 1) / (kGateThreads * kWide<kForm>);
  static constexpr int kSlots = kAlone ? kStaged / kGateThreads : kVectors;
  static_assert(kStaged % (kGateThreads * (kAlone ? 1 : kWide<kForm>)) == 0);
  // That hold the elements of all slots.
  static constexpr int kMostVectors = kAlone && kSlots > kVectors* kWide<kForm> ? kSlots / kWide<kForm> + 1 : kVectors;
  // Far below the map, whose planes come to fewer than 2^31 elements together.
  static constexpr int kNowhere = INT32_MIN;
  int place[kSlots], at[kSlots], size, plane;
  bool alone;

  __device__ __forceinline__ explicit SlotsOfPlane(const Map& map)
      : size(map.d0 * map.plane_size()), plane(map.plane_size()), alone(kAlone && map.wide == 1) {}

  // Calls body(k, width) for the slots, in which so many elements lie.
  template <class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
    if constexpr (kAlone)
      if (alone) {
#pragma unroll
        for (int k = 0; k < kSlots; ++k) body(k, std::integral_constant<int, 1>{});
        return;
      }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) body(k, std::integral_constant<int, kWide<kForm>>{});
  }
  __device__ __forceinline__ bool present(int k) const {
    return static_cast<uint32_t>(at[k]) < static_cast<uint32_t>(size);
  }
};

// Of rows of any length, which with their frame are counted through.
template <int kStaged, Form kForm>
struct Slots : SlotsOfPlane<kStaged, kForm> {
  using Base = SlotsOfPlane<kStaged, kForm>;
  using Base::at, Base::place, Base::plane, Base::for_each, Base::kNowhere, Base::kSlots;
  int row[kSlots], column[kSlots], from[kSlots];

  __device__ __forceinline__ explicit Slots(const Map& map) : Base(map) {
    constexpr int kVector = kWide<kForm>;
    const int count = map.staged(), columns = map.staged_columns(), rows = map.staged_rows();
    int x = threadIdx.x, y = map.by_vectors.divide(x), slab = map.by_staged_rows.divide(y);
    y -= map.frame_down(), x = x * kVector - map.frame_across();
    int across = kGateThreads, down = map.by_vectors.divide(across), on = map.by_staged_rows.divide(down);
    across *= kVector;
    for_each([&](int k, auto) {
      const bool own = (k * kGateThreads + static_cast<int>(threadIdx.x)) * kVector < count;
      row[k] = y, column[k] = x;
      from[k] = own ? (slab * map.length + map.first_visit()) * plane + y * map.d2 + x : kNowhere;
      place[k] = own ? slab * map.slab_step + map.place(y, x) : map.places();
      x += across, y += down, slab += on;
      if (x >= columns - map.frame_across()) x -= columns, ++y;
      if (y >= rows - map.frame_down()) y -= rows, ++slab;
    });
  }
  __device__ __forceinline__ void begin(const Map& map, const Item& item) {
    int y, x;
    item.place(map, y, x);
    const int first = item.chunk(map) * map.length * plane + y * map.d2 + x;
    for_each([&](int k, auto) {
      const bool inside = from[k] != kNowhere && static_cast<uint32_t>(y + row[k]) < static_cast<uint32_t>(map.d1) &&
                          static_cast<uint32_t>(x + column[k]) < static_cast<uint32_t>(map.d2);
      at[k] = inside ? first + from[k] : kNowhere;
    });
  }
};

// Of whole rows: either a slot goes on in the long row, or the threads stage some slabs at a time, whole ones. So slots
// lie equally far apart.
template <int kStaged, Form kForm>
  requires kWholeRows<kForm>
struct Slots<kStaged, kForm> : SlotsOfPlane<kStaged, kForm> {
  using Base = SlotsOfPlane<kStaged, kForm>;
  using Base::at, Base::place, Base::plane, Base::size, Base::for_each, Base::kNowhere;
  int slab, column, together, across = 0;
  int frame = 0;  // bits of slots whose elements belong to the frame

  __device__ __forceinline__ explicit Slots(const Map& map) : Base(map), column(threadIdx.x), together(map.together) {
    slab = map.by_vectors.divide(column);
    if (together == 0) across = kGateThreads * map.wide;
    column = column * map.wide - map.frame_across();
    const int end = map.staged_columns() - map.frame_across();
    const int slabs = together > 0 && slab >= together ? 0 : map.slabs;
    for_each([&](int k, auto) {
      const bool own = slab + k * together < slabs && column + k * across < end;
      place[k] = own ? (slab + k * together) * map.slab_step + map.place(0, column + k * across) : map.places();
      if (static_cast<uint32_t>(column + k * across) >= static_cast<uint32_t>(map.columns)) frame |= 1 << k;
    });
  }
  // Whether an element of the map so far behind those of the slot is a result. No map is so large that an absent one
  // would be.
  __device__ __forceinline__ bool has_result(int k, int behind) const {
    return !(frame >> k & 1) && static_cast<uint32_t>(at[k]) < static_cast<uint32_t>(size + behind);
  }
  __device__ __forceinline__ void begin(const Map& map, const Item& item) {
    int y, x;
    item.place(map, y, x);
    x += column;
    const int first = ((item.chunk(map) + slab) * map.length + map.first_visit()) * plane + x;
    const int step = together * map.length * plane + across;
    for_each([&](int k, auto) {
      const bool inside =
          place[k] != map.places() && static_cast<uint32_t>(x + k * across) < static_cast<uint32_t>(map.d2);
      at[k] = inside ? first + k * step : kNowhere;
    });
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
template <class A, Form kForm>
using Strip = Vector<A, kAcross<kForm>>[kStrip<A, kForm>];

// Writes the rows of a strip that are there, which lie `pitch` apart.
template <Form kForm, class A>
__device__ __forceinline__ void store_strip(A* to, int pitch, int rows, const Strip<A, kForm>& values) {
  if (rows >= kStrip<A, kForm>) {
#pragma unroll
    for (int r = 0; r < kStrip<A, kForm>; ++r, to += pitch) opaque(to), store_vector(to, values[r]);
  } else {
#pragma unroll
    for (int r = 0; r < kStrip<A, kForm> - 1; ++r)
      if (r < rows) store_vector(to + r * pitch, values[r]);
  }
}

// Strips of whole rows lie one behind the other, so each store of a warp to memory would meet the lines of all of them.
// Instead they leave their results among the places of a plane, from where vectors of them go on. Behind a strip that
// is cut short zeros follow, and stay.
template <Form kForm, class A>
__device__ __forceinline__ void leave_strip(A* places, int rows, const Strip<A, kForm>& values) {
  constexpr int kRow = kAcross<kForm>;
#pragma unroll
  for (int k = 0; k < kLongStrip; k += 2) {
    const Vector<A, 2> two{values[k / kRow].at[k % kRow], values[(k + 1) / kRow].at[(k + 1) % kRow]};
    if (k + 2 <= kRow || rows > 1 || kRow == kLongStrip)
      store_vector(places + k, two);
    else if (k < kRow)
      places[k] = two.at[0];
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
// adds them up. Whole rows follow each other: these are the strip's own place, and that of the row below it, which is
// among zeros where the strip is cut short, as another slab may follow.
template <class A, class Staged, Form kForm>
struct FrameRows {
  static constexpr int kRows = kWholeRows<kForm> ? 2 : kStrip<A, kForm> + 2;
  int at[kRows];

  __device__ __forceinline__ FrameRows(const Map& map, const Own<kForm>& own) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      int place = own.place + (i - 1) * map.pitch;
      if (kWholeRows<kForm>) {
        const bool cut = map.tiles_across == 1 && own.column + kLongStrip > map.d2;
        place = i == 0 ? own.place : cut ? 0 : own.place + kLongStrip;
      }
      at[i] = place * static_cast<int>(sizeof(Staged));
      opaque(at[i]);
    }
  }
  __device__ __forceinline__ const Staged* row(const Staged* buffer, int row) const {
    return reinterpret_cast<const Staged*>(reinterpret_cast<const unsigned char*>(buffer) + at[row]);
  }
};

// What a strip sees of a plane in a buffer: its rows, the one above and the one below it, and a column at each side of
// them unless they are whole. Floats are held in registers for the planes that meet them, doubles are read anew by
// each, as registers are short.
template <class A, class Staged, Form kForm>
class FrameWindow {
 public:
  static constexpr int kBeside = kWholeRows<kForm> ? 0 : 1;
  static constexpr int kRows = kStrip<A, kForm> + 2, kColumns = kAcross<kForm> + 2 * kBeside;

  __device__ __forceinline__ FrameWindow(const Staged* buffer, const FrameRows<A, Staged, kForm>& rows)
      : buffer_(buffer), rows_(rows) {
    if constexpr (kWholeRows<kForm>)
      load_whole_rows();
    else if constexpr (kHeld)
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
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

 private:
  static constexpr bool kHeld = sizeof(A) == 4;
  const Staged* buffer_;
  const FrameRows<A, Staged, kForm>& rows_;
  Staged held_[kHeld ? kRows : 1][kColumns];

  // By twos, as strips begin with one: so with a number of no use before the row above that has an odd length, and one
  // behind the row below it.
  __device__ __forceinline__ void load_whole_rows() {
    constexpr int kFirst = -(kColumns + kColumns % 2);
#pragma unroll
    for (int k = kFirst; k < kLongStrip + kColumns; k += 2) {
      const auto two = k < kLongStrip ? load_vector<2>(rows_.row(buffer_, 0) + k)
                                      : load_vector<2>(rows_.row(buffer_, 1) + (k - kLongStrip));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = k + i + kColumns;
        if (n >= 0 && n < kRows * kColumns) held_[n / kColumns][n % kColumns] = two.at[i];
      }
    }
  }
};

// Calls body(i, j, r, c, tap, first) for each number at (i, j) of what a strip sees of a plane and each number (r, c)
// of the strip that it meets by this tap of nine; whether it is the first that meets the latter.
template <class Window, int kRows, int kColumns, class Body>
__device__ __forceinline__ void for_taps(const Body& body) {
  constexpr int kFirst = 1 - Window::kBeside;
#pragma unroll
  for (int i = 0; i < kRows + 2; ++i)
#pragma unroll
    for (int j = kFirst; j < kColumns + 2 - kFirst; ++j)
#pragma unroll
      for (int r = i < 2 ? 0 : i - 2; r <= i && r < kRows; ++r)
#pragma unroll
        for (int c = j < 2 ? 0 : j - 2; c <= j && c < kColumns; ++c)
          body(i, j - kFirst, r, c, (i - r) * 3 + j - c, i == r && j == (c < kFirst ? kFirst : c));
}

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

// The same, behind the form of their strips.
template <class A, class Body>
int with_forms(const PackedDims& dims, std::initializer_list<const void*> addresses, Body&& body) {
  return with_straight_width<A>(dims, addresses, [&](auto straight) {
    return with_form<A>(dims, straight.value > 1, [&](auto form) {
      // Other forms than of ones need what straight vectors do.
      constexpr bool kTogether = form.value == kOnes || straight.value > 1;
      if constexpr (kTogether) return body(form, straight);
      return -1;
    });
  });
}

inline Gates gates_of(const GateParameters* gates, int n) {
  Gates copied{};
  std::copy_n(gates, n, copied.at);
  return copied;
}

}  // namespace aia::cuda
