// evaluate: a whole unit with fixed statistics (aia_kernels/schemas.py has the equation), so that clips need not wait
// for one another.
//
//   in clusters   reads 1 |X|, writes 1 |X|, one launch            a clip stays in the shared memory of a cluster
//   in groups     reads 2 |X|, with an inner context 3, writes 1   but for the first from the L2 cache, which holds a
//                                                                  group of clips; 3 launches a group, or 5
//
// All orders of storage go either way. What decides is whether a block holds its channels of a clip with the maps that
// it makes, 227 KiB in all. For 8 frames, the blocks of the smallest cluster that does (bytes of one, KiB):
//
//                   C          ST         CinST      STinC
//   64x56x56        none: one clip is 6.1 MiB, in bfloat16 3.1 MiB with maps of twice that
//   128x28x28 fp32  none
//             bf16  16 (163)   16 (195)   16 (219)   16 (202)
//   256x14x14 fp32  8 (213)    16 (157)   16 (164)   16 (157)
//             bf16  4 (215)    8 (210)    8 (216)    8 (210)
//   512x7x7   fp32  4 (201)    8 (181)    8 (183)    8 (181)
//             bf16  2 (202)    8 (132)    8 (134)    8 (132)
//
// Predicted for an H200 (132 multiprocessors at 1.75 GHz, 60 MB of L2; 4.8 TB/s on paper, 4.3 assumed), not measured:
// CinST on 8 clips, in microseconds, beside a copy of x. In clusters of 16, 8 at once: the copy, 3 for the launch, 0.5
// for each of 5 barriers, and of a block 12 instructions per element to move it, 6 to pool it over C and 24 over T, H
// and W, and 135 cycles for 32 times kRun results of a convolution. In groups: the copy, two more reads from L2 at 5.5
// TB/s, 2.5 for each launch to fill and drain.
//
//                   copy  clusters  groups
//   64x56x56  fp32  24    -         68       in two groups, whose launches cost what the cache saves
//             bf16  12    -         34
//   128x28x28 fp32  12    -         34
//             bf16  6     27        23       should this be so, groups are to be preferred here
//   256x14x14 fp32  6     20        23
//             bf16  3     17        18
//   512x7x7   fp32  3     14        18
//             bf16  1.5   12        15
#include <algorithm>
#include <numeric>
#include <utility>

#include "cluster.cuh"

namespace aia::cuda {
namespace {

constexpr int kClusters[] = {1, 2, 4, 8, 16};

MapStrides map_strides(Order order, int channels, int start, int a, int b, bool over_t) {
  if (order == Order::kTHWC) return {start, 1, b * channels, channels};
  if (order == Order::kCTHW || over_t) return {start, a * b, b, 1};
  return {start, b, channels * b, 1};
}

// The launch in clusters of so many blocks, whatever it takes.
template <class T, class A = Accumulate<T>>
ClusterPlan<A> cluster_plan(const Shape& s, int inner, int outer, int cluster) {
  constexpr int kWide = 16 / sizeof(T);
  const int plane = s.H * s.W;
  const int per_channel = s.order == Order::kTHWC ? 1 : s.order == Order::kCTHW ? s.T * plane : plane;
  int share = ceil_div(s.C, cluster);
  if (int64_t{s.C} * per_channel % kWide == 0) {
    const int step = kWide / std::gcd(per_channel, kWide);
    share = ceil_div(share, step) * step;
  }
  Shape slice = s;
  slice.C = share;

  ClusterPlan<A> plan(Volume<A>(slice).with_vectors(true));
  plan.slice.per_c = A(1) / s.C;
  plan.cluster = cluster, plan.channels = s.C, plan.share = share;
  plan.positions = s.T * plane, plan.halo = plane + s.W + 1, plan.range = ceil_div(plan.positions, cluster);
  plan.per_channel = per_channel;
  plan.runs = s.order == Order::kTHWC ? plan.positions : s.order == Order::kCTHW ? 1 : s.T;
  plan.channels_first = s.order == Order::kTHWC;
  plan.inner = inner, plan.outer = outer;

  const int w = s.order == Order::kTHWC ? share : 1, h = s.W * w;
  const int t = s.order == Order::kTCHW ? share * plane : s.H * h;
  plan.x_c = s.order == Order::kTHWC ? 1 : per_channel;
  const int lengths[3] = {s.T, s.H, s.W}, steps[3] = {t, h, w}, over_c[3] = {plane, s.W, 1};
  const A per_length[3] = {plan.slice.per_t, plan.slice.per_h, plan.slice.per_w};
  int first = 0;
  for (int m = 0; m < 3; ++m) {
    const int a = m == 0 ? 1 : 0, b = m == 2 ? 1 : 2;  // the axes of the map beside the channels
    Lines<A>& lines = plan.lines[m];
    lines.first = first;
    lines.a = lengths[a], lines.b = lengths[b], lines.count = lengths[m];
    lines.x_a = steps[a], lines.x_b = steps[b], lines.x_stride = steps[m];
    lines.c_a = over_c[a], lines.c_b = over_c[b], lines.c_stride = over_c[m];
    lines.pooled = map_strides(s.order, share + 2, (share + 2) * first, lines.a, lines.b, m == 0);
    lines.gate = map_strides(s.order, share, share * first, lines.a, lines.b, m == 0);
    lines.per_count = per_length[m];
    first += lines.a * lines.b;
  }
  plan.x_bytes = ceil_div(int64_t{plan.positions} * share * sizeof(T), 16) * 16;
  const int workspace = inner == kNone ? plan.workspace(outer)
                                       : std::max(plan.workspace(inner), plan.gate_size(inner) + plan.workspace(outer));
  plan.bytes = static_cast<int>(sizeof(SharedGates<A>)) + plan.x_bytes + workspace * static_cast<int>(sizeof(A));
  return plan;
}

// Whether a block may hold its part of a clip at all: where not, the plan's numbers may overflow.
template <class T, class A = Accumulate<T>>
bool may_fit(const Shape& s, int cluster) {
  constexpr int kMost = 1 << 18, kLeastRun = 64;
  const int share = ceil_div(s.C, cluster);
  if (int64_t{s.T} * s.H * s.W * share * static_cast<int>(sizeof(T)) > kMost) return false;
  // Where channels are innermost, a block reads runs of its channels alone: of shorter ones memory wastes half.
  return s.order != Order::kTHWC || share * static_cast<int>(sizeof(T)) >= std::min<int>(kLeastRun, s.C * sizeof(T));
}

// Whether the threads of a block have registers for its results.
template <class A>
bool results_fit(const ClusterPlan<A>& plan) {
  if (plan.inner + plan.outer == kChannel) return true;
  return int64_t{ceil_div(plan.share, kRun)} * plan.over_spacetime() <= kRuns<A> * kClusterThreads;
}

// The gates of a context with the strides that the cluster's kernel wants.
void add_gates(Order order, int context, const GateParameters* gates, GateParameters* to) {
  if (context == kChannel) to[0] = gates[0];
  if (context != kSpacetime) return;
  for (int m = 0; m < 3; ++m) {
    const int64_t* const stride = gates[m].stride + 1;
    const int c = order == Order::kTHWC ? 2 : order == Order::kTCHW && m > 0 ? 1 : 0;
    to[m + 1] = gates[m];
    to[m + 1].stride[1] = stride[c];
    to[m + 1].stride[2] = stride[c == 0 ? 1 : 0];
    to[m + 1].stride[3] = stride[c == 2 ? 1 : 2];
  }
}

PackedDims dims_of(const Shape& s, int context) {
  if (context == kChannel) return {s.B, 1, {{s.T, s.H, s.W}}};
  if (s.order == Order::kTHWC) return {s.B, 3, {{s.H, s.W, s.C}, {s.T, s.W, s.C}, {s.T, s.H, s.C}}};
  if (s.order == Order::kCTHW) return {s.B, 3, {{s.C, s.H, s.W}, {s.C, s.T, s.W}, {s.C, s.T, s.H}}};
  return {s.B, 3, {{s.C, s.H, s.W}, {s.T, s.C, s.W}, {s.T, s.C, s.H}}};
}

int scalar_bytes(Scalar scalar) {
  return with_scalar(scalar, [](auto type) { return static_cast<int>(sizeof(type)); });
}

int64_t clip_bytes(const Shape& s) { return int64_t{s.T} * s.C * s.H * s.W * scalar_bytes(s.scalar); }

// Where the maps of a group of clips lie in its workspace.
struct GroupWorkspace {
  int64_t pooled, argmax, inner, outer, norm, statistics, bytes = 0;

  GroupWorkspace(const Shape& s, int64_t clips) {
    const int64_t map = s.scalar == Scalar::kFloat64 ? 8 : 4;
    const int64_t channel = clips * dims_of(s, kChannel).packed(), spacetime = clips * dims_of(s, kSpacetime).packed();
    const auto take = [&](int64_t size) { return std::exchange(bytes, (bytes + size + 15) / 16 * 16); };
    pooled = take(2 * std::max(channel, spacetime) * map);
    argmax = take(std::max(channel, spacetime) * 4);
    inner = take(std::max(channel, spacetime) * map);
    outer = take(std::max(channel, spacetime) * map);
    norm = take(12 * map);
    statistics = take(9 * map);
  }
};

}  // namespace

int cluster_size(const Shape& shape, int inner, int outer, int* best) {
  *best = 0;
  return with_scalar(shape.scalar, [&](auto type) {
    using T = decltype(type);
    constexpr int kWide = 16 / sizeof(T);
    int64_t least = INT64_MAX;
    for (int cluster : kClusters) {
      if (!may_fit<T>(shape, cluster)) continue;
      const auto plan = cluster_plan<T>(shape, inner, outer, cluster);
      if (!results_fit(plan)) continue;
      const auto [error, together] = clusters_together(evaluate_kernel<T, kWide>, cluster, kClusterThreads, plan.bytes);
      if (error) return error;
      if (together == 0) continue;
      // A block takes as long as it has channels, and there are as many rounds of them as clips do not fit at once.
      const int64_t duration = int64_t{ceil_div(shape.B, together)} * plan.share;
      if (duration < least) least = duration, *best = cluster;
    }
    return 0;
  });
}

int evaluate_in_clusters(const Shape& shape, const void* x, const UnitGates& unit, void* y, int cluster, void* stream) {
  return with_scalar(shape.scalar, [&](auto type) {
    using T = decltype(type);
    constexpr int kWide = 16 / sizeof(T);
    auto plan = cluster_plan<T>(shape, unit.inner, unit.outer, cluster);
    add_gates(shape.order, unit.inner, unit.inner_gates, plan.gates);
    add_gates(shape.order, unit.outer, unit.outer_gates, plan.gates);
    const auto run = [&](auto kernel) {
      return launch_clusters(kernel, shape.B * cluster, cluster, kClusterThreads, plan.bytes, stream, plan,
                             static_cast<const T*>(x), static_cast<T*>(y));
    };
    return int64_t{plan.channels} * plan.per_channel % kWide == 0 && are_aligned({x, y})
               ? run(evaluate_kernel<T, kWide>)
               : run(evaluate_kernel<T, 1>);
  });
}

int64_t clips_in_cache(const Shape& shape) {
  const int64_t most = std::clamp<int64_t>(cache_bytes() / 2 / clip_bytes(shape), 1, shape.B);
  return ceil_div(shape.B, ceil_div(shape.B, most));
}

int64_t group_bytes(const Shape& shape, int64_t clips) { return GroupWorkspace(shape, clips).bytes; }

int evaluate_in_groups(const Shape& shape, const void* x, const UnitGates& unit, void* y, int64_t clips,
                       void* workspace, void* stream) {
  const GroupWorkspace at(shape, clips);
  const auto place = [&](int64_t offset) { return static_cast<char*>(workspace) + offset; };
  for (int64_t first = 0; first < shape.B; first += clips) {
    Shape group = shape;
    group.B = std::min(clips, shape.B - first);
    const void* const in = static_cast<const char*>(x) + first * clip_bytes(shape);
    const auto make_gate = [&](int context, const GateParameters* gates, Gate guide, void* to) {
      const Scalar scalar = shape.scalar == Scalar::kFloat64 ? Scalar::kFloat64 : Scalar::kFloat32;
      const int error = pool(group, in, context, guide, place(at.pooled), place(at.argmax), 4, stream);
      if (error != 0) return error;
      // No statistics are the batch's, so nothing meets in a workspace.
      return gate(dims_of(group, context), scalar, gates, place(at.pooled), to, place(at.norm), place(at.statistics),
                  {}, stream);
    };
    Gate guide{nullptr, kNone};
    if (unit.inner != kNone) {
      if (const int error = make_gate(unit.inner, unit.inner_gates, guide, place(at.inner))) return error;
      guide = {place(at.inner), unit.inner};
    }
    if (const int error = make_gate(unit.outer, unit.outer_gates, guide, place(at.outer))) return error;
    void* const out = static_cast<char*>(y) + first * clip_bytes(shape);
    if (const int error = recalibrate(group, in, {place(at.outer), unit.outer}, out, stream)) return error;
  }
  return 0;
}

}  // namespace aia::cuda
