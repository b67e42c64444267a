// The transpose of the gate passes (gate.cu; aia_kernels/schemas.py has the equations), all maps of a context in one
// launch.
//
//   gate_backward_reduce  reads 2 maps            the gradients of the norm's shift and scale
//   gate_backward         reads 6, writes 2 maps  those, unless they are given, and the gradients of the pooled
//                                                 features and of the weight
//
// Before a sum over all blocks is used they wait for one another, as those of gate do.
#include "packed_maps.cuh"
#include "partials.cuh"

namespace aia::cuda {
namespace {

// The places of each buffer, and the one that is none.
template <class A>
constexpr int kStride = kBackwardCapacity<A>.places + 1;

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

  __device__ __forceinline__ PreActivation(const Norm<A>& bn, const Sigmoid<A>& sigmoid, A grad_gate, A z)
      : xhat(bn.normalized(z)) {
    const A gate = sigmoid.of_normalized(xhat);
    grad = grad_gate * gate * (1 - gate);
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
using Taps = Sums<A, 27>;

// Writes the gradient of map m's weight: the sum of the taps of its blocks. Each block has those of its two features in
// shared[0] and shared[1], and leaves them in partial [blocks, 54]; the first block of the map adds them up.
template <class A>
__device__ __forceinline__ void join_taps(const Map& map, const GateParameters& grad, Taps<A>* shared, A* partial) {
  if (threadIdx.x < 54) partial[blockIdx.x * 54 + threadIdx.x] = shared[threadIdx.x / 27].at[threadIdx.x % 27];
  grid_barrier();
  if (static_cast<int>(blockIdx.x) != map.first_block) return;
  constexpr int kRows = kGateThreads / 54;
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
    write(grad.weight, tap_offset(grad, column / 27, column % 27), sum);
  }
}

// Where the gradients of the parameters go.
struct Gradients {
  Gates weights;
  Parameter affine;  // [n, 2]: of shift, of scale
};

// What a strip sees of a plane of dz.
template <class A>
struct Window : FrameWindow<A, A> {
  using FrameWindow<A, A>::FrameWindow;
  // Of one feature in a plane, whose taps begin at kTap: adds to its gradient, or begins it if kFirst, and to that of
  // the weight.
  template <int kTap, bool kFirst>
  __device__ __forceinline__ void add(const A (&w)[27], const A (&feature)[kStrip<A>], A (&grad)[kStrip<A>],
                                      Taps<A>& taps) const {
#pragma unroll
    for (int i = 0; i < kStrip<A> + 2; ++i)
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        const A dz = this->at(i, j);
#pragma unroll
        for (int r = i < 2 ? 0 : i - 2; r <= i && r < kStrip<A>; ++r) {
          const int k = kTap + (2 - i + r) * 3 + 2 - j;
          grad[r] = kFirst && i == r && j == 0 ? w[k] * dz : grad[r] + w[k] * dz;
          taps.at[k] += feature[r] * dz;
        }
      }
  }
};

// What dz is made of.
template <class A>
struct GradientOfZ {
  Norm<A> bn;
  Sigmoid<A> sigmoid;
  A mean_grad, mean_grad_xhat;

  __device__ __forceinline__ A operator()(A grad_gate, A z) const {
    const PreActivation<A> u(bn, sigmoid, grad_gate, z);
    return bn.grad_z(u.grad, u.xhat, mean_grad, mean_grad_xhat);
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
template <class A>
__device__ __forceinline__ void load_strip(const A* from, int pitch, int rows, A (&values)[kStrip<A>]) {
#pragma unroll
  for (int r = 0; r < kStrip<A>; ++r) values[r] = 0;
  if (rows >= kStrip<A>) {
#pragma unroll
    for (int r = 0; r < kStrip<A>; ++r, from += pitch) opaque(from), values[r] = *from;
  } else {
#pragma unroll
    for (int r = 0; r < kStrip<A> - 1; ++r)
      if (r < rows) values[r] = from[r * pitch];
  }
}

// An item, in which dz goes from memory by way of a buffer to the strips, whose taps are summed up.
template <class A, int kSlots>
__device__ __forceinline__ void transpose_item(const Map& map, const Own& own, const FrameRows<A, A>& rows,
                                               Slots<kSlots>& slots, const ClipOfMap<A>& clip,
                                               const GradientOfZ<A>& gradient, const A (&w)[27], A* buffers,
                                               Taps<A>& taps) {
  const int first_visit = map.first_visit();
  int length = map.length, last_visit = map.last_visit(), pitch = map.d2;
  opaque(length), opaque(last_visit), opaque(pitch);
  A grad_next[kSlots], z_next[kSlots];
  const auto fetch = [&] {
#pragma unroll
    for (int k = 0; k < kSlots; ++k)
      if (slots.present(k)) grad_next[k] = clip.grad_gate[slots.at[k]], z_next[k] = clip.z[slots.at[k]];
  };
  // In the turn of buffers: before, at, after.
  A grad[kBuffers][kStrip<A>] = {}, feature[kBuffers][kStrip<A>];
  const auto load = [&](int q, A(&to)[kStrip<A>]) {
    load_strip(clip.feature + q * slots.plane, pitch, in_item(own.planes, q) ? own.rows : 0, to);
  };
  fetch();
  load(first_visit, feature[1]);
  load(first_visit + 1, feature[2]);
  march(first_visit, length, [&](auto turn, int q) {
    constexpr int kTurn = decltype(turn)::value, kNext = (kTurn + 1) % kBuffers, kLast = (kTurn + 2) % kBuffers;
    if (q <= last_visit) {
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        const A dz = gradient(grad_next[k], z_next[k]);
        buffers[kTurn * kStride<A> + slots.place[k]] = slots.present(k) ? dz : A(0);
        slots.at[k] += slots.plane;
      }
      // One barrier a plane keeps writers and readers of a buffer apart, for there are three.
      __syncthreads();
      if (q < last_visit) fetch();
      if (own.planes) {
        const Window<A> window(buffers + kTurn * kStride<A>, rows);
        if (in_item(length, q - 1)) window.template add<0, false>(w, feature[kTurn], grad[kTurn], taps);
        load(q + 2, feature[kTurn]);
        if (in_item(length, q)) window.template add<9, false>(w, feature[kNext], grad[kNext], taps);
        if (in_item(length, q + 1)) window.template add<18, true>(w, feature[kLast], grad[kLast], taps);
      }
    }
    if (q > 0 && q <= own.planes) store_strip(clip.to + (q - 1) * slots.plane, pitch, own.rows, grad[kTurn]);
  });
  // The next item begins with the first buffer again.
  __syncthreads();
}

// kSums: the sums are found first; else they are given.
template <class A, int V, bool kSums>
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
  AIA_SHARED(A, buffers, kBuffers * kStride<A>);
  AIA_SHARED(Taps<A>, shared, kGateThreads / 2);
  AIA_SHARED(A, weight, kSharedWeight);
  const int m = maps.of_block(blockIdx.x), feature = threadIdx.x % 2;
  const Map& map = maps.at[m];
  const Norm<A> bn = load_norm(norm, m);
  share_weight(gates.at[m], weight);
  clear<kStride<A>>(map, buffers);
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
  const GradientOfZ<A> gradient{bn, Sigmoid<A>(bn), mean_of(sum_grad, share), mean_of(sum_grad_xhat, share)};
  A w[27];
#pragma unroll
  for (int k = 0; k < 27; ++k) w[k] = weight[27 * feature + k];

  Taps<A> taps{};
  const Item step(map, map.blocks);
  Own own(map, threadIdx.x / 2);
  const FrameRows<A, A> rows(own, map.pitch);
  Slots<kBackwardCapacity<A>.staged / kGateThreads> slots(map);
  for (Item item(map, blockIdx.x - map.first_block); item.clip < maps.batch; item.advance(map, step)) {
    own.begin(map, item), slots.begin(map, item);
    const ClipOfMap<A> clip(maps, map, item.clip, feature, own.offset, grad_gate, z, pooled, grad_pooled);
    transpose_item(map, own, rows, slots, clip, gradient, w, buffers, taps);
  }

  reduce_block<kGateThreads, 2>(shared, taps);
  // Behind the sums, which a block that is late may still be reading.
  join_taps(map, grads.weights.at[m], shared, reinterpret_cast<A*>(workspace + maps.blocks() * kNormPartials));
}

}  // namespace

int gate_backward_reduce(const PackedDims& dims, Scalar scalar, const void* grad_gate, const void* z, const void* norm,
                         void* sums, Workspace workspace, void* stream) {
  return with_maps(scalar, [&](auto type) {
    using A = decltype(type);
    return with_width<A>(dims, {grad_gate, z}, [&](auto width) {
      const Maps maps = cut(dims, kBackwardCapacity<A>, workspace.blocks);
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
    const auto run = [&](auto kernel) {
      const Maps maps = cut(dims, kBackwardCapacity<A>, workspace.blocks);
      return launch_together(kernel, maps.blocks(), kGateThreads, stream, maps, gates_of(gates, dims.n),
                             Gradients{gates_of(grads, dims.n), grad_affine}, static_cast<const A*>(grad_gate),
                             static_cast<const A*>(kept.z), static_cast<const A*>(kept.norm),
                             static_cast<const A*>(sums), static_cast<const A*>(kept.statistics),
                             static_cast<const A*>(kept.pooled), static_cast<A*>(grad_pooled), workspace.data);
    };
    if (sums) return run(backward_kernel<A, 1, false>);
    return with_width<A>(dims, {grad_gate, kept.z},
                         [&](auto width) { return run(backward_kernel<A, width.value, true>); });
  });
}

}  // namespace aia::cuda
