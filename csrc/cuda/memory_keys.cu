// The keys of attention by a memory per sample, forward and backward (aia_kernels/schemas.py has the equations):
//
//   keys_kernel            reads the keys                 writes phi(k), and its sums over the tokens of a tile
//   keys_backward_kernel   reads keys, their gradient     writes the gradient of keys; phi(k) is made again
//
// Both are of features of each token alone. A softmax over tokens is in memory_softmax.cu.
#include "memory.h"
#include "memory_softmax.h"
#include "memory_tiles.cuh"

namespace aia::cuda {
namespace {

template <Feature kFeature, bool kVectors, class T, class A = Accumulate<T>>
__global__ void __launch_bounds__(kTileWarps* kWarp, 1) keys_kernel(HeadTiles of, int64_t pitch,
                                                                    const T* __restrict__ logits,  // [B, 2 H d, N]
                                                                    Row<T>* __restrict__ rows,     // [B, pitch, N]
                                                                    A* __restrict__ partial) {     // [B H R, tiles]
  constexpr int V = kLaneTokens<T>, kUnit = kFeature == Feature::kL2;
  AIA_SHARED(A, shared, kTileWarps * V * kWarp);
  HeadPlace at(of);
  const auto tokens = at.tokens<T, kVectors>(of);
  const T* const z = logits + at.logits(of, false);
  rows += at.rows(of, pitch, 0, of.R);
  partial += at.head * of.R * of.tiles + at.tile;
  const Vector<A, V> scale = scale_of<kFeature>(of, at, tokens, z, shared);
  if constexpr (kUnit != 0) {
    Vector<A, V> ones;
#pragma unroll
    for (int k = 0; k < V; ++k) ones.at[k] = tokens.shown(k) ? A(1) : A(0);
    const A total = tokens.sum(ones);
    tokens.store(rows, ones, at.row == 0);
    if (at.row == 0 && at.lane == 0) partial[0] = total;
  }
  for (int first = 0; first < of.d; first += of.warps, at.row += of.warps) {
    const bool exists = at.row < of.d;
    auto v = tokens.load(z + at.row * of.N, exists);
#pragma unroll
    for (int k = 0; k < V; ++k) v.at[k] = tokens.shown(k) ? phi_of<kFeature>(v.at[k], scale.at[k]) : A(0);
    const A total = tokens.sum(v);
    tokens.store(rows + (kUnit + at.row) * of.N, v, exists);
    if (exists && at.lane == 0) partial[int64_t{kUnit + at.row} * of.tiles] = total;
  }
}

template <Feature kFeature, bool kVectors, class T, class A = Accumulate<T>>
__global__ void __launch_bounds__(kTileWarps* kWarp, 1)
    keys_backward_kernel(HeadTiles of,
                         const T* __restrict__ logits,     // [B, 2 H d, N]
                         const T* __restrict__ reached,    // [B, H R, N]
                         const A* __restrict__ grad_sums,  // [B, H R]
                         Row<T>* __restrict__ rows) {      // [B, H (R + 2 d), N]
  constexpr int V = kLaneTokens<T>, kUnit = kFeature == Feature::kL2;
  AIA_SHARED(A, shared, kTileWarps * V * kWarp);
  AIA_SHARED(A, shared_along, kTileWarps * V * kWarp);
  const HeadPlace at(of);
  const auto tokens = at.tokens<T, kVectors>(of);
  const T* const z = logits + at.logits(of, false);
  reached += (at.head * of.R + kUnit) * of.N;
  grad_sums += at.head * of.R + kUnit;
  rows += at.gradients(of, false);
  const auto gradient_of = [&](int r) {
    auto grad = tokens.load(reached + r * of.N);
#pragma unroll
    for (int k = 0; k < V; ++k) grad.at[k] += grad_sums[r];
    return grad;
  };
  const Vector<A, V> scale = scale_of<kFeature>(of, at, tokens, z, shared);
  Sums<A, 1> along[V];
  if constexpr (kUnit != 0) {
#pragma unroll
    for (int k = 0; k < V; ++k) along[k] = Sums<A, 1>::none();
#pragma unroll 4
    for (int r = at.row; r < of.d; r += of.warps) {
      const auto values = tokens.load(z + r * of.N), grad = gradient_of(r);
#pragma unroll
      for (int k = 0; k < V; ++k) along[k].at[0] += values.at[k] * scale.at[k] * grad.at[k];
    }
    join_warps(reinterpret_cast<Sums<A, 1>*>(shared_along), of.warps, along);
  }
  for (int r = at.row; r < of.d; r += of.warps) {
    const auto values = tokens.load(z + r * of.N);
    auto grad = gradient_of(r);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if constexpr (kUnit != 0)
        grad.at[k] = (grad.at[k] - values.at[k] * scale.at[k] * along[k].at[0]) * scale.at[k];
      else
        grad.at[k] *= sigmoid(values.at[k]);
      if (!tokens.shown(k)) grad.at[k] = 0;
    }
    tokens.store(rows + r * of.N, grad);
  }
}

// Calls body with the feature map, which is of each token alone, as a constant.
template <class Body>
int with_feature(Feature feature, Body&& body) {
  return feature == Feature::kL2 ? body(std::integral_constant<Feature, Feature::kL2>{})
                                 : body(std::integral_constant<Feature, Feature::kSoftplus>{});
}

int64_t sums_of_tiles(const Memory& at) {
  const int tiles = HeadTiles(at).tiles;
  return tiles > 1 ? at.heads() * at.R() * tiles : 0;
}

}  // namespace

int64_t memory_keys_partials(const Memory& at, bool known) {
  return at.feature == Feature::kSoftmax ? softmax_partials(at, known) : sums_of_tiles(at);
}

int memory_keys(const Memory& at, const void* logits, const void* statistics, void* rows, int64_t pitch, void* partial,
                void* sums, void* stream) {
  if (at.feature == Feature::kSoftmax)
    return softmax_over_tokens(at, logits, statistics, rows, pitch, partial, sums, stream);
  const HeadTiles tiles(at);
  void* const to = tiles.tiles > 1 ? partial : sums;
  const int error = with_rows(at, {logits, rows}, [&](auto type, auto vectors) {
    using T = decltype(type);
    return with_feature(at.feature, [&](auto feature) {
      return tiles.queue(at, keys_kernel<feature.value, vectors.value, T>, stream, pitch, static_cast<const T*>(logits),
                         static_cast<Row<T>*>(rows), static_cast<Accumulate<T>*>(to));
    });
  });
  if (error != 0 || tiles.tiles == 1) return error;
  return join_parts(at.scalar, at.heads() * at.R(), tiles.tiles, partial, sums, 0, nullptr, nullptr, stream);
}

int64_t memory_keys_backward_partials(const Memory& at, bool known) {
  return at.feature == Feature::kSoftmax && !known ? softmax_backward_partials(at) : 0;
}

int memory_keys_backward(const Memory& at, const void* logits, const void* reached, const void* grad_sums,
                         const void* reduced, void* rows, void* partial, void* stream) {
  if (at.feature == Feature::kSoftmax)
    return softmax_over_tokens_backward(at, reached, grad_sums, reduced, rows, partial, stream);
  return with_rows(at, {logits, reached, rows}, [&](auto type, auto vectors) {
    using T = decltype(type);
    return with_feature(at.feature, [&](auto feature) {
      return HeadTiles(at).queue(at, keys_backward_kernel<feature.value, vectors.value, T>, stream,
                                 static_cast<const T*>(logits), static_cast<const T*>(reached),
                                 static_cast<const Accumulate<T>*>(grad_sums), static_cast<Row<T>*>(rows));
    });
  });
}

}  // namespace aia::cuda
