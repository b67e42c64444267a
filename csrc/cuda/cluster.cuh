// A unit whose clip stays on chip: a cluster of blocks has a clip, and each block the same number of its channels, for
// all T, H and W, as its slice of the clip in shared memory. x is read once and y written once.
//
// Maps that are pooled over T, H or W are made by one block alone; their convolution needs the pooled channels next to
// its own on both sides. Of a map pooled over C each block has the part of its channels. Each then joins the parts of
// all for a range of positions, makes the gate there, and hands it to all.
#pragma once

#include <cmath>

#include "../common/norm.h"
#include "evaluate.h"
#include "volume.cuh"

namespace aia::cuda {

#if defined(AIA_EMULATOR)
constexpr int kClusterThreads = 64;
#else
constexpr int kClusterThreads = 512;
#endif
// A thread convolves so many runs of neighbouring channels at a time, all at one position of a map; its results wait in
// registers until all have read what the gates overwrite.
constexpr int kRun = 4;
template <class A>
constexpr int kRuns = (16 << 10) / static_cast<int>(sizeof(A)) / kClusterThreads;

// Where an element of a map lies: its channel, and its other two axes in the order T, H, W.
struct MapStrides {
  int start, c, a, b;

  __device__ __forceinline__ int operator()(int channel, int a_, int b_) const {
    return start + channel * c + a_ * a + b_ * b;
  }
};

// The lines of a slice along an axis, and the map that they are pooled to. Its axes beside the channels are a and b.
template <class A>
struct Lines {
  int first;                // of its positions among those of all three maps
  int a, b, count;          // lengths
  int x_a, x_b, x_stride;   // steps in the slice, to the next line and along one
  int c_a, c_b, c_stride;   // the same in the gate over C
  MapStrides pooled, gate;  // pooled has a channel more on both sides
  A per_count;

  __device__ __forceinline__ bool holds(int i, int j) const { return i >= 0 && i < a && j >= 0 && j < b; }
};

// What is constant about a launch. The gates are those of C, T, H, W; their strides are those of the features and of
// the axes c, a, b, or t, h, w for the one over C.
template <class A>
struct ClusterPlan {
  Volume<A> slice;
  Lines<A> lines[3];
  int cluster, channels, share;  // blocks and channels of a clip, channels of a block
  int positions, halo, range;    // in the map over C: all, those that a convolution reaches ahead, those of a block
  int runs, per_channel;         // a slice is so many runs in memory, of so many elements of each channel
  int x_c;                       // from a channel of the slice to the next
  bool channels_first;           // channels are innermost: neighbouring threads take neighbouring channels
  int inner, outer;
  GateParameters gates[4] = {};
  int x_bytes, bytes;

  explicit ClusterPlan(const Volume<A>& slice) : slice(slice) {}

  __host__ __device__ __forceinline__ int over_spacetime() const { return lines[2].first + lines[2].a * lines[2].b; }
  // Values of the gate of a context, padded to whole vectors.
  __host__ __device__ __forceinline__ int gate_size(int context) const {
    const int size = context == kChannel ? positions : context == kSpacetime ? share * over_spacetime() : 0;
    return (size + kGroup<A> - 1) / kGroup<A> * kGroup<A>;
  }
  // Values that are needed while it is made.
  int workspace(int context) const {
    return 2 * (context == kChannel     ? positions + range + 2 * halo
                : context == kSpacetime ? (share + 2) * over_spacetime()
                                        : 0);
  }
};

// The maximum, as torch.max has it, and the sum.
template <class A>
struct MaxSum {
  A max = static_cast<A>(-INFINITY), sum = 0;

  __device__ __forceinline__ void add(A value) { merge(value, value); }
  __device__ __forceinline__ void merge(A other_max, A other_sum) {
    if (!(other_max <= max) && max == max) max = other_max;
    sum += other_sum;
  }
};

template <class A>
using Features = Vector<A, 2>;

// The weights of all gates, the two features of a tap side by side, and what they are normalized by.
template <class A>
struct SharedGates {
  Features<A> weight[4][27];
  Norm<A> norm[4];

  __device__ __forceinline__ A gate(int which, A z) const {
    const Norm<A>& n = norm[which];
    return n.gate(n.normalized(z), [](A value) { return std::exp(value); });
  }
};

template <class A>
__device__ __forceinline__ void load_gates(const ClusterPlan<A>& plan, SharedGates<A>& shared) {
  const auto used = [&](int g) { return plan.gates[g].weight.data != nullptr; };
  for (int i = threadIdx.x; i < 4 * 54; i += kClusterThreads) {
    const int g = i / 54, f = i / 27 % 2, tap = i % 27;
    if (used(g)) shared.weight[g][tap].at[f] = read<A>(plan.gates[g].weight, tap_offset(plan.gates[g], f, tap));
  }
  if (threadIdx.x < 4 && used(threadIdx.x)) {
    A norm[4], statistics[3];
    finish_norm(plan.gates[threadIdx.x], 0., 1., 1., norm, statistics);
    shared.norm[threadIdx.x] = {norm[0], norm[1], norm[2], norm[3]};
  }
}

// Calls body(offset in the slice, offset in the clip) for each vector of the slice of a block that has so many channels
// from `first` on: kAhead at a time of a thread, each with its number.
template <int V, int kAhead, class A, class Body>
__device__ __forceinline__ void for_vectors(const ClusterPlan<A>& plan, int start, int first, int channels,
                                            Body&& body) {
  const int in_run = channels * plan.per_channel / V, count = plan.runs * in_run;
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    const int i = start + k * kClusterThreads + threadIdx.x;
    if (i >= count) return;
    const int run = i / in_run, e = i % in_run * V;
    body(k, run * plan.share * plan.per_channel + e, (run * plan.channels + first) * plan.per_channel + e);
  }
}

// The gate over C in `workspace`, on all blocks, from x * G with the gate over T, H and W where there is one.
template <class T, class A = Accumulate<T>>
__device__ __forceinline__ void make_channel_gate(const ClusterPlan<A>& plan, const SharedGates<A>& gates, const T* x,
                                                  int channels, const A* inner, A* workspace) {
  const int rank = cluster_rank(), W = plan.slice.W, H = plan.slice.H;
  Features<A>* const partial = reinterpret_cast<Features<A>*>(workspace);
  for (int q = threadIdx.x; q < plan.positions; q += kClusterThreads) {
    const int w = q % W, h = q / W % H, t = q / W / H;
    const T* const line = x + t * plan.lines[2].x_a + h * plan.lines[2].x_b + w * plan.lines[1].x_b;
    const MapStrides &over_t = plan.lines[0].gate, &over_h = plan.lines[1].gate, &over_w = plan.lines[2].gate;
    MaxSum<A> found;
#pragma unroll 4
    for (int c = 0; c < channels; ++c) {
      A value = widen(line[c * plan.x_c]);
      if (inner) value *= (inner[over_t(c, h, w)] + inner[over_h(c, t, w)] + inner[over_w(c, t, h)]) * (A(1) / 3);
      found.add(value);
    }
    partial[q] = {found.max, found.sum};
  }
  cluster_barrier();

  const int first = rank * plan.range, count = min(plan.range, plan.positions - first);
  Features<A>* const window = partial + plan.positions;  // what the convolution of the range sees
  for (int i = threadIdx.x; i < count; i += kClusterThreads) {
    MaxSum<A> found;
#pragma unroll 4
    for (int r = 0; r < plan.cluster; ++r) {
      const Features<A> part = cluster_shared(partial, r)[first + i];
      found.merge(part.at[0], part.at[1]);
    }
    window[plan.halo + i] = {found.max, found.sum * plan.slice.per_c};
  }
  cluster_barrier();

  for (int i = threadIdx.x; i < plan.range + 2 * plan.halo; i += kClusterThreads) {
    const int q = first + i - plan.halo, owner = q / plan.range;
    if (q < 0 || q >= plan.positions || owner == rank) continue;
    window[i] = cluster_shared(window, owner)[plan.halo + q % plan.range];
  }
  __syncthreads();

  for (int i = threadIdx.x; i < count; i += kClusterThreads) {
    const int q = first + i, w = q % W, h = q / W % H, t = q / W / H;
    A z = 0;
#pragma unroll
    for (int tap = 0; tap < 27; ++tap) {
      const int dt = tap / 9 - 1, dh = tap / 3 % 3 - 1, dw = tap % 3 - 1;
      const bool inside =
          t + dt >= 0 && t + dt < plan.slice.T && h + dh >= 0 && h + dh < H && w + dw >= 0 && w + dw < W;
      const Features<A> value = inside ? window[plan.halo + i + (dt * H + dh) * W + dw] : Features<A>{};
      const Features<A> weight = gates.weight[0][tap];
      z += weight.at[0] * value.at[0] + weight.at[1] * value.at[1];
    }
    const A gate = gates.gate(0, z);
    for (int r = 0; r < plan.cluster; ++r) cluster_shared(workspace, r)[q] = gate;
  }
  cluster_barrier();
}

// A position of a map of the slice.
struct MapPosition {
  int map, channel, a, b;
};

// Position i of `groups` groups of channels of all three maps; its channel is the number of the group.
template <class A>
__device__ __forceinline__ MapPosition map_position(const ClusterPlan<A>& plan, int i, int groups) {
  const int size = plan.over_spacetime();
  const int group = plan.channels_first ? i % groups : i / size, rest = plan.channels_first ? i / groups : i % size;
  const int map = (rest >= plan.lines[1].first) + (rest >= plan.lines[2].first);
  const int position = rest - plan.lines[map].first, b = plan.lines[map].b;
  return {map, group, position / b, position % b};
}

// The gates over T, H and W of the block's channels in `workspace`, from x * G with the gate over C where there is one.
template <class T, class A = Accumulate<T>>
__device__ __forceinline__ void make_spacetime_gates(const ClusterPlan<A>& plan, const SharedGates<A>& gates,
                                                     const T* x, int channels, const A* inner, A* workspace) {
  Features<A>* const pooled = reinterpret_cast<Features<A>*>(workspace);
  for (int i = threadIdx.x; i < plan.share * plan.over_spacetime(); i += kClusterThreads) {
    const MapPosition p = map_position(plan, i, plan.share);
    const Lines<A>& lines = plan.lines[p.map];
    const T* const line = x + p.channel * plan.x_c + p.a * lines.x_a + p.b * lines.x_b;
    const A* const guide = inner ? inner + p.a * lines.c_a + p.b * lines.c_b : nullptr;
    Features<A> features{};
    if (p.channel < channels) {
      MaxSum<A> found;
#pragma unroll 4
      for (int k = 0; k < lines.count; ++k) {
        A value = widen(line[k * lines.x_stride]);
        if (guide) value *= guide[k * lines.c_stride];
        found.add(value);
      }
      features = {found.max, found.sum * lines.per_count};
    }
    pooled[lines.pooled(p.channel + 1, p.a, p.b)] = features;
  }
  cluster_barrier();

  const int rank = cluster_rank();
  for (int i = threadIdx.x; i < 2 * plan.over_spacetime(); i += kClusterThreads) {
    const MapPosition p = map_position(plan, i, 2);  // the channel before the slice, or after it
    const MapStrides& map = plan.lines[p.map].pooled;
    const int theirs = map(p.channel ? 1 : plan.share, p.a, p.b), other = rank + (p.channel ? 1 : -1);
    const bool exists = other >= 0 && other < plan.cluster;
    pooled[map(p.channel ? plan.share + 1 : 0, p.a, p.b)] =
        exists ? cluster_shared(pooled, other)[theirs] : Features<A>{};
  }
  cluster_barrier();

  const int groups = (plan.share + kRun - 1) / kRun, items = groups * plan.over_spacetime();
  A z[kRuns<A>][kRun] = {};
#pragma unroll
  for (int k = 0; k < kRuns<A>; ++k) {
    const int item = k * kClusterThreads + threadIdx.x;
    if (item >= items) break;
    const MapPosition p = map_position(plan, item, groups);
    const Lines<A>& lines = plan.lines[p.map];
#pragma unroll 1
    for (int da = 0; da < 3; ++da) {
#pragma unroll
      for (int db = 0; db < 3; ++db) {
        const bool inside = lines.holds(p.a + da - 1, p.b + db - 1);
        const int here = lines.pooled(p.channel * kRun, p.a + da - 1, p.b + db - 1);
        Features<A> values[kRun + 2];
#pragma unroll
        for (int c = 0; c < kRun + 2; ++c)
          values[c] =
              inside && p.channel * kRun + c < plan.share + 2 ? pooled[here + c * lines.pooled.c] : Features<A>{};
#pragma unroll
        for (int dc = 0; dc < 3; ++dc) {
          const Features<A> weight = gates.weight[p.map + 1][dc * 9 + da * 3 + db];
#pragma unroll
          for (int c = 0; c < kRun; ++c)
            z[k][c] += weight.at[0] * values[c + dc].at[0] + weight.at[1] * values[c + dc].at[1];
        }
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kRuns<A>; ++k) {
    const int item = k * kClusterThreads + threadIdx.x;
    if (item >= items) break;
    const MapPosition p = map_position(plan, item, groups);
#pragma unroll
    for (int c = 0; c < kRun; ++c)
      if (p.channel * kRun + c < plan.share)
        workspace[plan.lines[p.map].gate(p.channel * kRun + c, p.a, p.b)] = gates.gate(p.map + 1, z[k][c]);
  }
  __syncthreads();
}

template <class T, int V, class A = Accumulate<T>>
__global__ void __launch_bounds__(kClusterThreads, 1)
    evaluate_kernel(ClusterPlan<A> plan,
                    const T* __restrict__ x,  // [B, T, C, H, W] in its order of storage
                    T* __restrict__ y) {      // as x
  constexpr int kAhead = V > 1 ? 8 : 4, kStep = kAhead * kClusterThreads;
  AIA_DYNAMIC_SHARED(unsigned char, shared);
  SharedGates<A>& gates = *reinterpret_cast<SharedGates<A>*>(shared);
  T* const slice = reinterpret_cast<T*>(shared + sizeof(SharedGates<A>));
  A* const workspace = reinterpret_cast<A*>(shared + sizeof(SharedGates<A>) + plan.x_bytes);

  const int first = cluster_rank() * plan.share, channels = min(plan.share, plan.channels - first);
  const int64_t clip = blockIdx.x / plan.cluster * static_cast<int64_t>(plan.channels) * plan.runs * plan.per_channel;
  x += clip, y += clip;
  const int count = channels > 0 ? channels * plan.per_channel / V * plan.runs : 0;
  for (int start = 0; start < count; start += kStep) {
    Vector<T, V> vectors[kAhead];
    for_vectors<V, kAhead>(plan, start, first, channels,
                           [&](int k, int, int at) { vectors[k] = load_vector<V>(x + at); });
    for_vectors<V, kAhead>(plan, start, first, channels,
                           [&](int k, int at, int) { store_vector(slice + at, vectors[k]); });
  }
  load_gates(plan, gates);
  __syncthreads();

  const A* inner = nullptr;
  A* gate = workspace;
#pragma unroll 1
  for (int stage = plan.inner == kNone ? 1 : 0; stage < 2; ++stage) {
    if ((stage == 0 ? plan.inner : plan.outer) == kChannel)
      make_channel_gate(plan, gates, slice, channels, inner, gate);
    else
      make_spacetime_gates(plan, gates, slice, channels, inner, gate);
    if (stage == 0) inner = gate, gate += plan.gate_size(plan.inner);
  }

  const GateField<A> field({gate, plan.outer});
  for (int start = 0; start < count; start += kStep) {
    for_vectors<V, kAhead>(plan, start, first, channels, [&](int, int at, int to) {
      Vector<T, V> vector = load_vector<V>(slice + at);
      Position p = plan.slice.position(at);
      for_groups<V>(plan.slice, p, [&](int group) {
        const auto factors = spread<kGroupOf<V, A>>(field, plan.slice, 0, p);
#pragma unroll
        for (int k = 0; k < kGroupOf<V, A>; ++k)
          vector.at[group + k] = narrow<T>(widen(vector.at[group + k]) * factors.at[k]);
      });
      store_vector(y + to, vector);
    });
  }
}

}  // namespace aia::cuda
