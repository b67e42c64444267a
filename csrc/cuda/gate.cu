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

// Features of an element that lie side by side in shared memory: both, which one read brings, or each in an array of
// its own, so that neighbours are vectors of it.
template <Form kForm>
constexpr int kTogether = kForm == kOnes ? 2 : 1;
template <Form kForm>
constexpr int kArrays = 2 / kTogether<kForm>;
template <class A, Form kForm>
using Features = Vector<A, kTogether<kForm>>;

// The places of each array, and a vector of them that is none.
template <class A, Form kForm>
constexpr int kStride = kForwardCapacity<A, kForm>.places + 4;
template <class A, Form kForm>
constexpr int kSharedBytes = kBuffers * 2 * kStride<A, kForm> * static_cast<int>(sizeof(A));

// Adds what a strip sees of some features of a plane to the results of a plane, whose taps begin at kTap; as the first
// ones if kFirst.
template <int kTap, bool kFirst, class A, class Seen, Form kForm>
__device__ __forceinline__ void add(const FrameWindow<A, Seen, kForm>& window, const A (*w)[27], Strip<A, kForm>& z) {
  for_taps<FrameWindow<A, Seen, kForm>, kStrip<A, kForm>, kAcross<kForm>>(
      [&](int i, int j, int r, int c, int tap, bool first) {
        const Seen seen = window.at(i, j);
#pragma unroll
        for (int f = 0; f < kTogether<kForm>; ++f) {
          const A product = w[f][kTap + tap] * seen.at[f];
          z[r].at[c] = kFirst && first && f == 0 ? product : z[r].at[c] + product;
        }
      });
}

// Adds what a strip sees of plane q, in the buffer of this turn, to the results of the planes before, at and behind it,
// as far as an item of so many planes has them.
template <int kTurn, Form kForm, class A>
__device__ __forceinline__ void meet(const Features<A, kForm>* buffers,
                                     const FrameRows<A, Features<A, kForm>, kForm>& rows, const A (&w)[2][27],
                                     int length, int q, Strip<A, kForm> (&z)[kBuffers]) {
  const auto meet_array = [&](auto array) {
    constexpr int kArray = decltype(array)::value;
    const A(*const taps)[27] = w + kArray;
    const FrameWindow<A, Features<A, kForm>, kForm> window(
        buffers + (kTurn * kArrays<kForm> + kArray) * kStride<A, kForm>, rows);
    if (in_item(length, q - 1)) add<18, false>(window, taps, z[kTurn]);
    if (in_item(length, q)) add<9, false>(window, taps, z[(kTurn + 1) % kBuffers]);
    if (in_item(length, q + 1)) add<0, kArray == 0>(window, taps, z[(kTurn + 2) % kBuffers]);
  };
  meet_array(std::integral_constant<int, 0>{});
  if constexpr (kArrays<kForm> == 2) meet_array(std::integral_constant<int, 1>{});
}

// Passes on what strips of whole rows leave of a plane in a buffer: behind a barrier, found(to, k, vector) takes the
// results in the thread's slots, so far behind what the slots hold next. As an item begins, found.begin(z) hears of
// some of them. The buffer's next plane goes into the same slots, so no thread reads others.
template <Form kForm, class A, class Slots, int kResults, class Found>
__device__ __forceinline__ void pass_on(A* buffer, const Own<kForm>& own, const Slots& slots, int plane, int behind,
                                        const Strip<A, kForm>& z, A* const (&to)[kResults], const Found& found) {
  if (plane < own.planes) leave_strip<kForm>(buffer + own.place, own.rows, z);
  __syncthreads();
  if (plane == 0)
    slots.for_each([&](int k, auto) {
      if (slots.has_result(k, behind)) found.begin(buffer[slots.place[k]]);
    });
  slots.for_each([&](int k, auto width) {
    if (slots.has_result(k, behind)) found(to, slots.at[k] - behind, load_vector<width.value>(buffer + slots.place[k]));
  });
}

// Convolves the items of this block's map. Of whole rows found(to, k, vector) takes a vector of results, which belongs
// at to[k] in each of the results' arrays [B, M]; else found(to, k, rows, z) a strip of them, of so many rows.
template <Form kForm, class A, int kResults, class Found>
__device__ __forceinline__ void convolve(const Maps& maps, const Map& map, const GateParameters& gate,
                                         const A* __restrict__ pooled, A* const (&results)[kResults],
                                         const Found& found) {
  using Staged = Features<A, kForm>;
  constexpr int kApart = kArrays<kForm>, kPlaces = kStride<A, kForm>;
  AIA_DYNAMIC_SHARED(Staged, buffers);
  AIA_SHARED(A, weight, kSharedWeight);
  share_weight(gate, weight);
  clear<kBuffers * kApart, kPlaces>(map, buffers);
  __syncthreads();
  A w[2][27];
  load_weight(weight, w);

  int length = map.length, last_visit = map.last_visit();
  opaque(length), opaque(last_visit);
  const Item step(map, map.blocks);
  Own<kForm> own(map, threadIdx.x);
  Slots<kForwardCapacity<A, kForm>.staged, kForm> slots(map);
  constexpr int kSlots = decltype(slots)::kSlots;
  const FrameRows<A, Staged, kForm> rows(map, own);
  SharedPlace places[kSlots];
  slots.for_each([&](int k, auto) { places[k] = shared_place(buffers + slots.place[k]); });
  for (Item item(map, blockIdx.x - map.first_block); item.clip < maps.batch; item.advance(map, step)) {
    own.begin(map, item), slots.begin(map, item);
    const A *maximum = pooled + (2 * item.clip * maps.packed + map.start), *mean = maximum + maps.packed;
    A* to[kResults];
#pragma unroll
    for (int n = 0; n < kResults; ++n) {
      to[n] = results[n] + (item.clip * maps.packed + (kWholeRows<kForm> ? map.start : own.offset));
      opaque(to[n]);
    }
    // Asks for the next plane.
    const auto copy = [&](auto buffer) {
      constexpr int kFirst = decltype(buffer)::value * kApart * kPlaces * sizeof(Staged);
      constexpr int kSecond = kFirst + (kApart == 1 ? sizeof(A) : kPlaces * sizeof(Staged));
      opaque(maximum), opaque(mean);
      slots.for_each([&](int k, auto width) {
        const bool present = slots.present(k);
        copy_async_or_zero<width.value * sizeof(A), kFirst>(places[k], maximum + slots.at[k], present);
        copy_async_or_zero<width.value * sizeof(A), kSecond>(places[k], mean + slots.at[k], present);
        slots.at[k] += slots.plane;
      });
      end_of_copies();
    };
    Strip<A, kForm> z[kBuffers] = {};
    copy(std::integral_constant<int, 0>{});
    if (map.first_visit() < last_visit)
      copy(std::integral_constant<int, 1>{});
    else
      end_of_copies();
    // Results of whole rows are passed on in the turn behind the one in which they are complete.
    march(map.first_visit(), length + kWholeRows<kForm>, [&](auto turn, int q) {
      constexpr int kTurn = decltype(turn)::value, kLast = (kTurn + 2) % kBuffers;
      const bool visit = q <= last_visit;
      if (visit || kWholeRows<kForm>) {
        if (visit) wait_for_copies<1>();
        // What all have copied is here, and nobody reads the plane before any more.
        __syncthreads();
        if constexpr (kWholeRows<kForm>)
          if (q > 1) {
            const int behind = (min(q + 2, last_visit + 1) - (q - 2)) * slots.plane;
            pass_on<kForm>(reinterpret_cast<A*>(buffers + kLast * kApart * kPlaces), own, slots, q - 2, behind,
                           z[kLast], to, found);
          }
        if (q + 2 <= last_visit)
          copy(std::integral_constant<int, kLast>{});
        else
          end_of_copies();
        if (visit && own.planes) meet<kTurn, kForm>(buffers, rows, w, length, q, z);
      }
      if constexpr (!kWholeRows<kForm>)
        if (q > 0 && q <= own.planes) found(to, (q - 1) * slots.plane, own.rows, z[kTurn]);
    });
    // The first copies of the next item go where this one's last plane may be read; of whole rows that was before the
    // last results were passed on.
    if constexpr (!kWholeRows<kForm>) __syncthreads();
  }
}

// Numbers added one by one, relative to the first of them.
template <class A>
struct Sample {
  A origin = 0, sum = 0, squares = 0;
  int count = 0;

  template <int kRows, int kColumns>
  __device__ __forceinline__ void add(const Vector<A, kColumns> (&rows_of)[kRows], int rows) {
    if (count == 0) origin = rows_of[0].at[0];
    count += rows * kColumns;
    if (rows >= kRows) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) add(rows_of[r]);
    } else {
#pragma unroll
      for (int r = 0; r < kRows - 1; ++r)
        if (r < rows) add(rows_of[r]);
    }
  }
  template <int kColumns>
  __device__ __forceinline__ void add(const Vector<A, kColumns>& row) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const A deviation = row.at[c] - origin;
      sum += deviation, squares += deviation * deviation;
    }
  }
};

// Stores z, and adds it to a sample.
template <class A>
struct SampledZ {
  Sample<A>& sample;

  __device__ __forceinline__ void begin(A z) const {
    if (sample.count == 0) sample.origin = z;
  }
  template <int V>
  __device__ __forceinline__ void operator()(A* const (&to)[1], int k, const Vector<A, V>& z) const {
    store_vector(to[0] + k, z);
    sample.count += V;
    sample.add(z);
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
__device__ __forceinline__ void leave_moments(const Sample<A>& sample, int first, double* shared,
                                              PartialMoments* partial) {
  // One that has a sample.
  if (static_cast<int>(threadIdx.x) == first) shared[0] = sample.origin;
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

template <class A, Form kForm, int V>
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
  if constexpr (kWholeRows<kForm>) {
    convolve<kForm>(maps, map, gates.at[own], pooled, results, SampledZ<A>{sample});
  } else {
    const auto found = [&](A* const(&to)[1], int k, int rows, const Strip<A, kForm>& z) {
      store_strip<kForm>(to[0] + k, pitch, rows, z);
      sample.add(z, rows);
    };
    convolve<kForm>(maps, map, gates.at[own], pooled, results, found);
  }
  PartialMoments* const partial = reinterpret_cast<PartialMoments*>(workspace);
  // Of whole rows the slots of the first threads may be those of a frame.
  const int first = kWholeRows<kForm> ? map.frame_across() / (map.wide == 4 ? 4 : 1) : 0;
  leave_moments(sample, first, shared, partial);
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

// Stores gates, and z where wanted.
template <class A>
struct GatesOfZ {
  const Sigmoid<A>& sigmoid;
  bool has_z;

  __device__ __forceinline__ void begin(A) const {}
  template <int V>
  __device__ __forceinline__ void operator()(A* const (&to)[2], int k, const Vector<A, V>& z) const {
    Vector<A, V> gates;
#pragma unroll
    for (int i = 0; i < V; ++i) gates.at[i] = sigmoid(z.at[i]);
    store_vector(to[0] + k, gates);
    if (has_z) store_vector(to[1] + k, z);
  }
};

// By a norm that is known, or made of the gates' fixed statistics and then returned; z is stored where wanted.
template <class A, Form kForm>
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
  if constexpr (kWholeRows<kForm>) {
    convolve<kForm>(maps, map, gates.at[m], pooled, results, GatesOfZ<A>{sigmoid, z != nullptr});
  } else {
    const auto found = [&](A* const(&to)[2], int k, int rows, const Strip<A, kForm>& values) {
      Strip<A, kForm> gates;
#pragma unroll
      for (int r = 0; r < kStrip<A, kForm>; ++r)
#pragma unroll
        for (int c = 0; c < kAcross<kForm>; ++c) gates[r].at[c] = sigmoid(values[r].at[c]);
      store_strip<kForm>(to[0] + k, pitch, rows, gates);
      if (z) store_strip<kForm>(to[1] + k, pitch, rows, values);
    };
    convolve<kForm>(maps, map, gates.at[m], pooled, results, found);
  }
}

}  // namespace

int gate_blocks_together() { return std::clamp(multiprocessors(), kFewestGateBlocks, kGateBlocks); }

int gate(const PackedDims& dims, Scalar scalar, const GateParameters* gates, const void* pooled, void* gate, void* norm,
         void* statistics, Workspace workspace, void* stream) {
  const Gates of_maps = gates_of(gates, dims.n);
  const bool known = std::none_of(gates, gates + dims.n, [](const GateParameters& g) { return g.batch; });
  return with_maps(scalar, [&](auto type) {
    using A = decltype(type);
    return with_forms<A>(dims, {pooled, gate}, [&](auto form, auto straight) {
      constexpr Form kForm = form.value;
      const BlockSize size(kGateThreads, kSharedBytes<A, kForm>);
      if (known) {
        const Maps maps = cut(dims, kForwardCapacity<A, kForm>, gate_blocks_together());
        return launch(known_gate_kernel<A, kForm>, maps.blocks(), size, stream, maps, of_maps,
                      static_cast<const A*>(pooled), nullptr, static_cast<A*>(gate), nullptr, static_cast<A*>(norm),
                      static_cast<A*>(statistics));
      }
      const Maps maps = cut(dims, kForwardCapacity<A, kForm>, workspace.blocks);
      return launch_together(gate_kernel<A, kForm, straight.value>, maps.blocks(), size, stream, maps, of_maps,
                             static_cast<const A*>(pooled), static_cast<A*>(gate), static_cast<A*>(norm),
                             static_cast<A*>(statistics), workspace.data);
    });
  });
}

int gate_again(const PackedDims& dims, Scalar scalar, const GateParameters* gates, const void* pooled, const void* norm,
               void* gate, void* z, void* stream) {
  return with_maps(scalar, [&](auto type) {
    using A = decltype(type);
    return with_forms<A>(dims, {pooled, gate, z}, [&](auto form, auto) {
      constexpr Form kForm = form.value;
      const Maps maps = cut(dims, kForwardCapacity<A, kForm>, gate_blocks_together());
      return launch(known_gate_kernel<A, kForm>, maps.blocks(), {kGateThreads, kSharedBytes<A, kForm>}, stream, maps,
                    gates_of(gates, dims.n), static_cast<const A*>(pooled), static_cast<const A*>(norm),
                    static_cast<A*>(gate), static_cast<A*>(z), nullptr, nullptr);
    });
  });
}

}  // namespace aia::cuda
