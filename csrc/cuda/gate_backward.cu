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

constexpr int kStaged = kBackwardCapacity.staged;

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

// The sums of both over batch and map, of each map, by all blocks of a launch: every block has them all, in shared
// memory.
template <class A, int V>
__device__ __forceinline__ const Sums<double, 6>& sum_over_batch(const Clips& clips, const A* __restrict__ grad_gate,
                                                                 const A* __restrict__ z, const A* __restrict__ norm,
                                                                 int blocks, double* workspace) {
  using Partial = Sums<double, 6>;
  AIA_SHARED(Partial, shared, kGateThreads / 2);
  A mine[6] = {};
  for_each_vector<V>(clips, blocks, [&](int64_t at, int e) {
    const auto grads = load_vector<V>(grad_gate + at), values = load_vector<V>(z + at);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const int m = clips.map_of(e + k);
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
  reduce_block<kGateThreads, 1>(shared, total);
  Partial* const partial = reinterpret_cast<Partial*>(workspace);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
  grid_barrier();
  total = {};
  for (int b = threadIdx.x; b < blocks; b += kGateThreads) total.merge(partial[b]);
  reduce_block<kGateThreads, 1>(shared, total);
  return shared[0];
}

template <class A, int V>
__global__ void __launch_bounds__(kGateThreads, 1)
    backward_reduce_kernel(Clips clips, int maps,
                           const A* __restrict__ grad_gate,  // [B, M]
                           const A* __restrict__ z,          // [B, M]
                           const A* __restrict__ norm,       // [n, 4]: mean, rstd, scale, shift
                           A* __restrict__ sums,             // [n, 2]: of du, of du * xhat
                           int blocks,
                           double* workspace) {  // [blocks, kNormPartials]
  const Sums<double, 6>& found = sum_over_batch<A, V>(clips, grad_gate, z, norm, blocks, workspace);
  if (blockIdx.x == 0 && threadIdx.x < 2 * maps) sums[threadIdx.x] = static_cast<A>(found.at[threadIdx.x]);
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

// kSums: the sums are found first; else they are given.
template <class A, int V, bool kSums>
__global__ void __launch_bounds__(kGateThreads, 1)
    backward_kernel(Maps maps, Clips clips, Gates gates, Gradients grads,
                    const A* __restrict__ grad_gate,   // [B, M]
                    const A* __restrict__ z,           // [B, M]
                    const A* __restrict__ norm,        // [n, 4]: mean, rstd, scale, shift
                    const A* __restrict__ sums,        // [n, 2]: of du, of du * xhat; null with kSums
                    const A* __restrict__ statistics,  // [n, 3]: mean, variance, share of an element
                    const A* __restrict__ pooled,      // [B, 2, M]: maximum, mean
                    A* __restrict__ grad_pooled,       // [B, 2, M]
                    double* workspace) {               // [blocks, kWeightPartials]
  using Raw = Vector<A, 2>;                            // of the gradient of the gate, and z
  AIA_SHARED(A, staged, 2 * kStaged);
  AIA_SHARED(Taps<A>, shared, kGateThreads / 2);
  const int m = maps.of_block(blockIdx.x), feature = threadIdx.x % 2, blocks = maps.blocks();
  const Map& map = maps.at[m];
  const int64_t packed = maps.packed;
  const Norm<A> bn = load_norm(norm, m);
  A sum_grad, sum_grad_xhat;
  if constexpr (kSums) {
    const auto& found = sum_over_batch<A, V>(clips, grad_gate, z, norm, blocks, workspace);
    sum_grad = static_cast<A>(found.at[2 * m]), sum_grad_xhat = static_cast<A>(found.at[2 * m + 1]);
  } else {
    sum_grad = sums[2 * m], sum_grad_xhat = sums[2 * m + 1];
  }
  if (static_cast<int>(blockIdx.x) == map.first_block && threadIdx.x == 0) {
    write(grads.affine, 2 * m, sum_grad);
    write(grads.affine, 2 * m + 1, sum_grad_xhat);
  }
  const A share = statistics[3 * m + 2];
  const A mean_grad = mean_of(sum_grad, share), mean_grad_xhat = mean_of(sum_grad_xhat, share);

  A w[27];
  Taps<A> taps{};
#pragma unroll
  for (int k = 0; k < 27; ++k) w[k] = read<A>(gates.at[m].weight, tap_offset(gates.at[m], feature, k));

  const auto fetch = [&](int64_t clip, int k) { return Raw{{grad_gate[clip * packed + k], z[clip * packed + k]}}; };
  const auto stage = [&](const Raw& raw) {
    const PreActivation<A> u(bn, raw.at[0], raw.at[1]);
    return bn.grad_z(u.grad, u.xhat, mean_grad, mean_grad_xhat);
  };
  A *buffer = staged, *other = staged + kStaged;
  for (int64_t item = blockIdx.x - map.first_block; item < map.items; item += map.blocks) {
    const Own own = own_position(map, item, threadIdx.x / 2);
    const int64_t at = (2 * own.clip + feature) * packed + own.offset;
    // Of the planes before, at and after the visited one, as far as they belong to the chunk: the feature, and the
    // gradient gathered for it.
    const auto feature_of = [&](int q) {
      return own.inside && q < map.length && own.plane + q < map.d0 ? pooled[at + q * map.plane_size()] : A(0);
    };
    A p_before = 0, p_here = 0, p_after = feature_of(0);
    A before = 0, here = 0, after = 0;
    march<kStaged, Raw>(map, item, buffer, other, fetch, stage, [&](int q, const A* plane, int width) {
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

  reduce_block<kGateThreads, 2>(shared, taps);
  // Behind the sums, which a block that is late may still be reading.
  join_taps(map, grads.weights.at[m], shared, reinterpret_cast<A*>(workspace + blocks * kNormPartials));
}

}  // namespace

int gate_backward_reduce(const PackedDims& dims, Scalar scalar, const void* grad_gate, const void* z, const void* norm,
                         void* sums, Workspace workspace, void* stream) {
  return with_maps(scalar, [&](auto type) {
    using A = decltype(type);
    return with_width<A>(dims, {grad_gate, z}, [&](auto width) {
      const auto kernel = backward_reduce_kernel<A, width.value>;
      const int64_t items = dims.B * ceil_div(dims.packed(), kGateThreads * width.value);
      const int blocks = static_cast<int>(std::min<int64_t>(items, workspace.blocks));
      return launch_together(kernel, blocks, kGateThreads, stream, clips_of(dims), dims.n,
                             static_cast<const A*>(grad_gate), static_cast<const A*>(z), static_cast<const A*>(norm),
                             static_cast<A*>(sums), blocks, workspace.data);
    });
  });
}

int gate_backward(const PackedDims& dims, Scalar scalar, const GateParameters* gates, const GateParameters* grads,
                  Parameter grad_affine, const GateKept& kept, const void* grad_gate, const void* sums,
                  void* grad_pooled, Workspace workspace, void* stream) {
  return with_maps(scalar, [&](auto type) {
    using A = decltype(type);
    const auto run = [&](auto kernel) {
      const Maps maps = cut(dims, kBackwardCapacity, workspace.blocks);
      return launch_together(kernel, maps.blocks(), kGateThreads, stream, maps, clips_of(dims), gates_of(gates, dims.n),
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
