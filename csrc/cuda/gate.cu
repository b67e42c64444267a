// gate and gate_again (aia_kernels/schemas.py has the equations): 3x3x3 convolution 2 -> 1, normalization and sigmoid
// on packed maps. All maps of a context share a launch, one launch a pass.
//
//   gate        reads 3, writes 2 maps   the gates, by way of z; reads 2, writes 1 where no statistics are the batch's
//   gate_again  reads 2, writes 2        the gates and z
//
// The batch statistics are known only after the whole convolution. So the blocks of gate wait for one another between
// its two halves, and there is at most one for each multiprocessor. That spares a launch. Where maps are small, the
// second half finds z in the L2 cache.
#include "../common/moments.h"
#include "packed_maps.cuh"
#include "partials.cuh"

namespace aia::cuda {
namespace {

constexpr int kStaged = kForwardCapacity.staged;

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

template <class A>
using Features = Vector<A, 2>;

// Convolves the items of this block's map; found(k, z) takes the result at element k of all clips.
template <class A, class Found>
__device__ __forceinline__ void convolve(const Maps& maps, const Map& map, const GateParameters& gate,
                                         const A* __restrict__ pooled, Features<A>* staged, const Found& found) {
  const int64_t packed = maps.packed;
  A w[2][27];
#pragma unroll
  for (int k = 0; k < 54; ++k) w[k / 27][k % 27] = read<A>(gate.weight, tap_offset(gate, k / 27, k % 27));

  const auto fetch = [&](int64_t clip, int k) {
    const A* maximum = pooled + 2 * clip * packed + k;
    return Features<A>{{*maximum, maximum[packed]}};
  };
  const auto stage = [](const Features<A>& features) { return features; };
  Features<A>*buffer = staged, *other = staged + kStaged;
  for (int64_t item = blockIdx.x - map.first_block; item < map.items; item += map.blocks) {
    const Own own = own_position(map, item, threadIdx.x);
    A before = 0, here = 0, after = 0;
    march<kStaged, Features<A>>(map, item, buffer, other, fetch, stage,
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

// The moments of each map's z.
struct MapMoments {
  Moments at[3];

  static __device__ __forceinline__ MapMoments none() { return {Moments::none(), Moments::none(), Moments::none()}; }
  __device__ __forceinline__ void merge(const MapMoments& other) {
#pragma unroll
    for (int m = 0; m < 3; ++m) at[m].merge(other.at[m]);
  }
};

template <class A, int V>
__global__ void __launch_bounds__(kGateThreads, 1)
    gate_kernel(Maps maps, Clips clips, Gates gates,
                const A* __restrict__ pooled,  // [B, 2, M]: maximum, mean
                A* gate,                       // [B, M]; holds z first
                A* __restrict__ norm,          // [n, 4]: mean, rstd, scale, shift
                A* __restrict__ statistics,    // [n, 3]: mean, variance, share of an element
                double* workspace) {           // [blocks, kMomentPartials]
  AIA_SHARED(Features<A>, staged, 2 * kStaged);
  AIA_SHARED(MapMoments, shared, kGateThreads / 2);
  AIA_SHARED(Norm<A>, norms, 3);
  const int convolved = maps.of_block(blockIdx.x);
  Sample<A> sample;
  convolve(maps, maps.at[convolved], gates.at[convolved], pooled, staged, [&](int64_t k, A z) {
    gate[k] = z;
    sample.add(z);
  });

  MapMoments mine = MapMoments::none();
  mine.at[0] = sample.moments();
  reduce_block<kGateThreads, 1>(shared, mine);
  Moments* const partial = reinterpret_cast<Moments*>(workspace);
  if (threadIdx.x == 0) partial[blockIdx.x] = mine.at[0];
  grid_barrier();

  mine = MapMoments::none();
#pragma unroll
  for (int m = 0; m < 3; ++m)
    if (m < maps.n)
      for (int b = threadIdx.x; b < maps.at[m].blocks; b += kGateThreads)
        mine.at[m].merge(partial[maps.at[m].first_block + b]);
  reduce_block<kGateThreads, 1>(shared, mine);
  if (threadIdx.x < maps.n) {
    const int m = threadIdx.x;
    const Moments& found = shared[0].at[m];
    A row[4], used[3];
    finish_norm(gates.at[m], found.mean, found.squares / found.count, found.count, row, used);
    norms[m] = load_norm(row, 0);
    if (blockIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) norm[4 * m + i] = row[i];
#pragma unroll
      for (int i = 0; i < 3; ++i) statistics[3 * m + i] = used[i];
    }
  }
  __syncthreads();
  for_each_vector<V>(clips, maps.blocks(), [&](int64_t k, int e) {
    Vector<A, V> values = load_vector<V>(gate + k);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Norm<A>& bn = norms[clips.map_of(e + i)];
      values.at[i] = bn.gate(bn.normalized(values.at[i]), Exponential{});
    }
    *reinterpret_cast<Vector<A, V>*>(gate + k) = values;
  });
}

// By a norm that is known, or made of the gates' fixed statistics and then returned; z is stored where wanted.
template <class A>
__global__ void __launch_bounds__(kGateThreads, 1)
    known_gate_kernel(Maps maps, Gates gates,
                      const A* __restrict__ pooled,  // [B, 2, M]: maximum, mean
                      const A* __restrict__ known,   // [n, 4], the norm, or null
                      A* __restrict__ gate,          // [B, M]
                      A* __restrict__ z,             // [B, M], or null
                      A* __restrict__ norm,          // [n, 4], written where `known` is null
                      A* __restrict__ statistics) {  // [n, 3], written where `known` is null
  AIA_SHARED(Features<A>, staged, 2 * kStaged);
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

}  // namespace

int gate_blocks_together() { return std::clamp(multiprocessors(), kFewestGateBlocks, kGateBlocks); }

int gate(const PackedDims& dims, Scalar scalar, const GateParameters* gates, const void* pooled, void* gate, void* norm,
         void* statistics, Workspace workspace, void* stream) {
  const Gates of_maps = gates_of(gates, dims.n);
  return with_maps(scalar, [&](auto type) {
    using A = decltype(type);
    if (std::none_of(gates, gates + dims.n, [](const GateParameters& g) { return g.batch; })) {
      const Maps maps = cut(dims, kForwardCapacity, kGateBlocks);
      return launch(known_gate_kernel<A>, maps.blocks(), kGateThreads, stream, maps, of_maps,
                    static_cast<const A*>(pooled), nullptr, static_cast<A*>(gate), nullptr, static_cast<A*>(norm),
                    static_cast<A*>(statistics));
    }
    return with_width<A>(dims, {gate}, [&](auto width) {
      const auto kernel = gate_kernel<A, width.value>;
      const Maps maps = cut(dims, kForwardCapacity, workspace.blocks);
      return launch_together(kernel, maps.blocks(), kGateThreads, stream, maps, clips_of(dims), of_maps,
                             static_cast<const A*>(pooled), static_cast<A*>(gate), static_cast<A*>(norm),
                             static_cast<A*>(statistics), workspace.data);
    });
  });
}

int gate_again(const PackedDims& dims, Scalar scalar, const GateParameters* gates, const void* pooled, const void* norm,
               void* gate, void* z, void* stream) {
  const Maps maps = cut(dims, kForwardCapacity, kGateBlocks);
  return with_maps(scalar, [&](auto type) {
    using A = decltype(type);
    return launch(known_gate_kernel<A>, maps.blocks(), kGateThreads, stream, maps, gates_of(gates, dims.n),
                  static_cast<const A*>(pooled), static_cast<const A*>(norm), static_cast<A*>(gate), static_cast<A*>(z),
                  nullptr, nullptr);
  });
}

}  // namespace aia::cuda
