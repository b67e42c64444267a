// The double normalization of external attention (aia_kernels/schemas.py has the equations).
//
//   column_statistics            reads 1 |L|             maximum and sum of exponentials over tokens, online; its log
//   double_norm_                 reads 1, writes 1 |L|   A and the mass of each token's group
//   double_norm_backward_reduce  reads 2 |L|             sums of Q over tokens
//   double_norm_backward_        reads 2, writes 1 |L|   the gradient of the logits
//
// A row is a group of a token, contiguous. A team of 2^k lanes of a warp has a row, and a lane one vector of it, or,
// where the row is longer than the longest team, several vectors, which it reads from the cache for each step.
#include "double_norm.h"

#include <cmath>

#include "columns.cuh"
#include "statistics.cuh"
#include "teams.cuh"

namespace aia::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 4;  // vectors that a thread asks for before it uses the first

// Statistics in memory: [B, chunks, 2, M]; and of a single chunk, the whole, their logarithm [B, M], else null.
template <class A>
__device__ __forceinline__ void store_statistics(A* to, A* lse, int M, const Place& at, int column,
                                                 const Statistics<A>& s) {
  to += (at.b * at.chunks + at.chunk) * 2 * M + column;
  const A maximum = s.seen_maximum();
  to[0] = maximum;
  to[M] = s.sum;
  if (lse) lse[at.b * M + column] = maximum + std::log(s.sum);
}

template <class T, int V, class A = Accumulate<T>>
struct StatisticsOp {
  using Partial = Statistics<A>;
  const T* logits;         // [B, N, M]
  const uint8_t* padding;  // [B, N], or null
  A *to, *lse;             // [B, chunks, 2, M], and [B, M] or null
  int64_t N;
  int M;

  __device__ __forceinline__ void accumulate(Partial* partial, const Place& at) const {
    if (!at.active) return;
    for (int64_t n = at.first + at.slice; n < at.last; n += kBatch * at.slices) {
      Vector<T, V> rows[kBatch];
      bool shown[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t token = n + i * at.slices;
        shown[i] = token < at.last && !(padding && padding[at.b * N + token]);
        if (shown[i]) rows[i] = load_vector<V>(logits + (at.b * N + token) * M + at.column);
      }
#pragma unroll
      for (int k = 0; k < V; ++k) {
        A highest = lowest<A>();
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          if (shown[i] && widen(rows[i].at[k]) > highest) highest = widen(rows[i].at[k]);
        partial[k].raise(highest);
        const A origin = Partial::origin(partial[k].maximum);
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          if (shown[i]) partial[k].sum += std::exp(widen(rows[i].at[k]) - origin);
      }
    }
  }
  __device__ __forceinline__ void store(const Place& at, int column, const Partial& total) const {
    store_statistics(to, lse, M, at, column, total);
  }
};

template <class A>
struct JoinStatistics {
  using Partial = Statistics<A>;
  const A* from;  // [B, rows, 2, M]
  A *to, *lse;    // [B, chunks, 2, M] and [B, M]
  int64_t rows;
  int M;

  __device__ __forceinline__ void accumulate(Partial* partial, const Place& at) const {
    if (!at.active) return;
#pragma unroll 4
    for (int64_t n = at.first + at.slice; n < at.last; n += at.slices) {
      const A* row = from + (at.b * rows + n) * 2 * M + at.column;
      partial->merge({row[0], row[M]});
    }
  }
  __device__ __forceinline__ void store(const Place& at, int column, const Partial& total) const {
    store_statistics(to, lse, M, at, column, total);
  }
};

// The rows of one sample, [N * groups, group], the blocks that share them, and the lanes of a team, a power of two.
struct Rows {
  int count, group, blocks, lane_bits;
  Divisor by_groups;

  __host__ __device__ __forceinline__ int lanes() const { return 1 << lane_bits; }
};

// The team of a thread: its row and token among those of all samples, the columns of the lane, and where the row and
// its group begin in [B, N, M] and in [B, M].
struct Team {
  int64_t row, token, start, column_start;
  int lane;
  bool active;

  __device__ __forceinline__ Team(const Rows& rows, int V) {
    const int64_t sample = blockIdx.x / rows.blocks;
    int group = static_cast<int>(blockIdx.x % rows.blocks * (kThreads >> rows.lane_bits)) +
                static_cast<int>(threadIdx.x >> rows.lane_bits);
    active = group < rows.count;
    row = sample * rows.count + group;
    const int groups = rows.by_groups.divisor;
    token = sample * (rows.count / groups) + rows.by_groups.divide(group);
    lane = (threadIdx.x & (rows.lanes() - 1)) * V;
    start = row * rows.group;
    column_start = (sample * groups + group) * rows.group;
  }
};

// Calls body(column) for the first columns of the vectors of a lane: at most one where they are held.
template <int V, bool kHeld, class Body>
__device__ __forceinline__ void for_lane(const Rows& rows, const Team& team, Body&& body) {
  if (!team.active) return;
  if constexpr (kHeld) {
    if (team.lane < rows.group) body(team.lane);
  } else {
    for (int c = team.lane; c < rows.group; c += rows.lanes() * V) body(c);
  }
}

template <class T, int V, bool kHeld, class A = Accumulate<T>>
__global__ void __launch_bounds__(kThreads, 1)
    double_norm_kernel(Rows rows,
                       T* __restrict__ logits,               // [B, N, M]; becomes A
                       const A* __restrict__ lse,            // [B, M]
                       const uint8_t* __restrict__ padding,  // [B, N], or null
                       A eps,
                       A* __restrict__ mass) {  // [B, N, groups]
  const Team team(rows, V);
  const bool hidden = team.active && padding && padding[team.token];
  Vector<A, V> held;
  const auto log_p = [&](int c) {
    const auto x = load_vector<V>(logits + team.start + c);
    const auto origin = load_vector<V>(lse + team.column_start + c);
    Vector<A, V> values;
#pragma unroll
    for (int k = 0; k < V; ++k) values.at[k] = widen(x.at[k]) - origin.at[k];
    return values;
  };
  const auto held_or_recomputed = [&](int c) { return kHeld ? held : log_p(c); };

  A largest = lowest<A>();
  if (!hidden) {
    for_lane<V, kHeld>(rows, team, [&](int c) {
      const auto values = log_p(c);
#pragma unroll
      for (int k = 0; k < V; ++k) largest = values.at[k] > largest ? values.at[k] : largest;
      held = values;
    });
  }
  largest = Statistics<A>::origin(team_maximum(largest, rows.lanes()));  // without eps A is 0 / 0 where all are -inf
  A sum = 0;
  if (!hidden) {
    for_lane<V, kHeld>(rows, team, [&](int c) {
      auto values = held_or_recomputed(c);
#pragma unroll
      for (int k = 0; k < V; ++k) sum += values.at[k] = std::exp(values.at[k] - largest);
      held = values;
    });
  }
  sum = team_sum(sum, rows.lanes());
  // Relative to the maximum nothing overflows, and the sum is at least 1, or 0 where logits of -inf hide the token.
  const A factor = A(1) / (eps > 0 ? sum + eps * std::exp(-largest) : sum);
  for_lane<V, kHeld>(rows, team, [&](int c) {
    const auto values = kHeld || hidden ? held : log_p(c);
    Vector<T, V> attention;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A scaled = kHeld || hidden ? values.at[k] : std::exp(values.at[k] - largest);
      attention.at[k] = narrow<T>(hidden ? A(0) : scaled * factor);
    }
    store_vector(logits + team.start + c, attention);
  });
  if (team.active && team.lane == 0) mass[team.row] = hidden ? eps : eps + sum * std::exp(largest);
}

// The sum of grad * A over each row.
template <class T, int V, class A = Accumulate<T>>
__global__ void __launch_bounds__(kThreads, 1) dots_kernel(Rows rows,
                                                           const T* __restrict__ grad,       // [B, N, M], of A
                                                           const T* __restrict__ attention,  // [B, N, M]
                                                           A* __restrict__ dots) {           // [B, N, groups]
  const Team team(rows, V);
  A dot = 0;
  for_lane<V, false>(rows, team, [&](int c) {
    const auto g = load_vector<V>(grad + team.start + c), a = load_vector<V>(attention + team.start + c);
#pragma unroll
    for (int k = 0; k < V; ++k) dot += widen(g.at[k]) * widen(a.at[k]);
  });
  dot = team_sum(dot, rows.lanes());
  if (team.active && team.lane == 0) dots[team.row] = dot;
}

template <class T, int V, bool kHeld, class A = Accumulate<T>>
__global__ void __launch_bounds__(kThreads, 1)
    double_norm_backward_kernel(Rows rows,
                                T* __restrict__ grad,             // [B, N, M], of A; becomes that of the logits
                                const T* __restrict__ attention,  // [B, N, M]
                                const A* __restrict__ mass,       // [B, N, groups]
                                const A* __restrict__ reduced) {  // [B, M]
  const Team team(rows, V);
  Vector<T, V> held_g, held_a;
  A dot = 0;
  for_lane<V, kHeld>(rows, team, [&](int c) {
    held_g = load_vector<V>(grad + team.start + c), held_a = load_vector<V>(attention + team.start + c);
#pragma unroll
    for (int k = 0; k < V; ++k) dot += widen(held_g.at[k]) * widen(held_a.at[k]);
  });
  dot = team_sum(dot, rows.lanes());
  for_lane<V, kHeld>(rows, team, [&](int c) {
    const A row_mass = mass[team.row];
    auto g = kHeld ? held_g : load_vector<V>(grad + team.start + c);
    const auto a = kHeld ? held_a : load_vector<V>(attention + team.start + c);
    const auto d = load_vector<V>(reduced + team.column_start + c);
#pragma unroll
    for (int k = 0; k < V; ++k) g.at[k] = narrow<T>(widen(a.at[k]) * (widen(g.at[k]) - dot - row_mass * d.at[k]));
    store_vector(grad + team.start + c, g);
  });
}

// Sums of Q over tokens. A team of lanes finds the dot product of its group or, with lanes = 0, reads it from dots.
template <class T, int V, class A = Accumulate<T>>
struct RowGradientOp {
  using Partial = Total<A>;
  const T *grad, *attention;  // [B, N, M]
  const A* dots;              // [B, N, groups], or null where lanes > 0
  A* to;                      // [B, chunks, M]
  int64_t N;
  int M, group, lanes;

  __device__ __forceinline__ void accumulate(Partial* partial, const Place& at) const {
    // All threads of a warp come along: they meet in the sums of their teams.
    for (int64_t n = at.first; n < at.last; n += kBatch * at.slices) {
      Vector<T, V> g[kBatch], a[kBatch];
      bool present[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t token = n + i * at.slices + at.slice, e = (at.b * N + token) * M + at.column;
        present[i] = at.active && token < at.last;
        if (present[i]) g[i] = load_vector<V>(grad + e), a[i] = load_vector<V>(attention + e);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t token = n + i * at.slices + at.slice;
        A dot = 0;
        if (lanes > 0) {
#pragma unroll
          for (int k = 0; k < V; ++k) dot += present[i] ? widen(g[i].at[k]) * widen(a[i].at[k]) : A(0);
          dot = team_sum(dot, lanes);
        } else if (present[i]) {
          dot = dots[((at.b * N + token) * M + at.column) / group];
        }
        if (!present[i]) continue;
#pragma unroll
        for (int k = 0; k < V; ++k) partial[k].sum += widen(a[i].at[k]) * (widen(g[i].at[k]) - dot);
      }
    }
  }
  __device__ __forceinline__ void store(const Place& at, int column, const Partial& total) const {
    to[(at.b * at.chunks + at.chunk) * M + column] = total.sum;
  }
};

// The rows for lanes of V columns, and whether a team holds a row.
struct Teams {
  Rows rows;
  bool held;
  int64_t blocks;

  Teams(const Tokens& at, int V)
      : rows{static_cast<int>(at.N * at.groups()), at.group, 0,
             std::min(bits_of(ceil_div(at.group, V)), bits_of(kWarp)), Divisor(at.groups())} {
    rows.blocks = ceil_div(rows.count, kThreads >> rows.lane_bits);
    held = at.group <= rows.lanes() * V;
    blocks = at.B * rows.blocks;
  }
};

// Whether the threads across a row are teams of whole groups: then they find the dot products themselves.
bool teams_fit(const Tokens& at, int V) {
  const int lanes = at.group / V;
  return at.group % V == 0 && lanes <= kWarp && 1 << bits_of(lanes) == lanes;
}

}  // namespace

Split token_split(const Tokens& at) {
  constexpr int kLeast = 64, kColumns = 512;
  return Split(at.N, at.B * ceil_div(at.M, kColumns), kLeast);
}

int column_statistics(const Tokens& at, const void* logits, void* partial, void* statistics, void* lse, void* stream) {
  return with_scalar(at.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const Split split = token_split(at);
    A *const result = static_cast<A*>(statistics), *const log_of = static_cast<A*>(lse);
    A* const to = split.chunks > 1 ? static_cast<A*>(partial) : result;
    const int error = with_width<T>(at.M, {logits}, [&](auto V) {
      A* const at_once = split.chunks > 1 ? nullptr : log_of;
      const StatisticsOp<T, V.value> op{static_cast<const T*>(logits), at.padding, to, at_once, at.N, at.M};
      return launch_columns<V.value>(op, at.B, at.N, at.M, split, kColumnThreads / 4, stream);
    });
    if (error != 0 || split.chunks == 1) return error;
    return join_columns(JoinStatistics<A>{to, result, log_of, split.chunks, at.M}, at.B, split.chunks, at.M, stream);
  });
}

int double_norm(const Tokens& at, void* logits, const void* lse, double eps, void* mass, void* stream) {
  return with_scalar(at.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    return with_width<T>(at.group, {logits, lse}, [&](auto V) {
      const Teams teams(at, V.value);
      const auto run = [&](auto kernel) {
        return launch(kernel, teams.blocks, kThreads, stream, teams.rows, static_cast<T*>(logits),
                      static_cast<const A*>(lse), at.padding, static_cast<A>(eps), static_cast<A*>(mass));
      };
      return teams.held ? run(double_norm_kernel<T, V.value, true>) : run(double_norm_kernel<T, V.value, false>);
    });
  });
}

bool needs_dots(const Tokens& at, const void* grad, const void* attention) {
  bool fit = false;
  with_scalar(at.scalar, [&](auto type) {
    return with_width<decltype(type)>(at.group, {grad, attention}, [&](auto V) {
      fit = teams_fit(at, V.value);
      return 0;
    });
  });
  return !fit;
}

int double_norm_backward_reduce(const Tokens& at, const void* grad, const void* attention, void* dots, void* partial,
                                void* reduced, void* stream) {
  return with_scalar(at.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const T *g = static_cast<const T*>(grad), *a = static_cast<const T*>(attention);
    const Split split = token_split(at);
    A* const to = static_cast<A*>(split.chunks > 1 ? partial : reduced);
    const int error = with_width<T>(at.group, {grad, attention}, [&](auto V) {
      const bool fit = teams_fit(at, V.value);
      if (!fit) {
        const Teams teams(at, V.value);
        const int failed =
            launch(dots_kernel<T, V.value>, teams.blocks, kThreads, stream, teams.rows, g, a, static_cast<A*>(dots));
        if (failed != 0) return failed;
      }
      const RowGradientOp<T, V.value> op{g,    a,        static_cast<const A*>(dots), to, at.N,
                                         at.M, at.group, fit ? at.group / V.value : 0};
      return launch_columns<V.value>(op, at.B, at.N, at.M, split, kColumnThreads / 4, stream);
    });
    if (error != 0 || split.chunks == 1) return error;
    return join_columns(JoinTotals<A>{to, static_cast<A*>(reduced), split.chunks, at.M}, at.B, split.chunks, at.M,
                        stream);
  });
}

int double_norm_backward(const Tokens& at, void* grad, const void* attention, const void* mass, const void* reduced,
                         void* stream) {
  return with_scalar(at.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    return with_width<T>(at.group, {grad, attention, reduced}, [&](auto V) {
      const Teams teams(at, V.value);
      const auto run = [&](auto kernel) {
        return launch(kernel, teams.blocks, kThreads, stream, teams.rows, static_cast<T*>(grad),
                      static_cast<const T*>(attention), static_cast<const A*>(mass), static_cast<const A*>(reduced));
      };
      return teams.held ? run(double_norm_backward_kernel<T, V.value, true>)
                        : run(double_norm_backward_kernel<T, V.value, false>);
    });
  });
}

}  // namespace aia::cuda
