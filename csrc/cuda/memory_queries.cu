// The queries of attention by a memory per sample, forward and backward (aia_kernels/schemas.py has the equations):
//
//   queries_kernel            reads the queries           writes phi(q)'
//   queries_backward_kernel   reads the queries and P     writes phi(q)', the gradient of queries, and the sums over
//   the
//                                                         tokens of a tile for the gradients of s and of gamma
#include "memory.h"
#include "memory_tiles.cuh"

namespace aia::cuda {
namespace {

// What phi of a head's queries is multiplied by: gamma / mass, with mass the sum of phi by the weights (s + eps) / N,
// eps not for the constant 1; or, of a softmax, the sum of phi.
template <class T, class A = Accumulate<T>>
struct Divisor {
  const A* sums;   // [B, H R]
  const T* gamma;  // [1], or null for 1
  A eps, share;

  __device__ __forceinline__ A factor() const { return gamma ? widen(*gamma) : A(1); }
  __device__ __forceinline__ A unit(const HeadTiles& of, const HeadPlace& at) const {
    return sums[at.head * of.R] * share;
  }
  __device__ __forceinline__ A weight(const HeadTiles& of, const HeadPlace& at, int row) const {
    return (sums[at.head * of.R + row] + eps) * share;
  }
};

template <Feature kFeature, bool kVectors, class T, class A = Accumulate<T>>
__global__ void __launch_bounds__(kTileWarps* kWarp, 1) queries_kernel(HeadTiles of, Divisor<T> divisor,
                                                                       const T* __restrict__ logits,  // [B, 2 H d, N]
                                                                       Row<T>* __restrict__ query) {  // [B, H R, N]
  constexpr int V = kLaneTokens<T>, kUnit = kFeature == Feature::kL2;
  AIA_SHARED(A, shared, kTileWarps * V * kWarp);
  AIA_SHARED(A, shared_mass, kTileWarps * V * kWarp);
  const HeadPlace at(of);
  const auto tokens = at.tokens<T, kVectors>(of);
  const T* const z = logits + at.logits(of, true);
  query += at.head * of.R * of.N;
  const Vector<A, V> scale = scale_of<kFeature>(of, at, tokens, z, shared);
  Sums<A, 1> mass[V];
#pragma unroll
  for (int k = 0; k < V; ++k) mass[k] = Sums<A, 1>::none();
#pragma unroll 4
  for (int r = at.row; r < of.d; r += of.warps) {
    const auto values = tokens.load(z + r * of.N);
    const A weight = kFeature == Feature::kSoftmax ? A(1) : divisor.weight(of, at, kUnit + r);
#pragma unroll
    for (int k = 0; k < V; ++k) mass[k].at[0] += weight * phi_of<kFeature>(values.at[k], scale.at[k]);
  }
  join_warps(reinterpret_cast<Sums<A, 1>*>(shared_mass), of.warps, mass);
  Vector<A, V> factor;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const A whole = kUnit ? mass[k].at[0] + divisor.unit(of, at) : mass[k].at[0];
    factor.at[k] = tokens.shown(k) ? divisor.factor() / no_zero(whole) : A(0);
  }
  if constexpr (kUnit != 0) tokens.store(query, factor, at.row == 0);
  for (int r = at.row; r < of.d; r += of.warps) {
    auto values = tokens.load(z + r * of.N);
#pragma unroll
    for (int k = 0; k < V; ++k) values.at[k] = phi_of<kFeature>(values.at[k], scale.at[k]) * factor.at[k];
    tokens.store(query + (kUnit + r) * of.N, values);
  }
}

// Of a token's phi(q) gamma / mass: the factor of phi(q), the gradient of the mass, the part of gamma's gradient, and
// of what the features alone have of mass and of its product with P, their sum in the gradient.
template <class A, int V>
struct Quotient {
  Vector<A, V> factor, grad_mass, ratio, along;

  template <class Tokens>
  __device__ __forceinline__ Quotient(const Tokens& tokens, const Sums<A, 2> (&of_features)[V], A unit_mass,
                                      const Vector<A, V>& unit_product, A gamma) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const auto [mass, product] = of_features[k].at;
      const A inverse = A(1) / no_zero(mass + unit_mass);
      ratio.at[k] = tokens.shown(k) ? (product + unit_product.at[k]) * inverse : A(0);
      factor.at[k] = tokens.shown(k) ? gamma * inverse : A(0);
      grad_mass.at[k] = -(ratio.at[k] * factor.at[k]);
      along.at[k] = factor.at[k] * product + grad_mass.at[k] * mass;
    }
  }
};

template <Feature kFeature, bool kVectors, class T, class A = Accumulate<T>>
__global__ void __launch_bounds__(kTileWarps* kWarp, 1)
    queries_backward_kernel(HeadTiles of, Divisor<T> divisor,
                            const T* __restrict__ logits,   // [B, 2 H d, N]
                            const T* __restrict__ reached,  // [B, H R, N]
                            Row<T>* __restrict__ rows,      // [B, H (R + 2 d), N]
                            Row<T>* __restrict__ query,     // [B, H R, N]
                            A* __restrict__ of_sums,        // [B H R, tiles], or null
                            A* __restrict__ of_gamma) {     // [B H, tiles]
  constexpr int V = kLaneTokens<T>, kUnit = kFeature == Feature::kL2;
  constexpr bool kSoftmax = kFeature == Feature::kSoftmax;
  AIA_SHARED(A, shared, kTileWarps * V * kWarp);
  AIA_SHARED(A, shared_sums, kTileWarps * 2 * V * kWarp);
  HeadPlace at(of);
  const auto tokens = at.tokens<T, kVectors>(of);
  const T* const z = logits + at.logits(of, true);
  reached += at.head * of.R * of.N;
  query += at.head * of.R * of.N;
  rows += at.gradients(of, true);
  of_sums += at.head * of.R * of.tiles + at.tile;
  const Vector<A, V> scale = scale_of<kFeature>(of, at, tokens, z, shared);
  Sums<A, 2> features[V];  // mass, and its product with P
#pragma unroll
  for (int k = 0; k < V; ++k) features[k] = Sums<A, 2>::none();
#pragma unroll 4
  for (int r = at.row; r < of.d; r += of.warps) {
    const auto values = tokens.load(z + r * of.N), p = tokens.load(reached + (kUnit + r) * of.N);
    const A weight = kSoftmax ? A(1) : divisor.weight(of, at, kUnit + r);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A phi = phi_of<kFeature>(values.at[k], scale.at[k]);
      features[k].at[0] += weight * phi;
      features[k].at[1] += phi * p.at[k];
    }
  }
  join_warps(reinterpret_cast<Sums<A, 2>*>(shared_sums), of.warps, features);
  const Quotient<A, V> of_token(tokens, features, kUnit ? divisor.unit(of, at) : A(0), tokens.load(reached, kUnit != 0),
                                divisor.factor());
  const A ratio = tokens.sum(of_token.ratio);
  if (at.row == 0 && at.lane == 0) of_gamma[at.head * of.tiles + at.tile] = ratio;
  if constexpr (kUnit != 0) {
    const A total = tokens.sum(of_token.grad_mass);
    tokens.store(query, of_token.factor, at.row == 0);
    if (at.row == 0 && at.lane == 0) of_sums[0] = total * divisor.share;
  }
  for (int first = 0; first < of.d; first += of.warps, at.row += of.warps) {
    const bool exists = at.row < of.d;
    const auto values = tokens.load(z + at.row * of.N, exists);
    auto grad = tokens.load(reached + (kUnit + at.row) * of.N, exists);
    const A weight = kSoftmax || !exists ? A(0) : divisor.weight(of, at, kUnit + at.row);
    Vector<A, V> q, of_mass;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A phi = phi_of<kFeature>(values.at[k], scale.at[k]);
      q.at[k] = phi * of_token.factor.at[k];
      of_mass.at[k] = phi * of_token.grad_mass.at[k];
      if constexpr (kSoftmax) {
        grad.at[k] = q.at[k] * (grad.at[k] - of_token.ratio.at[k]);
      } else {
        grad.at[k] = grad.at[k] * of_token.factor.at[k] + weight * of_token.grad_mass.at[k];
        if constexpr (kUnit != 0)
          grad.at[k] = (grad.at[k] - phi * of_token.along.at[k]) * scale.at[k];
        else
          grad.at[k] *= sigmoid(values.at[k]);
      }
    }
    tokens.store(query + (kUnit + at.row) * of.N, q, exists);
    tokens.store(rows + at.row * of.N, grad, exists);
    if constexpr (!kSoftmax) {
      const A total = tokens.sum(of_mass);
      if (exists && at.lane == 0) of_sums[int64_t{kUnit + at.row} * of.tiles] = total * divisor.share;
    }
  }
}

// Calls body with the feature map as a constant.
template <class Body>
int with_feature(Feature feature, Body&& body) {
  switch (feature) {
    case Feature::kL2: return body(std::integral_constant<Feature, Feature::kL2>{});
    case Feature::kSoftplus: return body(std::integral_constant<Feature, Feature::kSoftplus>{});
    default: return body(std::integral_constant<Feature, Feature::kSoftmax>{});
  }
}

template <class T>
Divisor<T> divisor_of(const Memory& at, const void* sums, const void* gamma, double eps) {
  using A = Accumulate<T>;
  return {static_cast<const A*>(sums), static_cast<const T*>(gamma), static_cast<A>(eps), A(1) / static_cast<A>(at.N)};
}

// Of the gradient of s; a softmax has none.
int64_t sums_of_tiles(const Memory& at) {
  return at.feature == Feature::kSoftmax ? 0 : at.heads() * at.R() * HeadTiles(at).tiles;
}

}  // namespace

int memory_queries(const Memory& at, const void* logits, const void* sums, const void* gamma, double eps, void* query,
                   void* stream) {
  return with_rows(at, {logits, query}, [&](auto type, auto vectors) {
    using T = decltype(type);
    return with_feature(at.feature, [&](auto feature) {
      return HeadTiles(at).queue(at, queries_kernel<feature.value, vectors.value, T>, stream,
                                 divisor_of<T>(at, sums, gamma, eps), static_cast<const T*>(logits),
                                 static_cast<Row<T>*>(query));
    });
  });
}

int64_t memory_queries_backward_partials(const Memory& at) {
  return sums_of_tiles(at) + at.heads() * HeadTiles(at).tiles;
}

int memory_queries_backward(const Memory& at, const void* logits, const void* sums, const void* gamma, double eps,
                            const void* reached, const QueryGradients& to, void* partial, void* stream) {
  const HeadTiles tiles(at);
  return with_rows(at, {logits, reached, to.rows, to.query}, [&](auto type, auto vectors) {
    using T = decltype(type);
    using A = Accumulate<T>;
    A *const of_sums = static_cast<A*>(partial), *const of_gamma = of_sums + sums_of_tiles(at);
    const int error = with_feature(at.feature, [&](auto feature) {
      return tiles.queue(at, queries_backward_kernel<feature.value, vectors.value, T>, stream,
                         divisor_of<T>(at, sums, gamma, eps), static_cast<const T*>(logits),
                         static_cast<const T*>(reached), static_cast<Row<T>*>(to.rows), static_cast<Row<T>*>(to.query),
                         of_sums, of_gamma);
    });
    if (error != 0) return error;
    return join_parts(at.scalar, at.heads() * at.R(), tiles.tiles, at.feature == Feature::kSoftmax ? nullptr : of_sums,
                      to.grad_sums, at.heads() * tiles.tiles, of_gamma, to.grad_gamma, stream);
  });
}

}  // namespace aia::cuda
