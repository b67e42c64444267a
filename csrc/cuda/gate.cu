// The gate passes (aia_kernels/ops.py has the equations): 3x3x3 convolution 2 -> 1, normalisation and sigmoid on packed
// maps, and their transposes. All maps of a context share a launch, one launch a pass.
//
//   gate                  reads 3, writes 2 maps   the gates, by way of z; 2 and 1 where no statistics are the batch's
//   gate_again            reads 2, writes 2        the gates and z
//   gate_backward_reduce  reads 2                  the gradients of the norm's shift and scale
//   gate_backward         reads 6, writes 2        the gradients of the pooled features and of the weight, and the same
//
// Where a sum over the batch stands between two halves of a pass, its blocks wait for one another: the launch holds no
// more than run at once. That spares a launch and, where maps are small, leaves the second half in the L2 cache.
//
// The convolutions march along the outermost axis: a block holds a tile of one plane with its frame of neighbours in
// shared memory, and each thread adds what its position sees of that plane to the results of three planes. So an
// element is read once from memory (but for frames) and nine times from shared memory instead of 27. The transpose of
// the convolution is the same march, over dz with mirrored taps: dz is made on the way from memory to shared memory.
#include <algorithm>
#include <cmath>

#include "../common/moments.h"
#include "../common/norm.h"
#include "partials.cuh"
#include "passes.h"
#include "vector.cuh"

namespace aia::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kConvPositions = 256, kConvStaged = 768;          // a thread has a position
constexpr int kBackwardPositions = 128, kBackwardStaged = 512;  // two threads have a position, one for each feature

// One map [d0, d1, d2] of each clip, cut into items of work for a block: a tile of rows times columns of the planes,
// of `slabs` neighbouring units; a unit is a chunk of `length` planes of one clip.
struct Map {
  int d0, d1, d2;
  int start;  // in a packed clip
  int length, chunks;
  int rows, columns, slabs;
  int tiles_down, tiles_across;
  int64_t units, items;
  int first_block, blocks;

  __device__ __forceinline__ int plane_size() const { return d1 * d2; }
};

struct Maps {
  int n, packed;
  Map at[3];

  __device__ __forceinline__ int of_block(int block) const {
    return (n > 1 && block >= at[1].first_block) + (n > 2 && block >= at[2].first_block);
  }
};

// What a thread knows of the position [y, x] in a slab of the item that it computes.
struct Own {
  bool inside;
  int plane, staged;  // the first plane of the unit; the place among the staged elements
  int64_t clip;
  int offset;  // of the position in the first plane of the packed clip
};

// Marches through an item, plane by plane from the one before its first to the one after its last. `fetch(clip, k)`
// reads element k of a packed clip; `stage(raw)` turns that into what is shared, which is zero outside of the map.
// `visit(q, center, width)` sees plane q of the unit: its own staged element, the rows of which are `width` apart.
template <int kStaged, class Raw, class Staged, class Fetch, class Stage, class Visit>
__device__ __forceinline__ void march(const Map& map, int64_t item, Staged*& buffer, Staged*& other, const Fetch& fetch,
                                      const Stage& stage, const Visit& visit) {
  constexpr int kSlots = kStaged / kThreads, kNever = -(1 << 30);
  const int tiles = map.tiles_down * map.tiles_across, tile = static_cast<int>(item % tiles);
  const int64_t first = item / tiles * map.slabs;
  const int y0 = tile / map.tiles_across * map.rows, x0 = tile % map.tiles_across * map.columns;
  const int height = map.rows + 2, width = map.columns + 2, count = map.slabs * height * width;

  int64_t clip[kSlots];
  int plane[kSlots], offset[kSlots];
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    const int e = k * kThreads + threadIdx.x;
    const int64_t unit = first + e / (height * width);
    const int y = y0 + e / width % height - 1, x = x0 + e % width - 1;
    const bool inside = e < count && unit < map.units && y >= 0 && y < map.d1 && x >= 0 && x < map.d2;
    const int start = static_cast<int>(unit % map.chunks) * map.length;
    clip[k] = unit / map.chunks;
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
      const int e = k * kThreads + threadIdx.x;
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
  const int64_t unit = item / tiles * map.slabs + slab;
  const int row = position / map.columns % map.rows, column = position % map.columns;
  const int y = tile / map.tiles_across * map.rows + row, x = tile % map.tiles_across * map.columns + column;
  const int plane = static_cast<int>(unit % map.chunks) * map.length;
  return {slab < map.slabs && unit < map.units && y < map.d1 && x < map.d2, plane,
          (slab * (map.rows + 2) + row + 1) * (map.columns + 2) + column + 1, unit / map.chunks,
          map.start + (plane * map.d1 + y) * map.d2 + x};
}

// The moments of numbers added one by one, relative to the first of them.
template <class A>
struct Sample {
  A origin = 0, sum = 0, squares = 0;
  int count = 0;

  __device__ __forceinline__ void add(A value) {
    if (count == 0) origin = value;
    const A deviation = value - origin;
    sum += deviation, squares += deviation * deviation, ++count;
  }
  __device__ __forceinline__ Moments moments() const {
    if (count == 0) return Moments::none();
    const double mean = static_cast<double>(sum) / count;
    return {static_cast<double>(count), origin + mean, squares - mean * sum};
  }
};

// The parameters of each map's gate, and where the gradients of the weights go.
struct Gates {
  GateParameters at[3];
};

// Of tap k of 27 of a feature, in elements.
__device__ __forceinline__ int64_t tap_offset(const GateParameters& gate, int feature, int k) {
  return feature * gate.stride[0] + k / 9 * gate.stride[1] + k / 3 % 3 * gate.stride[2] + k % 3 * gate.stride[3];
}

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

template <class A>
using Features = Vector<A, 2>;

// Convolves the items of this block's map; found(k, z) takes the result at element k of all clips.
template <class A, class Found>
__device__ __forceinline__ void convolve(const Maps& maps, const Map& map, const GateParameters& gate,
                                         const A* __restrict__ pooled, Features<A>* staged, const Found& found) {
  const int64_t packed = maps.packed;
  A w[2][27];
#pragma unroll
  for (int k = 0; k < 54; ++k) w[k / 27][k % 27] = static_cast<const A*>(gate.weight)[tap_offset(gate, k / 27, k % 27)];

  const auto fetch = [&](int64_t clip, int k) {
    const A* maximum = pooled + 2 * clip * packed + k;
    return Features<A>{{*maximum, maximum[packed]}};
  };
  const auto stage = [](const Features<A>& features) { return features; };
  Features<A>*buffer = staged, *other = staged + kConvStaged;
  for (int64_t item = blockIdx.x - map.first_block; item < map.items; item += map.blocks) {
    const Own own = own_position(map, item, threadIdx.x);
    A before = 0, here = 0, after = 0;
    march<kConvStaged, Features<A>>(map, item, buffer, other, fetch, stage,
                                    [&](int q, const Features<A>* plane, int width) {
                                      if (!own.inside) return;
#pragma unroll
                                      for (int k = 0; k < 9; ++k) {
                                        const Features<A> value = plane[own.staged + (k / 3 - 1) * width + k % 3 - 1];
#pragma unroll
                                        for (int f = 0; f < 2; ++f) {
                                          after += w[f][k] * value.at[f];
                                          here += w[f][9 + k] * value.at[f];
                                          before += w[f][18 + k] * value.at[f];
                                        }
                                      }
                                      if (q > 0 && own.plane + q <= map.d0)
                                        found(own.clip * packed + own.offset + (q - 1) * map.plane_size(), before);
                                      before = here, here = after, after = 0;
                                    });
  }
}

// Where the second and the third map begin in a packed clip of so many elements; there, where there are none.
struct Borders {
  int packed, second, third;

  __device__ __forceinline__ int map_of(int k) const { return (k >= second) + (k >= third); }
};

// Calls each(k, e) for the vectors of all packed clips that fall to this block of `blocks`: elements from k on, which
// is e in its clip.
template <int V, class Each>
__device__ __forceinline__ void for_each_vector(const Borders& borders, int64_t batch, int blocks, const Each& each) {
  const int pieces = (borders.packed + kThreads * V - 1) / (kThreads * V);
  for (int64_t item = blockIdx.x; item < batch * pieces; item += blocks) {
    const int e = (static_cast<int>(item % pieces) * kThreads + threadIdx.x) * V;
    if (e < borders.packed) each(item / pieces * borders.packed + e, e);
  }
}

template <class A, int V>
__global__ void __launch_bounds__(kThreads, 1)
    gate_kernel(Maps maps, Borders borders, int64_t batch, Gates gates, const A* __restrict__ pooled, A* gate, A* norm,
                A* statistics, int blocks, Workspace workspace) {
  AIA_SHARED(Features<A>, staged, 2 * kConvStaged);
  AIA_SHARED(Moments, shared, kThreads / 2);
  const int m = maps.of_block(blockIdx.x);
  const Map& map = maps.at[m];
  Sample<A> sample;
  convolve(maps, map, gates.at[m], pooled, staged, [&](int64_t k, A z) {
    gate[k] = z;
    sample.add(z);
  });

  Moments mine = sample.moments();
  reduce_block<kThreads, 1>(shared, mine);
  Moments* const partial = reinterpret_cast<Moments*>(workspace.partial);
  if (threadIdx.x == 0) partial[blockIdx.x] = mine;
  if (last_to_arrive(workspace.tickets + m, map.blocks)) {
    mine = Moments::none();
    for (int b = threadIdx.x; b < map.blocks; b += kThreads) mine.merge(partial[map.first_block + b]);
    reduce_block<kThreads, 1>(shared, mine);
    if (threadIdx.x == 0)
      finish_norm(gates.at[m], mine.mean, mine.squares / mine.count, mine.count, norm + 4 * m, statistics + 3 * m);
  }
  grid_barrier();
  for_each_vector<V>(borders, batch, blocks, [&](int64_t k, int e) {
    Vector<A, V> values = load_vector<V>(gate + k);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Norm<A> bn = load_norm(norm, borders.map_of(e + i));
      values.at[i] = bn.gate(bn.normalized(values.at[i]), Exponential{});
    }
    *reinterpret_cast<Vector<A, V>*>(gate + k) = values;
  });
}

// By a norm that is known, or made of the gates' fixed statistics and then returned; z is stored where wanted.
template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    known_gate_kernel(Maps maps, Gates gates, const A* __restrict__ pooled, const A* __restrict__ known,
                      A* __restrict__ gate, A* __restrict__ z, A* __restrict__ norm, A* __restrict__ statistics) {
  AIA_SHARED(Features<A>, staged, 2 * kConvStaged);
  const int m = maps.of_block(blockIdx.x);
  const Map& map = maps.at[m];
  A row[4], used[3];
  if (known) {
#pragma unroll
    for (int i = 0; i < 4; ++i) row[i] = known[4 * m + i];
  } else {
    finish_norm(gates.at[m], 0, 0, 1, row, used);
    if (blockIdx.x == map.first_block && threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) norm[4 * m + i] = row[i];
#pragma unroll
      for (int i = 0; i < 3; ++i) statistics[3 * m + i] = used[i];
    }
  }
  const Norm<A> bn = load_norm(row, 0);
  convolve(maps, map, gates.at[m], pooled, staged, [&](int64_t k, A value) {
    if (z) z[k] = value;
    gate[k] = bn.gate(bn.normalized(value), Exponential{});
  });
}

// Sums of N numbers.
template <class A, int N>
struct Sums {
  A at[N];

  __device__ __forceinline__ void merge(const Sums& other) {
#pragma unroll
    for (int k = 0; k < N; ++k) at[k] += other.at[k];
  }
};

// The gradient of the sigmoid's argument, and xhat.
template <class A>
struct PreActivation {
  A grad, xhat;

  __device__ __forceinline__ PreActivation(const Norm<A>& bn, A grad_gate, A z) : xhat(bn.normalized(z)) {
    const A gate = bn.gate(xhat, Exponential{});
    grad = grad_gate * gate * (1 - gate);
  }
};

// The sums of both over batch and map, by all blocks of a launch.
template <class A, int V>
__device__ __forceinline__ void sum_over_batch(const Borders& borders, int64_t batch, int maps,
                                               const A* __restrict__ grad_gate, const A* __restrict__ z,
                                               const A* __restrict__ norm, A* sums, int blocks,
                                               const Workspace& workspace) {
  using Partial = Sums<double, 6>;  // both of each map
  AIA_SHARED(Partial, shared, kThreads / 2);
  A mine[6] = {};
  for_each_vector<V>(borders, batch, blocks, [&](int64_t at, int e) {
    const auto grads = load_vector<V>(grad_gate + at), values = load_vector<V>(z + at);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const int m = borders.map_of(e + k);
      const PreActivation<A> u(load_norm(norm, m), grads.at[k], values.at[k]);
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        if (m != i) continue;
        mine[2 * i] += u.grad;
        mine[2 * i + 1] += u.grad * u.xhat;
      }
    }
  });
  Partial total;
#pragma unroll
  for (int i = 0; i < 6; ++i) total.at[i] = mine[i];
  reduce_block<kThreads, 1>(shared, total);
  Partial* const partial = reinterpret_cast<Partial*>(workspace.partial);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
  if (!last_to_arrive(workspace.tickets, blocks)) return;
  total = {};
  for (int b = threadIdx.x; b < blocks; b += kThreads) total.merge(partial[b]);
  reduce_block<kThreads, 1>(shared, total);
  if (threadIdx.x == 0)
    for (int i = 0; i < 2 * maps; ++i) sums[i] = static_cast<A>(shared[0].at[i]);
}

template <class A, int V>
__global__ void __launch_bounds__(kThreads, 1)
    backward_reduce_kernel(Borders borders, int64_t batch, int maps, const A* __restrict__ grad_gate,
                           const A* __restrict__ z, const A* __restrict__ norm, A* sums, int blocks,
                           Workspace workspace) {
  sum_over_batch<A, V>(borders, batch, maps, grad_gate, z, norm, sums, blocks, workspace);
}

// kSums: the sums are found first, by blocks that all run at once; else they are given.
template <class A, int V, bool kSums>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(Maps maps, Borders borders, int64_t batch, Gates gates, Gates grads,
                    const A* __restrict__ grad_gate, const A* __restrict__ z, const A* __restrict__ norm, A* sums,
                    const A* __restrict__ statistics, const A* __restrict__ pooled, A* __restrict__ grad_pooled,
                    int blocks, Workspace workspace) {
  using Taps = Sums<A, 27>;
  using Raw = Vector<A, 2>;  // of the gradient of the gate, and z
  AIA_SHARED(A, staged, 2 * kBackwardStaged);
  AIA_SHARED(Taps, shared, kThreads / 2);
  if constexpr (kSums) {
    sum_over_batch<A, V>(borders, batch, maps.n, grad_gate, z, norm, sums, blocks, workspace);
    grid_barrier();
  }
  const int m = maps.of_block(blockIdx.x), feature = threadIdx.x % 2;
  const Map& map = maps.at[m];
  const int64_t packed = maps.packed;
  const Norm<A> bn = load_norm(norm, m);
  const A share = statistics[3 * m + 2];
  const A mean_grad = mean_of(sums[2 * m], share), mean_grad_xhat = mean_of(sums[2 * m + 1], share);

  A w[27];
  Taps taps{};
#pragma unroll
  for (int k = 0; k < 27; ++k) w[k] = static_cast<const A*>(gates.at[m].weight)[tap_offset(gates.at[m], feature, k)];

  const auto fetch = [&](int64_t clip, int k) { return Raw{{grad_gate[clip * packed + k], z[clip * packed + k]}}; };
  const auto stage = [&](const Raw& raw) {
    const PreActivation<A> u(bn, raw.at[0], raw.at[1]);
    return bn.grad_z(u.grad, u.xhat, mean_grad, mean_grad_xhat);
  };
  A *buffer = staged, *other = staged + kBackwardStaged;
  for (int64_t item = blockIdx.x - map.first_block; item < map.items; item += map.blocks) {
    const Own own = own_position(map, item, threadIdx.x / 2);
    const int64_t at = (2 * own.clip + feature) * packed + own.offset;
    // Of the planes before, at and after the visited one, as far as they belong to the unit: the feature, and the
    // gradient gathered for it.
    const auto feature_of = [&](int q) {
      return own.inside && q < map.length && own.plane + q < map.d0 ? pooled[at + q * map.plane_size()] : A(0);
    };
    A p_before = 0, p_here = 0, p_after = feature_of(0);
    A before = 0, here = 0, after = 0;
    march<kBackwardStaged, Raw>(map, item, buffer, other, fetch, stage, [&](int q, const A* plane, int width) {
      if (!own.inside) return;
      const A p_next = feature_of(q + 2);
#pragma unroll
      for (int k = 0; k < 9; ++k) {
        const A dz = plane[own.staged + (1 - k / 3) * width + 1 - k % 3];
        before += w[k] * dz, here += w[9 + k] * dz, after += w[18 + k] * dz;
        taps.at[k] += p_before * dz, taps.at[9 + k] += p_here * dz, taps.at[18 + k] += p_after * dz;
      }
      if (q > 0 && own.plane + q <= map.d0) grad_pooled[at + (q - 1) * map.plane_size()] = before;
      before = here, here = after, after = 0;
      p_before = p_here, p_here = p_after, p_after = p_next;
    });
  }

  reduce_block<kThreads, 2>(shared, taps);
  A* const partial = reinterpret_cast<A*>(workspace.partial);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < 54; ++k) partial[blockIdx.x * 54 + k] = shared[k / 27].at[k % 27];
  }
  if (!last_to_arrive(workspace.tickets + m, map.blocks)) return;
  constexpr int kRows = kThreads / 54;
  double* const totals = reinterpret_cast<double*>(shared);
  const int row = threadIdx.x / 54, column = threadIdx.x % 54;
  if (row < kRows) {
    double sum = 0;
#pragma unroll 4
    for (int b = row; b < map.blocks; b += kRows) sum += partial[(map.first_block + b) * 54 + column];
    totals[row * 54 + column] = sum;
  }
  __syncthreads();
  if (row == 0) {
    double sum = totals[column];
#pragma unroll
    for (int r = 1; r < kRows; ++r) sum += totals[r * 54 + column];
    const GateParameters& grad = grads.at[m];
    static_cast<A*>(const_cast<void*>(grad.weight))[tap_offset(grad, column / 27, column % 27)] = static_cast<A>(sum);
  }
}

int even(int length, int most) { return ceil_div(length, ceil_div(length, most)); }

// Cuts every map into items, and shares the blocks of a launch, at most so many, out among the maps.
Maps cut(const PackedDims& dims, int positions, int staged, int most) {
  constexpr int kColumns = 32, kLongest = 32, kShortest = 4;
  Maps maps{dims.n, static_cast<int>(dims.packed()), {}};
  int64_t items = 0;
  for (int m = 0; m < dims.n; ++m) {
    Map& map = maps.at[m];
    map.d0 = static_cast<int>(dims.dims[m][0]);
    map.d1 = static_cast<int>(dims.dims[m][1]);
    map.d2 = static_cast<int>(dims.dims[m][2]);
    map.start = static_cast<int>(dims.offset(m));
    map.columns = even(map.d2, kColumns);
    map.rows = even(map.d1, std::min(positions / map.columns, staged / (map.columns + 2) - 2));
    map.tiles_down = ceil_div(map.d1, map.rows);
    map.tiles_across = ceil_div(map.d2, map.columns);
    const int64_t tiles = static_cast<int64_t>(map.tiles_down) * map.tiles_across;
    // Long chunks read few planes twice, short ones make work for every multiprocessor.
    map.length = std::min(map.d0, kLongest);
    while (map.length > kShortest && dims.B * tiles * ceil_div(map.d0, map.length) < most)
      map.length = ceil_div(map.length, 2);
    map.length = even(map.d0, map.length);
    map.chunks = ceil_div(map.d0, map.length);
    map.units = dims.B * map.chunks;
    const int fit = std::min(positions / (map.rows * map.columns), staged / ((map.rows + 2) * (map.columns + 2)));
    map.slabs = static_cast<int>(std::clamp<int64_t>(map.units * tiles / most, 1, fit));
    map.items = (map.units + map.slabs - 1) / map.slabs * tiles;
    items += map.items;
  }
  int blocks = 0;
  for (int m = 0; m < dims.n; ++m) {
    Map& map = maps.at[m];
    const double share = static_cast<double>(map.items) / static_cast<double>(items);
    map.first_block = blocks;
    map.blocks = static_cast<int>(std::clamp<int64_t>(static_cast<int64_t>(share * (most - 2)), 1, map.items));
    blocks += map.blocks;
  }
  return maps;
}

int block_count(const Maps& maps) { return maps.at[maps.n - 1].first_block + maps.at[maps.n - 1].blocks; }

Borders borders_of(const PackedDims& dims) {
  const int packed = static_cast<int>(dims.packed());
  return {packed, dims.n > 1 ? static_cast<int>(dims.offset(1)) : packed,
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

Gates gates_of(const GateParameters* gates, int n) {
  Gates copied{};
  std::copy_n(gates, n, copied.at);
  return copied;
}

// At most so many blocks of a kernel whose blocks wait for one another: three, for that many maps, fit any device.
template <class Kernel>
int most_together(Kernel kernel) {
  return std::clamp(blocks_together(kernel, kThreads), 3, kGateBlocks);
}

}  // namespace

int gate(const PackedDims& dims, Scalar scalar, const GateParameters* gates, const void* pooled, void* gate, void* norm,
         void* statistics, Workspace workspace, void* stream) {
  const Gates of_maps = gates_of(gates, dims.n);
  return with_maps(scalar, [&](auto type) {
    using A = decltype(type);
    if (std::none_of(gates, gates + dims.n, [](const GateParameters& g) { return g.batch; })) {
      const Maps maps = cut(dims, kConvPositions, kConvStaged, kGateBlocks);
      return launch(known_gate_kernel<A>, block_count(maps), kThreads, stream, maps, of_maps,
                    static_cast<const A*>(pooled), nullptr, static_cast<A*>(gate), nullptr, static_cast<A*>(norm),
                    static_cast<A*>(statistics));
    }
    return with_width<A>(dims, {gate}, [&](auto width) {
      const auto kernel = gate_kernel<A, width.value>;
      const Maps maps = cut(dims, kConvPositions, kConvStaged, most_together(kernel));
      const int blocks = block_count(maps);
      return launch_together(kernel, blocks, kThreads, stream, maps, borders_of(dims), dims.B, of_maps,
                             static_cast<const A*>(pooled), static_cast<A*>(gate), static_cast<A*>(norm),
                             static_cast<A*>(statistics), blocks, workspace);
    });
  });
}

int gate_again(const PackedDims& dims, Scalar scalar, const GateParameters* gates, const void* pooled, const void* norm,
               void* gate, void* z, void* stream) {
  const Maps maps = cut(dims, kConvPositions, kConvStaged, kGateBlocks);
  return with_maps(scalar, [&](auto type) {
    using A = decltype(type);
    return launch(known_gate_kernel<A>, block_count(maps), kThreads, stream, maps, gates_of(gates, dims.n),
                  static_cast<const A*>(pooled), static_cast<const A*>(norm), static_cast<A*>(gate), static_cast<A*>(z),
                  nullptr, nullptr);
  });
}

int gate_backward_reduce(const PackedDims& dims, Scalar scalar, const void* grad_gate, const void* z, const void* norm,
                         void* sums, Workspace workspace, void* stream) {
  return with_maps(scalar, [&](auto type) {
    using A = decltype(type);
    return with_width<A>(dims, {grad_gate, z}, [&](auto width) {
      const int64_t items = dims.B * ceil_div(dims.packed(), kThreads * width.value);
      const int blocks = static_cast<int>(std::min<int64_t>(items, kGateBlocks));
      return launch(backward_reduce_kernel<A, width.value>, blocks, kThreads, stream, borders_of(dims), dims.B, dims.n,
                    static_cast<const A*>(grad_gate), static_cast<const A*>(z), static_cast<const A*>(norm),
                    static_cast<A*>(sums), blocks, workspace);
    });
  });
}

int gate_backward(const PackedDims& dims, Scalar scalar, const GateParameters* gates, const GateParameters* grads,
                  const void* grad_gate, const void* z, const void* norm, void* sums, bool sums_given,
                  const void* statistics, const void* pooled, void* grad_pooled, Workspace workspace, void* stream) {
  return with_maps(scalar, [&](auto type) {
    using A = decltype(type);
    const auto run = [&](auto start, auto kernel, int most) {
      const Maps maps = cut(dims, kBackwardPositions, kBackwardStaged, most);
      const int blocks = block_count(maps);
      return start(kernel, blocks, kThreads, stream, maps, borders_of(dims), dims.B, gates_of(gates, dims.n),
                   gates_of(grads, dims.n), static_cast<const A*>(grad_gate), static_cast<const A*>(z),
                   static_cast<const A*>(norm), static_cast<A*>(sums), static_cast<const A*>(statistics),
                   static_cast<const A*>(pooled), static_cast<A*>(grad_pooled), blocks, workspace);
    };
    if (sums_given)
      return run([](auto... given) { return launch(given...); }, backward_kernel<A, 1, false>, kGateBlocks);
    return with_width<A>(dims, {grad_gate, z}, [&](auto width) {
      const auto kernel = backward_kernel<A, width.value, true>;
      return run([](auto... given) { return launch_together(given...); }, kernel, most_together(kernel));
    });
  });
}

}  // namespace aia::cuda
