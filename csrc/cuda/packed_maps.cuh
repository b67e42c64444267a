// What the gate passes share: packed maps marched through, as shares.h has cut them, or read straight on, and the
// parameters of their gates.
//
// The convolutions march along the outermost axis: a block holds a tile of one plane with its frame of neighbours in
// shared memory, and each thread adds what its position sees of that plane to the results of three planes. So an
// element is read once from memory (but for frames) and nine times from shared memory instead of 27. The transpose of
// the convolution is the same march, over dz with mirrored taps: dz is made on the way from memory to shared memory.
#pragma once

#include <algorithm>
#include <cmath>

#include "../common/norm.h"
#include "shares.h"
#include "vector.cuh"

namespace aia::cuda {

constexpr int kGateThreads = 256;

// What a thread knows of the position [y, x] in a slab of the item that it computes.
struct Own {
  bool inside;
  int plane, staged;  // the first plane of the chunk; the place among the staged elements
  int64_t clip;
  int offset;  // of the position in the first plane of the packed clip
};

// Marches through an item, plane by plane from the one before its first to the one after its last. `fetch(clip, k)`
// reads element k of a packed clip; `stage(raw)` turns that into what is shared, which is zero outside of the map.
// `visit(q, center, width)` sees plane q of the chunk: its own staged element, the rows of which are `width` apart.
template <int kStaged, class Raw, class Staged, class Fetch, class Stage, class Visit>
__device__ __forceinline__ void march(const Map& map, int64_t item, Staged*& buffer, Staged*& other, const Fetch& fetch,
                                      const Stage& stage, const Visit& visit) {
  constexpr int kSlots = kStaged / kGateThreads, kNever = -(1 << 30);
  const int tiles = map.tiles_down * map.tiles_across, tile = static_cast<int>(item % tiles);
  const int64_t first = item / tiles * map.slabs;
  const int y0 = tile / map.tiles_across * map.rows, x0 = tile % map.tiles_across * map.columns;
  const int height = map.rows + 2, width = map.columns + 2, count = map.slabs * height * width;

  int64_t clip[kSlots];
  int plane[kSlots], offset[kSlots];
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    const int e = k * kGateThreads + threadIdx.x;
    const int64_t chunk = first + e / (height * width);
    const int y = y0 + e / width % height - 1, x = x0 + e % width - 1;
    const bool inside = e < count && chunk < map.all_chunks && y >= 0 && y < map.d1 && x >= 0 && x < map.d2;
    const int start = static_cast<int>(chunk % map.chunks) * map.length;
    clip[k] = chunk / map.chunks;
    plane[k] = inside ? start : kNever;
    offset[k] = map.start + (start * map.d1 + y) * map.d2 + x;
  }
  const auto present = [&](int k, int q) { return plane[k] + q >= 0 && plane[k] + q < map.d0; };

  Raw next[kSlots];
  const auto read = [&](int q) {
#pragma unroll
    for (int k = 0; k < kSlots; ++k)
      if (present(k, q)) next[k] = fetch(clip[k], offset[k] + q * map.plane_size());
  };
  read(-1);
  for (int q = -1; q <= map.length; ++q) {
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      const int e = k * kGateThreads + threadIdx.x;
      if (e < count) buffer[e] = present(k, q) ? stage(next[k]) : Staged{};
    }
    // One barrier a plane keeps writers and readers of a buffer apart, for there are two.
    __syncthreads();
    if (q < map.length) read(q + 1);
    visit(q, buffer, width);
    Staged* const free = other;
    other = buffer, buffer = free;
  }
}

__device__ __forceinline__ Own own_position(const Map& map, int64_t item, int position) {
  const int tiles = map.tiles_down * map.tiles_across, tile = static_cast<int>(item % tiles);
  const int size = map.rows * map.columns, slab = position / size;
  const int64_t chunk = item / tiles * map.slabs + slab;
  const int row = position / map.columns % map.rows, column = position % map.columns;
  const int y = tile / map.tiles_across * map.rows + row, x = tile % map.tiles_across * map.columns + column;
  const int plane = static_cast<int>(chunk % map.chunks) * map.length;
  return {slab < map.slabs && chunk < map.all_chunks && y < map.d1 && x < map.d2, plane,
          (slab * (map.rows + 2) + row + 1) * (map.columns + 2) + column + 1, chunk / map.chunks,
          map.start + (plane * map.d1 + y) * map.d2 + x};
}

// All packed clips as one array [batch, packed], and where the second and the third map begin in a clip; at its end,
// where there are none.
struct Clips {
  int64_t batch;
  int packed, second, third;

  __device__ __forceinline__ int map_of(int k) const { return (k >= second) + (k >= third); }
};

// Calls each(k, e) for the vectors of all clips that fall to this block of `blocks`: elements from k on, which is e in
// its clip.
template <int V, class Each>
__device__ __forceinline__ void for_each_vector(const Clips& clips, int blocks, const Each& each) {
  const int pieces = (clips.packed + kGateThreads * V - 1) / (kGateThreads * V);
  for (int64_t item = blockIdx.x; item < clips.batch * pieces; item += blocks) {
    const int e = (static_cast<int>(item % pieces) * kGateThreads + threadIdx.x) * V;
    if (e < clips.packed) each(item / pieces * clips.packed + e, e);
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

struct Exponential {
  template <class A>
  __device__ __forceinline__ A operator()(A value) const {
    return std::exp(value);
  }
};

inline Clips clips_of(const PackedDims& dims) {
  const int packed = static_cast<int>(dims.packed());
  return {dims.B, packed, dims.n > 1 ? static_cast<int>(dims.offset(1)) : packed,
          dims.n > 2 ? static_cast<int>(dims.offset(2)) : packed};
}

// Calls body with a value of the type of the maps.
template <class Body>
int with_maps(Scalar scalar, Body&& body) {
  return scalar == Scalar::kFloat64 ? body(double{}) : body(float{});
}

// Calls body with the width of the vectors in which packed clips at these addresses can be moved.
template <class A, class Body>
int with_width(const PackedDims& dims, std::initializer_list<const void*> addresses, Body&& body) {
  constexpr int kWide = 16 / sizeof(A);
  return dims.packed() % kWide == 0 && are_aligned(addresses) ? body(std::integral_constant<int, kWide>{})
                                                              : body(std::integral_constant<int, 1>{});
}

inline Gates gates_of(const GateParameters* gates, int n) {
  Gates copied{};
  std::copy_n(gates, n, copied.at);
  return copied;
}

}  // namespace aia::cuda
