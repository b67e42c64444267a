// The transpose of the gate passes (gate.cu; aia_kernels/schemas.py has the equations), all maps of a context in one
// launch.
//
//   gate_backward_reduce  reads 2 maps            the gradients of the norm's shift and scale
//   gate_backward         reads 6, writes 2 maps  those, unless they are given, and the gradients of the pooled
//                                                 features and of the weight
//
// Before a sum over all blocks is used they wait for one another, as those of gate do.
#include "packed_maps.cuh"

namespace aia::cuda {
namespace {

// The places of each buffer, and a vector of them that is none.
template <class A, Form kForm>
constexpr int kStride = kBackwardCapacity<A, kForm>.places + 4;
// Strips of whole rows leave the gradient of the first feature in a buffer of dz, and of the second one in another.
template <class A, Form kForm>
constexpr int kSharedBytes = kBuffers * (kWholeRows<kForm> ? 2 : 1) * kStride<A, kForm> * static_cast<int>(sizeof(A));

// The gradient of the sigmoid's argument, and xhat.
template <class A>
struct PreActivation {
  A grad, xhat;

  __device__ __forceinline__ PreActivation(const Norm<A>& bn, const Sigmoid<A>& sigmoid, A grad_gate, A z)
      : xhat(bn.normalized(z)) {
    const A gate = sigmoid.of_normalized(xhat);
    grad = grad_gate * std::fma(-gate, gate, gate);
  }
};

// The sums of both over the batch and the map of this block, by all blocks of the map: every thread has them.
template <class A, int V>
__device__ __forceinline__ void sum_over_batch(const Maps& maps, const Map& map, const Norm<A>& bn,
                                               const A* __restrict__ grad_gate, const A* __restrict__ z,
                                               double* workspace, double (&sums)[2]) {
  AIA_SHARED(double, shared, 2 * kGateWarps);
  const Sigmoid<A> sigmoid(bn);
  A mine[2] = {};
  for_each_run<V>(maps, map, [&](int64_t k, int kept) {
    Vector<A, V> grads[kRun], values[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (j >= kept) continue;
      grads[j] = load_vector<V>(grad_gate + k + j * kRunStep<V>);
      values[j] = load_vector<V>(z + k + j * kRunStep<V>);
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (j >= kept) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const PreActivation<A> u(bn, sigmoid, grads[j].at[i], values[j].at[i]);
        mine[0] += u.grad, mine[1] += u.grad * u.xhat;
      }
    }
  });
  sums[0] = mine[0], sums[1] = mine[1];
  sum_over_block(sums, shared);
  if (threadIdx.x == 0) workspace[2 * blockIdx.x] = sums[0], workspace[2 * blockIdx.x + 1] = sums[1];
  grid_barrier();
  sums[0] = sums[1] = 0;
  for (int b = threadIdx.x; b < map.blocks; b += kGateThreads) {
    const double* const of_block = workspace + 2 * (map.first_block + b);
    sums[0] += of_block[0], sums[1] += of_block[1];
  }
  sum_over_block(sums, shared);
}

template <class A, int V>
__global__ void __launch_bounds__(kGateThreads, 1)
    backward_reduce_kernel(Maps maps,
                           const A* __restrict__ grad_gate,  // [B, M]
                           const A* __restrict__ z,          // [B, M]
                           const A* __restrict__ norm,       // [n, 4]: mean, rstd, scale, shift
                           A* __restrict__ sums,             // [n, 2]: of du, of du * xhat
                           double* workspace) {              // [blocks, kNormPartials]
  const int m = maps.of_block(blockIdx.x);
  double found[2];
  sum_over_batch<A, V>(maps, maps.at[m], load_norm(norm, m), grad_gate, z, workspace, found);
  if (static_cast<int>(blockIdx.x) != maps.at[m].first_block || threadIdx.x != 0) return;
  sums[2 * m] = static_cast<A>(found[0]), sums[2 * m + 1] = static_cast<A>(found[1]);
}

// The taps of one feature.
template <class A>
struct Taps {
  A at[27];
};

// Where blocks join the taps of their threads: half of them have a row, then so many threads a part of each sum.
constexpr int kTapRows = kGateThreads / 2, kTapParts = kGateThreads / 54;
template <class A>
struct JoinedTaps {
  Taps<A> rows[kTapRows];
  A parts[kTapParts * 54];
};

// Writes the gradient of map m's weight: the sum of the taps of its blocks. Each thread has those of one feature, the
// even ones of the first; each block leaves its sums in partial [blocks, 54], and the first of the map adds them up.
template <class A>
__device__ __forceinline__ void join_taps(const Map& map, const GateParameters& grad, Taps<A>& taps,
                                          JoinedTaps<A>& shared, A* partial) {
  constexpr int kLanes = kWarp / 2;
  const int lane = threadIdx.x % kWarp, part = threadIdx.x / 54, column = threadIdx.x % 54;
#pragma unroll
  for (int k = 0; k < 27; ++k) taps.at[k] += shuffle_xor(taps.at[k], kLanes);
  if (lane < kLanes) shared.rows[threadIdx.x / kWarp * kLanes + lane] = taps;
  __syncthreads();
  if (part < kTapParts) {
    constexpr int kRows = kTapRows / 2 / kTapParts;  // of each feature
    A sum = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum += shared.rows[2 * (part * kRows + r) + column / 27].at[column % 27];
    shared.parts[threadIdx.x] = sum;
  }
  __syncthreads();
  if (part == 0) {
    A sum = 0;
#pragma unroll
    for (int p = 0; p < kTapParts; ++p) sum += shared.parts[p * 54 + column];
    partial[blockIdx.x * 54 + column] = sum;
  }
  grid_barrier();
  if (static_cast<int>(blockIdx.x) != map.first_block) return;
  double* const totals = reinterpret_cast<double*>(shared.rows);
  if (part < kTapParts) {
    double sum = 0;
#pragma unroll 4
    for (int b = part; b < map.blocks; b += kTapParts) sum += partial[(map.first_block + b) * 54 + column];
    totals[threadIdx.x] = sum;
  }
  __syncthreads();
  if (part == 0) {
    double sum = totals[column];
#pragma unroll
    for (int p = 1; p < kTapParts; ++p) sum += totals[p * 54 + column];
    write(grad.weight, tap_offset(grad, column / 27, column % 27), sum);
  }
}

// Where the gradients of the parameters go.
struct Gradients {
  Gates weights;
  Parameter affine;  // [n, 2]: of shift, of scale
};

// Of one feature in a plane, whose taps begin at kTap: adds what a strip sees of dz to its gradient, or begins it if
// kFirst, and to that of the weight.
template <int kTap, bool kFirst, class A, Form kForm>
__device__ __forceinline__ void add(const FrameWindow<A, A, kForm>& window, const A (&w)[27],
                                    const Strip<A, kForm>& feature, Strip<A, kForm>& grad, Taps<A>& taps) {
  for_taps<FrameWindow<A, A, kForm>, kStrip<A, kForm>, kAcross<kForm>>(
      [&](int i, int j, int r, int c, int tap, bool first) {
        const A dz = window.at(i, j);
        const int k = kTap + 8 - tap;
        grad[r].at[c] = kFirst && first ? w[k] * dz : grad[r].at[c] + w[k] * dz;
        taps.at[k] += feature[r].at[c] * dz;
      });
}

// What dz is made of: as Norm::grad_z says, with factors that are found once. A product with a mean of zero is left
// out.
template <class A>
struct GradientOfZ {
  Norm<A> bn;
  Sigmoid<A> sigmoid;
  A mean_grad, mean_grad_xhat, scale;
  bool has_xhat;

  __device__ __forceinline__ GradientOfZ(const Norm<A>& bn, A mean_grad, A mean_grad_xhat)
      : bn(bn),
        sigmoid(bn),
        mean_grad(mean_grad),
        mean_grad_xhat(mean_grad_xhat),
        scale(bn.weight * bn.rstd),
        has_xhat(mean_grad_xhat != A(0)) {}
  __device__ __forceinline__ A operator()(A grad_gate, A z) const {
    const PreActivation<A> u(bn, sigmoid, grad_gate, z);
    A corrected = u.grad - mean_grad;
    if (has_xhat) corrected -= u.xhat * mean_grad_xhat;
    return corrected * scale;
  }
};

// The arrays of a clip that a thread meets: of dz, and of its feature from its strip on. And the gradients of the
// features: of its own from its strip on, or where strips are whole rows of both, in this map.
template <class A, Form kForm>
struct ClipOfMap {
  const A *grad_gate, *z, *feature;
  A *to, *to_second;

  __device__ __forceinline__ ClipOfMap(const Maps& maps, const Map& map, int64_t clip, int of_feature, int offset,
                                       const A* grad_gate, const A* z, const A* pooled, A* grad_pooled)
      : grad_gate(grad_gate + (clip * maps.packed + map.start)),
        z(z + (clip * maps.packed + map.start)),
        feature(pooled + ((2 * clip + of_feature) * maps.packed + offset)),
        to(grad_pooled +
           (kWholeRows<kForm> ? 2 * clip * maps.packed + map.start : (2 * clip + of_feature) * maps.packed + offset)),
        to_second(to + maps.packed) {
    opaque(this->grad_gate), opaque(this->z), opaque(feature), opaque(to);
    if constexpr (kWholeRows<kForm>) opaque(to_second);
  }
};

// Calls body(k, width) for numbers of a strip that is so many whole rows: from k on as many as a vector has that may
// begin there. Planes of an odd number of rows of seven begin between vectors.
template <Form kForm, class A, class Body>
__device__ __forceinline__ void for_vectors(const A* address, int rows, const Body& body) {
  constexpr int kRow = kAcross<kForm>;
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  const auto twos = [&](int from, int to) {
#pragma unroll
    for (int k = from; k < to; k += 2) body(k, two);
  };
  if constexpr (kRow == kLongStrip) {
    if (rows > 0) twos(0, kRow);
  } else if (rows > 0) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(Vector<A, 2>) == 0) {
      twos(0, kRow - 1);
      if (rows > 1)
        twos(kRow - 1, kLongStrip);
      else
        body(kRow - 1, one);
    } else {
      body(0, one);
      twos(1, kRow);
      if (rows > 1) {
        twos(kRow, kLongStrip - 1);
        body(kLongStrip - 1, one);
      }
    }
  }
}

// A strip of one feature in a plane, as far as it belongs to the item: zeros elsewhere.
template <Form kForm, class A>
__device__ __forceinline__ void load_strip(const A* from, int pitch, int rows, Strip<A, kForm>& values) {
#pragma unroll
  for (int r = 0; r < kStrip<A, kForm>; ++r) values[r] = {};
  if constexpr (kWholeRows<kForm>) {
    opaque(from);
    for_vectors<kForm>(from, rows, [&](int k, auto width) {
      const auto vector = load_vector<width.value>(from + k);
#pragma unroll
      for (int i = 0; i < width.value; ++i)
        values[(k + i) / kAcross<kForm>].at[(k + i) % kAcross<kForm>] = vector.at[i];
    });
  } else if (rows >= kStrip<A, kForm>) {
#pragma unroll
    for (int r = 0; r < kStrip<A, kForm>; ++r, from += pitch)
      opaque(from), values[r] = load_vector<kAcross<kForm>>(from);
  } else {
#pragma unroll
    for (int r = 0; r < kStrip<A, kForm> - 1; ++r)
      if (r < rows) values[r] = load_vector<kAcross<kForm>>(from + r * pitch);
  }
}

// Writes the gradients of both features in the slots of a thread, so far behind what these hold next. The next dz goes
// into the same slots.
template <class A, Form kForm, int kStaged>
__device__ __forceinline__ void pass_on(const Slots<kStaged, kForm>& slots, int behind, const A* first,
                                        const ClipOfMap<A, kForm>& clip) {
  const A* const second = first + kBuffers * kStride<A, kForm>;
  slots.for_each([&](int k, auto width) {
    if (!slots.has_result(k, behind)) return;
    const int at = slots.at[k] - behind;
    store_vector(clip.to + at, load_vector<width.value>(first + slots.place[k]));
    store_vector(clip.to_second + at, load_vector<width.value>(second + slots.place[k]));
  });
}

// The numbers of slot k in vectors that hold those of all slots.
template <int V, class A, int kVector, int kCount>
__device__ __forceinline__ Vector<A, V>& of_slot(Vector<A, kVector> (&vectors)[kCount], int k) {
  return *reinterpret_cast<Vector<A, V>*>(&vectors[k * V / kVector].at[k * V % kVector]);
}

// An item, in which dz goes from memory by way of a buffer to the strips, whose taps are summed up.
template <class A, Form kForm, int kStaged>
__device__ __forceinline__ void transpose_item(const Map& map, const Own<kForm>& own,
                                               const FrameRows<A, A, kForm>& rows, Slots<kStaged, kForm>& slots,
                                               const ClipOfMap<A, kForm>& clip, const GradientOfZ<A>& gradient,
                                               const A (&w)[27], int of_feature, A* buffers, Taps<A>& taps) {
  constexpr int kVectors = Slots<kStaged, kForm>::kMostVectors, kPlaces = kStride<A, kForm>;
  const int first_visit = map.first_visit();
  int length = map.length, last_visit = map.last_visit(), pitch = map.d2;
  opaque(length), opaque(last_visit), opaque(pitch);
  constexpr int kVector = kWide<kForm>;
  Vector<A, kVector> grad_next[kVectors], z_next[kVectors];
  const auto fetch = [&] {
    slots.for_each([&](int k, auto width) {
      if (slots.present(k)) {
        of_slot<width.value>(grad_next, k) = load_vector<width.value>(clip.grad_gate + slots.at[k]);
        of_slot<width.value>(z_next, k) = load_vector<width.value>(clip.z + slots.at[k]);
      }
    });
  };
  const auto stage = [&](A* buffer) {
    slots.for_each([&](int k, auto width) {
      Vector<A, width.value> dz{};
      if (slots.present(k))
#pragma unroll
        for (int i = 0; i < width.value; ++i)
          dz.at[i] = gradient(of_slot<width.value>(grad_next, k).at[i], of_slot<width.value>(z_next, k).at[i]);
      store_vector(buffer + slots.place[k], dz);
      slots.at[k] += slots.plane;
    });
  };
  // In the turn of buffers: before, at, after.
  Strip<A, kForm> grad[kBuffers] = {}, feature[kBuffers];
  const auto load = [&](int q, Strip<A, kForm>& to) {
    load_strip<kForm>(clip.feature + q * slots.plane, pitch, in_item(own.planes, q) ? own.rows : 0, to);
  };
  fetch();
  load(first_visit, feature[1]);
  load(first_visit + 1, feature[2]);
  // Results of whole rows are left in the turn behind the one in which they are complete, where their plane was.
  march(first_visit, length + kWholeRows<kForm>, [&](auto turn, int q) {
    constexpr int kTurn = decltype(turn)::value, kNext = (kTurn + 1) % kBuffers, kLast = (kTurn + 2) % kBuffers;
    const bool visit = q <= last_visit;
    if (visit || kWholeRows<kForm>) {
      A* const buffer = buffers + kTurn * kPlaces;
      if (visit) stage(buffer);
      if constexpr (kWholeRows<kForm>)
        if (q > 1 && q - 2 < own.planes)
          leave_strip<kForm>(buffers + (kNext + of_feature * kBuffers) * kPlaces + own.place, own.rows, grad[kLast]);
      // One barrier a plane keeps writers and readers of a buffer apart, for there are three.
      __syncthreads();
      if constexpr (kWholeRows<kForm>)
        if (q > 1) pass_on(slots, (min(q, last_visit) + 3 - q) * slots.plane, buffers + kNext * kPlaces, clip);
      if (q < last_visit) fetch();
      if (visit && own.planes) {
        const FrameWindow<A, A, kForm> window(buffer, rows);
        if (in_item(length, q - 1)) add<0, false>(window, w, feature[kTurn], grad[kTurn], taps);
        load(q + 2, feature[kTurn]);
        if (in_item(length, q)) add<9, false>(window, w, feature[kNext], grad[kNext], taps);
        if (in_item(length, q + 1)) add<18, true>(window, w, feature[kLast], grad[kLast], taps);
      }
    }
    if constexpr (!kWholeRows<kForm>)
      if (q > 0 && q <= own.planes) store_strip<kForm>(clip.to + (q - 1) * slots.plane, pitch, own.rows, grad[kTurn]);
  });
  // The next item begins with the first buffer again.
  __syncthreads();
}

// kSums: the sums are found first; else they are given.
template <class A, Form kForm, int V, bool kSums>
__global__ void __launch_bounds__(kGateThreads, 1)
    backward_kernel(Maps maps, Gates gates, Gradients grads,
                    const A* __restrict__ grad_gate,   // [B, M]
                    const A* __restrict__ z,           // [B, M]
                    const A* __restrict__ norm,        // [n, 4]: mean, rstd, scale, shift
                    const A* __restrict__ sums,        // [n, 2]: of du, of du * xhat; null with kSums
                    const A* __restrict__ statistics,  // [n, 3]: mean, variance, share of an element
                    const A* __restrict__ pooled,      // [B, 2, M]: maximum, mean
                    A* __restrict__ grad_pooled,       // [B, 2, M]
                    double* workspace) {               // [blocks, kWeightPartials]
  constexpr int kPlaces = kStride<A, kForm>;
  AIA_DYNAMIC_SHARED(A, buffers);
  AIA_SHARED(JoinedTaps<A>, joined, 1);
  AIA_SHARED(A, weight, kSharedWeight);
  const int m = maps.of_block(blockIdx.x), feature = threadIdx.x % 2;
  const Map& map = maps.at[m];
  const Norm<A> bn = load_norm(norm, m);
  share_weight(gates.at[m], weight);
  clear<kBuffers, kPlaces>(map, buffers);
  A sum_grad, sum_grad_xhat;
  if constexpr (kSums) {
    double found[2];
    sum_over_batch<A, V>(maps, map, bn, grad_gate, z, workspace, found);
    sum_grad = static_cast<A>(found[0]), sum_grad_xhat = static_cast<A>(found[1]);
  } else {
    sum_grad = sums[2 * m], sum_grad_xhat = sums[2 * m + 1];
    __syncthreads();
  }
  if (static_cast<int>(blockIdx.x) == map.first_block && threadIdx.x == 0) {
    write(grads.affine, 2 * m, sum_grad);
    write(grads.affine, 2 * m + 1, sum_grad_xhat);
  }
  const A share = statistics[3 * m + 2];
  const GradientOfZ<A> gradient(bn, mean_of(sum_grad, share), mean_of(sum_grad_xhat, share));
  A w[27];
#pragma unroll
  for (int k = 0; k < 27; ++k) w[k] = weight[27 * feature + k];

  Taps<A> taps{};
  const Item step(map, map.blocks);
  Own<kForm> own(map, threadIdx.x / 2);
  const FrameRows<A, A, kForm> rows(map, own);
  Slots<kBackwardCapacity<A, kForm>.staged, kForm> slots(map);
  for (Item item(map, blockIdx.x - map.first_block); item.clip < maps.batch; item.advance(map, step)) {
    own.begin(map, item), slots.begin(map, item);
    const ClipOfMap<A, kForm> clip(maps, map, item.clip, feature, own.offset, grad_gate, z, pooled, grad_pooled);
    transpose_item(map, own, rows, slots, clip, gradient, w, feature, buffers, taps);
  }

  // Behind the sums, which a block that is late may still be reading.
  join_taps(map, grads.weights.at[m], taps, joined[0], reinterpret_cast<A*>(workspace + maps.blocks() * kNormPartials));
}

}  // namespace

int gate_backward_reduce(const PackedDims& dims, Scalar scalar, const void* grad_gate, const void* z, const void* norm,
                         void* sums, Workspace workspace, void* stream) {
  return with_maps(scalar, [&](auto type) {
    using A = decltype(type);
    return with_straight_width<A>(dims, {grad_gate, z}, [&](auto width) {
      const Maps maps = cut(dims, kBackwardCapacity<A, kOnes>, workspace.blocks);
      return launch_together(backward_reduce_kernel<A, width.value>, maps.blocks(), kGateThreads, stream, maps,
                             static_cast<const A*>(grad_gate), static_cast<const A*>(z), static_cast<const A*>(norm),
                             static_cast<A*>(sums), workspace.data);
    });
  });
}

int gate_backward(const PackedDims& dims, Scalar scalar, const GateParameters* gates, const GateParameters* grads,
                  Parameter grad_affine, const GateKept& kept, const void* grad_gate, const void* sums,
                  void* grad_pooled, Workspace workspace, void* stream) {
  return with_maps(scalar, [&](auto type) {
    using A = decltype(type);
    const auto run = [&](auto kernel, Capacity capacity, int shared_bytes) {
      const Maps maps = cut(dims, capacity, workspace.blocks);
      return launch_together(kernel, maps.blocks(), {kGateThreads, shared_bytes}, stream, maps, gates_of(gates, dims.n),
                             Gradients{gates_of(grads, dims.n), grad_affine}, static_cast<const A*>(grad_gate),
                             static_cast<const A*>(kept.z), static_cast<const A*>(kept.norm),
                             static_cast<const A*>(sums), static_cast<const A*>(kept.statistics),
                             static_cast<const A*>(kept.pooled), static_cast<A*>(grad_pooled), workspace.data);
    };
    // Where the sums are those of several devices, a network waits for these: one kernel serves all maps.
    if (sums) return run(backward_kernel<A, kOnes, 1, false>, kBackwardCapacity<A, kOnes>, kSharedBytes<A, kOnes>);
    return with_forms<A>(dims, {grad_gate, kept.z, kept.pooled, grad_pooled}, [&](auto form, auto straight) {
      constexpr Form kForm = form.value;
      return run(backward_kernel<A, kForm, straight.value, true>, kBackwardCapacity<A, kForm>, kSharedBytes<A, kForm>);
    });
  });
}

}  // namespace aia::cuda
