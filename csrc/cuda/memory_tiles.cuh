// Tiles of rows [p, N], tokens contiguous, of attention by a memory per sample. A warp stands across kWarp * V tokens:
// V of a lane, as many as 16 bytes of logits hold. The warps of a block share the rows: of one head, so that what
// belongs to all of its features is joined in shared memory, or rows that do not know one another.
#pragma once

#include <cmath>

#include "../common/memory.h"
#include "columns.cuh"
#include "statistics.cuh"
#include "teams.cuh"

namespace aia::cuda {

constexpr int kTileWarps = 8;

// Tokens of a lane, and of a warp.
template <class T>
constexpr int kLaneTokens = 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kTileTokens = kWarp * kLaneTokens<T>;

inline int tile_tokens(Scalar scalar) {
  return scalar == Scalar::kFloat64   ? kTileTokens<double>
         : scalar == Scalar::kFloat32 ? kTileTokens<float>
                                      : kTileTokens<Float16>;
}

// The type of rows: products take bfloat16 as it is, and all else in the wider type.
template <class T>
struct RowType {
  using type = Accumulate<T>;
};
template <>
struct RowType<BFloat16> {
  using type = BFloat16;
};
template <class T>
using Row = typename RowType<T>::type;

// Calls body with a value of the storage type, and whether rows at these addresses can be moved in vectors.
template <class Body>
int with_rows(const Memory& at, std::initializer_list<const void*> addresses, Body&& body) {
  return with_scalar(at.scalar, [&](auto type) {
    using T = decltype(type);
    return with_width<T>(at.N, addresses, [&](auto V) { return body(type, std::bool_constant<(V.value > 1)>{}); });
  });
}

// The tokens of a lane: neighbours, which move as a vector, or else every 32nd. Those behind the last are not there;
// those that take no part are read as if they held the number that is missing, whatever they hold.
template <int V, bool kVectors>
class LaneTokens {
 public:
  // Of a warp across the tokens from the first on. padding [N] is that of the sample, or null.
  __device__ __forceinline__ LaneTokens(int64_t first, int N, const uint8_t* padding) {
    const int lane = threadIdx.x % kWarp;
    first_ = static_cast<int>(first) + (kVectors ? lane * V : lane);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const bool inside = at(k) < N, shown = inside && !(padding && padding[at(k)]);
      inside_ |= static_cast<uint32_t>(inside) << k;
      shown_ |= static_cast<uint32_t>(shown) << k;
    }
  }
  __device__ __forceinline__ bool shown(int k) const { return shown_ >> k & 1; }

  template <class S, class A = Accumulate<S>>
  __device__ __forceinline__ Vector<A, V> load(const S* row, bool wanted = true, A missing = 0) const {
    Vector<A, V> values;
    if constexpr (kVectors) {
      Vector<S, V> stored{};
      if (wanted && inside_) stored = load_vector<V>(row + first_);
#pragma unroll
      for (int k = 0; k < V; ++k) values.at[k] = wanted && shown(k) ? widen(stored.at[k]) : missing;
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) values.at[k] = wanted && shown(k) ? widen(row[at(k)]) : missing;
    }
    return values;
  }
  template <class S, class A>
  __device__ __forceinline__ void store(S* row, const Vector<A, V>& values, bool wanted = true) const {
    if constexpr (kVectors) {
      Vector<S, V> stored;
#pragma unroll
      for (int k = 0; k < V; ++k) stored.at[k] = narrow<S>(values.at[k]);
      if (wanted && inside_) store_vector(row + first_, stored);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (wanted && inside_ >> k & 1) row[at(k)] = narrow<S>(values.at[k]);
    }
  }
  // The sum over all lanes of a warp, of which each has the same bits.
  template <class A>
  static __device__ __forceinline__ A sum(const Vector<A, V>& values) {
    A total = values.at[0];
#pragma unroll
    for (int k = 1; k < V; ++k) total += values.at[k];
    return team_sum(total, kWarp);
  }

 private:
  __device__ __forceinline__ int at(int k) const { return first_ + (kVectors ? k : k * kWarp); }

  int first_;
  uint32_t inside_ = 0, shown_ = 0;
};

// A launch with a block for each head and tile of tokens.
struct HeadTiles {
  int64_t N;
  int H, d, R, tiles, warps;
  const uint8_t* padding;  // [B, N], or null

  explicit HeadTiles(const Memory& at)
      : N(at.N),
        H(static_cast<int>(at.H)),
        d(static_cast<int>(at.d)),
        R(static_cast<int>(at.R())),
        tiles(ceil_div(at.N, tile_tokens(at.scalar))),
        warps(std::min(d, kTileWarps)),
        padding(at.padding) {}

  template <class... Parameters>
  int queue(const Memory& at, void (*kernel)(HeadTiles, Parameters...), void* stream,
            std::type_identity_t<Parameters>... parameters) const {
    return launch(kernel, at.heads() * tiles, warps * kWarp, stream, *this, parameters...);
  }
};

// Where a thread of it stands: its rows are row, row + warps, ..., below d. All threads of a block come along for as
// many rounds.
struct HeadPlace {
  int64_t head, b;  // head is among those of all samples
  int h, tile, row, lane;

  explicit __device__ __forceinline__ HeadPlace(const HeadTiles& of) {
    tile = blockIdx.x % of.tiles;
    head = blockIdx.x / of.tiles;
    b = head / of.H, h = static_cast<int>(head % of.H);
    row = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  }
  template <class T, bool kVectors>
  __device__ __forceinline__ LaneTokens<kLaneTokens<T>, kVectors> tokens(const HeadTiles& of) const {
    return {int64_t{tile} * kTileTokens<T>, static_cast<int>(of.N), of.padding ? of.padding + b * of.N : nullptr};
  }
  // Where the rows of this head begin in [B, pitch, N], with so many rows a head, behind others of all heads.
  __device__ __forceinline__ int64_t rows(const HeadTiles& of, int64_t pitch, int64_t others, int of_head) const {
    return (b * pitch + others + int64_t{h} * of_head) * of.N;
  }
  // The same in logits, and of the gradients in rows [B, H (R + 2 d), N]: of keys, or of queries behind them.
  __device__ __forceinline__ int64_t logits(const HeadTiles& of, bool queries) const {
    return rows(of, 2 * int64_t{of.H} * of.d, queries ? int64_t{of.H} * of.d : 0, of.d);
  }
  __device__ __forceinline__ int64_t gradients(const HeadTiles& of, bool queries) const {
    return rows(of, int64_t{of.H} * (of.R + 2 * of.d), int64_t{of.H} * (of.R + (queries ? of.d : 0)), of.d);
  }
};

// kCount sums of a token.
template <class A, int kCount>
struct Sums {
  A at[kCount];

  static __device__ __forceinline__ Sums none() { return {}; }
  __device__ __forceinline__ void merge(const Sums& other) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) at[i] += other.at[i];
  }
};

// The largest of some numbers; NaN passes by.
template <class A>
struct Largest {
  A at;

  static __device__ __forceinline__ Largest none() { return {lowest<A>()}; }
  __device__ __forceinline__ void merge(const Largest& other) { at = other.at > at ? other.at : at; }
};

// Merges what the warps of a block have of each token, in their order; shared holds V * kWarp for each warp.
template <class Partial, int V>
__device__ __forceinline__ void join_warps(Partial* shared, int warps, Partial (&mine)[V]) {
  constexpr int kWidth = V * kWarp;
  if (warps == 1) return;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
#pragma unroll
  for (int k = 0; k < V; ++k) shared[warp * kWidth + k * kWarp + lane] = mine[k];
  __syncthreads();
  for (int j = thread; j < kWidth; j += warps * kWarp) {
    Partial total = shared[j];
    for (int other = 1; other < warps; ++other) total.merge(shared[other * kWidth + j]);
    shared[j] = total;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < V; ++k) mine[k] = shared[k * kWarp + lane];
}

// 1 where it is zero.
template <class A>
__device__ __forceinline__ A no_zero(A value) {
  return value == 0 ? A(1) : value;
}

// log(1 + exp(z)), without loss where it is small or large.
template <class A>
__device__ __forceinline__ A softplus(A z) {
  return (z > 0 ? z : A(0)) + std::log1p(std::exp(z > 0 ? -z : z));
}

template <class A>
__device__ __forceinline__ A sigmoid(A z) {
  return A(1) / (A(1) + std::exp(-z));
}

// What a feature map needs of all rows z of a head, for each token of a lane: 1 / |z|, 1 where that is zero, or the
// maximum, 0 where there is none; nothing for softplus. shared holds kLaneTokens * kWarp numbers for each warp.
template <Feature kFeature, class T, bool kVectors, class A = Accumulate<T>>
__device__ __forceinline__ Vector<A, kLaneTokens<T>> scale_of(const HeadTiles& of, const HeadPlace& at,
                                                              const LaneTokens<kLaneTokens<T>, kVectors>& tokens,
                                                              const T* z, A* shared) {
  constexpr int V = kLaneTokens<T>;
  using Partial = std::conditional_t<kFeature == Feature::kSoftmax, Largest<A>, Sums<A, 1>>;
  Vector<A, V> scale{};
  if constexpr (kFeature != Feature::kSoftplus) {
    Partial mine[V];
#pragma unroll
    for (int k = 0; k < V; ++k) mine[k] = Partial::none();
#pragma unroll 4
    for (int r = at.row; r < of.d; r += of.warps) {
      const auto values = tokens.load(z + r * of.N);
#pragma unroll
      for (int k = 0; k < V; ++k)
        mine[k].merge({kFeature == Feature::kSoftmax ? values.at[k] : values.at[k] * values.at[k]});
    }
    join_warps(reinterpret_cast<Partial*>(shared), of.warps, mine);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if constexpr (kFeature == Feature::kSoftmax)
        scale.at[k] = Statistics<A>::origin(mine[k].at);
      else
        scale.at[k] = A(1) / std::sqrt(no_zero(mine[k].at[0]));
    }
  }
  return scale;
}

// phi of a feature, but for the sum of a softmax.
template <Feature kFeature, class A>
__device__ __forceinline__ A phi_of(A z, A scale) {
  if constexpr (kFeature == Feature::kL2)
    return z * scale;
  else if constexpr (kFeature == Feature::kSoftmax)
    return std::exp(z - scale);
  else
    return softplus(z);
}

// Sums over the parts of each of `rows` rows, partial [rows, parts], or zeros where that is null; and where total is
// not null, that of all `count` numbers of others. Queues one launch.
int join_parts(Scalar, int64_t rows, int parts, const void* partial, void* sums, int64_t count, const void* others,
               void* total, void* stream);

}  // namespace aia::cuda
