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
template <class A, int kWide>
constexpr int kStride = kBackwardCapacity<A, kWide>.places + 4;

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
template <int kTap, bool kFirst, class A, int kWide>
__device__ __forceinline__ void add(const FrameWindow<A, A, kWide>& window, const A (&w)[27],
                                    const Strip<A, kWide>& feature, Strip<A, kWide>& grad, Taps<A>& taps) {
  constexpr int kColumns = kAcross<kWide>;
#pragma unroll
  for (int i = 0; i < kStrip<A> + 2; ++i)
#pragma unroll
    for (int j = 0; j < kColumns + 2; ++j) {
      const A dz = window.at(i, j);
#pragma unroll
      for (int r = i < 2 ? 0 : i - 2; r <= i && r < kStrip<A>; ++r)
#pragma unroll
        for (int c = j < 2 ? 0 : j - 2; c <= j && c < kColumns; ++c) {
          const int k = kTap + (2 - i + r) * 3 + 2 - j + c;
          grad[r].at[c] = kFirst && i == r && j == c ? w[k] * dz : grad[r].at[c] + w[k] * dz;
          taps.at[k] += feature[r].at[c] * dz;
        }
    }
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

// The arrays of a clip that a thread meets: of dz, and of its feature and the gradient of it from its strip on.
template <class A>
struct ClipOfMap {
  const A *grad_gate, *z, *feature;
  A* to;

  __device__ __forceinline__ ClipOfMap(const Maps& maps, const Map& map, int64_t clip, int of_feature, int offset,
                                       const A* grad_gate, const A* z, const A* pooled, A* grad_pooled)
      : grad_gate(grad_gate + (clip * maps.packed + map.start)),
        z(z + (clip * maps.packed + map.start)),
        feature(pooled + ((2 * clip + of_feature) * maps.packed + offset)),
        to(grad_pooled + ((2 * clip + of_feature) * maps.packed + offset)) {
    opaque(this->grad_gate), opaque(this->z), opaque(feature), opaque(to);
  }
};

// A strip of one feature in a plane, as far as it belongs to the item: zeros elsewhere.
template <int kWide, class A>
__device__ __forceinline__ void load_strip(const A* from, int pitch, int rows, Strip<A, kWide>& values) {
#pragma unroll
  for (int r = 0; r < kStrip<A>; ++r) values[r] = {};
  if (rows >= kStrip<A>) {
#pragma unroll
    for (int r = 0; r < kStrip<A>; ++r, from += pitch) opaque(from), values[r] = load_vector<kAcross<kWide>>(from);
  } else {
#pragma unroll
    for (int r = 0; r < kStrip<A> - 1; ++r)
      if (r < rows) values[r] = load_vector<kAcross<kWide>>(from + r * pitch);
  }
}

// An item, in which dz goes from memory by way of a buffer to the strips, whose taps are summed up.
template <class A, int kWide, int kStaged>
__device__ __forceinline__ void transpose_item(const Map& map, const Own& own, const FrameRows<A, A>& rows,
                                               Slots<kStaged, kWide>& slots, const ClipOfMap<A>& clip,
                                               const GradientOfZ<A>& gradient, const A (&w)[27], A* buffers,
                                               Taps<A>& taps) {
  constexpr int kSlots = Slots<kStaged, kWide>::kSlots;
  const int first_visit = map.first_visit();
  int length = map.length, last_visit = map.last_visit(), pitch = map.d2;
  opaque(length), opaque(last_visit), opaque(pitch);
  Vector<A, kWide> grad_next[kSlots], z_next[kSlots];
  const auto fetch = [&] {
#pragma unroll
    for (int k = 0; k < kSlots; ++k)
      if (slots.present(k)) {
        grad_next[k] = load_vector<kWide>(clip.grad_gate + slots.at[k]);
        z_next[k] = load_vector<kWide>(clip.z + slots.at[k]);
      }
  };
  // In the turn of buffers: before, at, after.
  Strip<A, kWide> grad[kBuffers] = {}, feature[kBuffers];
  const auto load = [&](int q, Strip<A, kWide>& to) {
    load_strip<kWide>(clip.feature + q * slots.plane, pitch, in_item(own.planes, q) ? own.rows : 0, to);
  };
  fetch();
  load(first_visit, feature[1]);
  load(first_visit + 1, feature[2]);
  march(first_visit, length, [&](auto turn, int q) {
    constexpr int kTurn = decltype(turn)::value, kNext = (kTurn + 1) % kBuffers, kLast = (kTurn + 2) % kBuffers;
    if (q <= last_visit) {
      A* const buffer = buffers + kTurn * kStride<A, kWide>;
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        Vector<A, kWide> dz{};
        if (slots.present(k))
#pragma unroll
          for (int i = 0; i < kWide; ++i) dz.at[i] = gradient(grad_next[k].at[i], z_next[k].at[i]);
        store_vector(buffer + slots.place[k], dz);
        slots.at[k] += slots.plane;
      }
      // One barrier a plane keeps writers and readers of a buffer apart, for there are three.
      __syncthreads();
      if (q < last_visit) fetch();
      if (own.planes) {
        const FrameWindow<A, A, kWide> window(buffer, rows);
        if (in_item(length, q - 1)) add<0, false>(window, w, feature[kTurn], grad[kTurn], taps);
        load(q + 2, feature[kTurn]);
        if (in_item(length, q)) add<9, false>(window, w, feature[kNext], grad[kNext], taps);
        if (in_item(length, q + 1)) add<18, true>(window, w, feature[kLast], grad[kLast], taps);
      }
    }
    if (q > 0 && q <= own.planes) store_strip<kWide>(clip.to + (q - 1) * slots.plane, pitch, own.rows, grad[kTurn]);
  });
  // The next item begins with the first buffer again.
  __syncthreads();
}

// kSums: the sums are found first; else they are given.
template <class A, int kWide, int V, bool kSums>
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
  constexpr int kPlaces = kStride<A, kWide>;
  AIA_SHARED(A, buffers, kBuffers * kPlaces);
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
  Own own(map, threadIdx.x / 2);
  const FrameRows<A, A> rows(own, map.pitch);
  Slots<kBackwardCapacity<A, kWide>.staged, kWide> slots(map);
  for (Item item(map, blockIdx.x - map.first_block); item.clip < maps.batch; item.advance(map, step)) {
    own.begin(map, item), slots.begin(map, item);
    const ClipOfMap<A> clip(maps, map, item.clip, feature, own.offset, grad_gate, z, pooled, grad_pooled);
    transpose_item(map, own, rows, slots, clip, gradient, w, buffers, taps);
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
      const Maps maps = cut(dims, kBackwardCapacity<A, 1>, workspace.blocks);
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
    const auto run = [&](auto kernel, Capacity capacity) {
      const Maps maps = cut(dims, capacity, workspace.blocks);
      return launch_together(kernel, maps.blocks(), kGateThreads, stream, maps, gates_of(gates, dims.n),
                             Gradients{gates_of(grads, dims.n), grad_affine}, static_cast<const A*>(grad_gate),
                             static_cast<const A*>(kept.z), static_cast<const A*>(kept.norm),
                             static_cast<const A*>(sums), static_cast<const A*>(kept.statistics),
                             static_cast<const A*>(kept.pooled), static_cast<A*>(grad_pooled), workspace.data);
    };
    // Where the sums are those of several devices, a network waits for these: one kernel serves all maps.
    if (sums) return run(backward_kernel<A, 1, 1, false>, kBackwardCapacity<A, 1>);
    return with_widths<A>(dims, {grad_gate, kept.z, kept.pooled, grad_pooled}, [&](auto width, auto straight) {
      constexpr int kWide = width.value;
      return run(backward_kernel<A, kWide, straight.value, true>, kBackwardCapacity<A, kWide>);
    });
  });
}

}  // namespace aia::cuda
