// gate and gate_again (aia_kernels/schemas.py has the equations): 3x3x3 convolution 2 -> 1, normalization and sigmoid
// on packed maps. All maps of a context share a launch, one launch a pass.
//
//   gate        reads 3, writes 2 maps   the gates, by way of z; reads 2, writes 1 where no statistics are the batch's
//   gate_again  reads 2, writes 2        the gates and z
//
// The batch statistics are known only after the whole convolution. So the blocks of gate wait for one another between
// its two halves, and there is at most one for each multiprocessor. That spares a launch. Where maps are small, the
// second half finds z in the L2 cache.
#include "packed_maps.cuh"

namespace aia::cuda {
namespace {

// Both features of an element, side by side in shared memory.
template <class A>
using Features = Vector<A, 2>;

template <class A>
constexpr int kPlaces = kForwardCapacity<A>.places;
// The places of each buffer, and the one that is none.
template <class A>
constexpr int kSharedBytes = kBuffers * (kPlaces<A> + 1) * static_cast<int>(sizeof(Features<A>));

// What a strip sees of a plane.
template <class A>
struct Window : FrameWindow<A, Features<A>> {
  using FrameWindow<A, Features<A>>::FrameWindow;
  // Adds what it gives to the results of a plane, whose taps begin at kTap; as the first one if kFirst.
  template <int kTap, bool kFirst>
  __device__ __forceinline__ void add(const A (&w)[2][27], A (&z)[kStrip<A>]) const {
#pragma unroll
    for (int i = 0; i < kStrip<A> + 2; ++i)
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        const Features<A> seen = this->at(i, j);
#pragma unroll
        for (int r = i < 2 ? 0 : i - 2; r <= i && r < kStrip<A>; ++r)
#pragma unroll
          for (int f = 0; f < 2; ++f) {
            const A weight = w[f][kTap + (i - r) * 3 + j];
            z[r] = kFirst && i == r && j + f == 0 ? weight * seen.at[f] : z[r] + weight * seen.at[f];
          }
      }
  }
};

// Convolves the items of this block's map; found(to, k, rows, z) takes a strip of results, of which there are so many
// rows, the first at to[k] in each of the results' arrays [B, M].
template <class A, int kArrays, class Found>
__device__ __forceinline__ void convolve(const Maps& maps, const Map& map, const GateParameters& gate,
                                         const A* __restrict__ pooled, A* const (&results)[kArrays],
                                         const Found& found) {
  constexpr int kSlots = kForwardCapacity<A>.staged / kGateThreads, kStride = kPlaces<A> + 1;
  AIA_DYNAMIC_SHARED(Features<A>, buffers);
  AIA_SHARED(A, weight, kSharedWeight);
  share_weight(gate, weight);
  clear<kStride>(map, buffers);
  __syncthreads();
  A w[2][27];
  load_weight(weight, w);

  int length = map.length, last_visit = map.last_visit();
  opaque(length), opaque(last_visit);
  const Item step(map, map.blocks);
  Own own(map, threadIdx.x);
  Slots<kSlots> slots(map);
  const FrameRows<A, Features<A>> rows(own, map.pitch);
  SharedPlace places[kSlots];
#pragma unroll
  for (int k = 0; k < kSlots; ++k) places[k] = shared_place(buffers + slots.place[k]);
  for (Item item(map, blockIdx.x - map.first_block); item.clip < maps.batch; item.advance(map, step)) {
    own.begin(map, item), slots.begin(map, item);
    const A *maximum = pooled + (2 * item.clip * maps.packed + map.start), *mean = maximum + maps.packed;
    A* to[kArrays];
#pragma unroll
    for (int n = 0; n < kArrays; ++n) {
      to[n] = results[n] + (item.clip * maps.packed + own.offset);
      opaque(to[n]);
    }
    // Asks for the next plane.
    const auto copy = [&](auto buffer) {
      constexpr int kBuffer = decltype(buffer)::value * kStride * sizeof(Features<A>);
      opaque(maximum), opaque(mean);
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        const bool present = slots.present(k);
        copy_async_or_zero<sizeof(A), kBuffer>(places[k], maximum + slots.at[k], present);
        copy_async_or_zero<sizeof(A), kBuffer + sizeof(A)>(places[k], mean + slots.at[k], present);
        slots.at[k] += slots.plane;
      }
      end_of_copies();
    };
    A z[kBuffers][kStrip<A>] = {};
    copy(std::integral_constant<int, 0>{});
    if (map.first_visit() < last_visit)
      copy(std::integral_constant<int, 1>{});
    else
      end_of_copies();
    march(map.first_visit(), length, [&](auto turn, int q) {
      constexpr int kTurn = decltype(turn)::value, kNext = (kTurn + 1) % kBuffers, kLast = (kTurn + 2) % kBuffers;
      if (q <= last_visit) {
        wait_for_copies<1>();
        // What all have copied is here, and nobody reads the plane before any more.
        __syncthreads();
        if (q + 2 <= last_visit)
          copy(std::integral_constant<int, kLast>{});
        else
          end_of_copies();
        if (own.planes) {
          const Window<A> window(buffers + kTurn * kStride, rows);
          if (in_item(length, q - 1)) window.template add<18, false>(w, z[kTurn]);
          if (in_item(length, q)) window.template add<9, false>(w, z[kNext]);
          if (in_item(length, q + 1)) window.template add<0, true>(w, z[kLast]);
        }
      }
      if (q > 0 && q <= own.planes) found(to, (q - 1) * slots.plane, own.rows, z[kTurn]);
    });
    // The first copies of the next item go where this one's last plane may be read.
    __syncthreads();
  }
}

// Numbers added one by one, relative to the first of them.
template <class A>
struct Sample {
  A origin = 0, sum = 0, squares = 0;
  int count = 0;

  __device__ __forceinline__ void add(const A (&values)[kStrip<A>], int rows) {
    if (count == 0) origin = values[0];
    count += rows;
    if (rows >= kStrip<A>) {
#pragma unroll
      for (int r = 0; r < kStrip<A>; ++r) add(values[r]);
    } else {
#pragma unroll
      for (int r = 0; r < kStrip<A> - 1; ++r)
        if (r < rows) add(values[r]);
    }
  }
  __device__ __forceinline__ void add(A value) {
    const A deviation = value - origin;
    sum += deviation, squares += deviation * deviation;
  }
};

// The moments of numbers about an origin. Seen from another one there is no division.
struct Deviations {
  double count, sum, squares;

  __device__ __forceinline__ Deviations from(double distance) const {
    return {count, sum + distance * count, squares + distance * (2 * sum + distance * count)};
  }
};

// The moments of a block's z, about an origin, as others find them.
struct PartialMoments {
  double origin;
  Deviations about;
};
static_assert(sizeof(PartialMoments) == kMomentPartials * sizeof(double));

template <class A>
__device__ __forceinline__ void leave_moments(const Sample<A>& sample, double* shared, PartialMoments* partial) {
  // The first thread has a sample.
  if (threadIdx.x == 0) shared[0] = sample.origin;
  __syncthreads();
  const double origin = shared[0];
  const Deviations own =
      Deviations{static_cast<double>(sample.count), sample.sum, sample.squares}.from(sample.origin - origin);
  double sums[3] = {own.count, own.sum, own.squares};
  sum_over_block(sums, shared + 1);
  if (threadIdx.x == 0) partial[blockIdx.x] = {origin, {sums[0], sums[1], sums[2]}};
}

// The mean and the variance of each map's z, one map a warp: lane 0 of it calls found(m, count, mean, variance).
template <class Found>
__device__ __forceinline__ void join_moments(const Maps& maps, const PartialMoments* partial, const Found& found) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, m = min(warp, maps.n - 1);
  const Map& map = maps.at[m];
  const PartialMoments* const of_map = partial + map.first_block;
  const double origin = of_map[0].origin;
  Deviations sums{};
  for (int b = lane; b < map.blocks; b += kWarp) {
    const Deviations block = of_map[b].about.from(of_map[b].origin - origin);
    sums.count += block.count, sums.sum += block.sum, sums.squares += block.squares;
  }
  const double count = team_sum(sums.count, kWarp), sum = team_sum(sums.sum, kWarp);
  const double squares = team_sum(sums.squares, kWarp);
  if (lane == 0 && warp < maps.n) {
    const double mean = sum / count;
    found(m, count, origin + mean, squares / count - mean * mean);
  }
}

template <class A>
__device__ __forceinline__ void write_norm(int m, const A (&row)[4], const A (&used)[3], A* __restrict__ norm,
                                           A* __restrict__ statistics) {
#pragma unroll
  for (int i = 0; i < 4; ++i) norm[4 * m + i] = row[i];
#pragma unroll
  for (int i = 0; i < 3; ++i) statistics[3 * m + i] = used[i];
}

template <class A, int V>
__global__ void __launch_bounds__(kGateThreads, 1)
    gate_kernel(Maps maps, Gates gates,
                const A* __restrict__ pooled,  // [B, 2, M]: maximum, mean
                A* gate,                       // [B, M]; holds z first
                A* __restrict__ norm,          // [n, 4]: mean, rstd, scale, shift
                A* __restrict__ statistics,    // [n, 3]: mean, variance, share of an element
                double* workspace) {           // [blocks, kMomentPartials]
  AIA_SHARED(double, shared, 1 + 3 * kGateWarps);
  AIA_SHARED(Norm<A>, norms, 3);
  const int own = maps.of_block(blockIdx.x);
  const Map& map = maps.at[own];
  Sample<A> sample;
  int pitch = map.d2;
  opaque(pitch);
  A* const results[] = {gate};
  convolve(maps, map, gates.at[own], pooled, results, [&](A* const(&to)[1], int k, int rows, const A(&z)[kStrip<A>]) {
    store_strip(to[0] + k, pitch, rows, z);
    sample.add(z, rows);
  });
  PartialMoments* const partial = reinterpret_cast<PartialMoments*>(workspace);
  leave_moments(sample, shared, partial);
  grid_barrier();

  join_moments(maps, partial, [&](int m, double count, double mean, double variance) {
    A row[4], used[3];
    finish_norm(gates.at[m], mean, variance, count, row, used);
    norms[m] = load_norm(row, 0);
    if (blockIdx.x == 0) write_norm(m, row, used, norm, statistics);
  });
  __syncthreads();
  const Sigmoid<A> sigmoid(norms[own]);
  for_each_run<V>(maps, map, [&](int64_t k, int kept) {
    Vector<A, V> values[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j)
      if (j < kept) values[j] = load_vector<V>(gate + k + j * kRunStep<V>);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (j >= kept) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) values[j].at[i] = sigmoid(values[j].at[i]);
      store_vector(gate + k + j * kRunStep<V>, values[j]);
    }
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
  const int m = maps.of_block(blockIdx.x);
  const Map& map = maps.at[m];
  A row[4], used[3];
  if (known) {
#pragma unroll
    for (int i = 0; i < 4; ++i) row[i] = known[4 * m + i];
  } else {
    finish_norm(gates.at[m], 0, 0, 1, row, used);
    if (blockIdx.x == map.first_block && threadIdx.x == 0) write_norm(m, row, used, norm, statistics);
  }
  const Sigmoid<A> sigmoid(load_norm(row, 0));
  int pitch = map.d2;
  opaque(pitch);
  A* const results[] = {gate, z ? z : gate};
  convolve(maps, map, gates.at[m], pooled, results,
           [&](A* const(&to)[2], int k, int rows, const A(&values)[kStrip<A>]) {
             A gates[kStrip<A>];
#pragma unroll
             for (int r = 0; r < kStrip<A>; ++r) gates[r] = sigmoid(values[r]);
             store_strip(to[0] + k, pitch, rows, gates);
             if (z) store_strip(to[1] + k, pitch, rows, values);
           });
}

}  // namespace

int gate_blocks_together() { return std::clamp(multiprocessors(), kFewestGateBlocks, kGateBlocks); }

int gate(const PackedDims& dims, Scalar scalar, const GateParameters* gates, const void* pooled, void* gate, void* norm,
         void* statistics, Workspace workspace, void* stream) {
  const Gates of_maps = gates_of(gates, dims.n);
  return with_maps(scalar, [&](auto type) {
    using A = decltype(type);
    const BlockSize size(kGateThreads, kSharedBytes<A>);
    if (std::none_of(gates, gates + dims.n, [](const GateParameters& g) { return g.batch; })) {
      const Maps maps = cut(dims, kForwardCapacity<A>, gate_blocks_together());
      return launch(known_gate_kernel<A>, maps.blocks(), size, stream, maps, of_maps, static_cast<const A*>(pooled),
                    nullptr, static_cast<A*>(gate), nullptr, static_cast<A*>(norm), static_cast<A*>(statistics));
    }
    return with_width<A>(dims, {gate}, [&](auto width) {
      const Maps maps = cut(dims, kForwardCapacity<A>, workspace.blocks);
      return launch_together(gate_kernel<A, width.value>, maps.blocks(), size, stream, maps, of_maps,
                             static_cast<const A*>(pooled), static_cast<A*>(gate), static_cast<A*>(norm),
                             static_cast<A*>(statistics), workspace.data);
    });
  });
}

int gate_again(const PackedDims& dims, Scalar scalar, const GateParameters* gates, const void* pooled, const void* norm,
               void* gate, void* z, void* stream) {
  return with_maps(scalar, [&](auto type) {
    using A = decltype(type);
    const Maps maps = cut(dims, kForwardCapacity<A>, gate_blocks_together());
    return launch(known_gate_kernel<A>, maps.blocks(), {kGateThreads, kSharedBytes<A>}, stream, maps,
                  gates_of(gates, dims.n), static_cast<const A*>(pooled), static_cast<const A*>(norm),
                  static_cast<A*>(gate), static_cast<A*>(z), nullptr, nullptr);
  });
}

}  // namespace aia::cuda
