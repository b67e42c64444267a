// A softmax over the tokens of each key, forward and backward: rows that do not know one another, a warp for each. It
// takes two launches, as the sums over tokens come first; of strips of tokens, which the second launch joins.
//
//   statistics_kernel         reads the keys          writes the maximum and the sum of exponentials of each strip
//   softmax_kernel            reads the keys          writes phi(k), and its sums
//   reduced_kernel            reads phi(k), P         writes the sum of phi(k) times its gradient of each strip
//   softmax_backward_kernel   reads phi(k), P         writes the gradient of keys
//
// Where the tokens are shards of a process group, what the first launch makes is given, of all of them together.
#include "memory_softmax.h"

#include "memory_tiles.cuh"

namespace aia::cuda {
namespace {

constexpr int kSteps = 4;  // vectors that a lane asks for before it uses the first
constexpr int kMostStrips = 128;

template <class T>
constexpr int kBlockTokens = kSteps * kTileTokens<T>;

// A launch with a block for each strip of so many tokens and as many rows as it has warps.
struct Strips {
  int64_t N;
  int M, groups, warps, length, count;  // M rows of a sample, in groups of warps; strips of a row
  const uint8_t* padding;               // [B, N], or null

  // The whole strips of a launch that sums over them; else of the tokens that a warp asks for at once.
  Strips(const Memory& at, bool joined)
      : N(at.N),
        M(static_cast<int>(at.H * at.d)),
        groups(ceil_div(M, std::min(M, kTileWarps))),
        warps(std::min(M, kTileWarps)),
        length(kSteps * tile_tokens(at.scalar)),
        padding(at.padding) {
    if (joined) length *= ceil_div(ceil_div(N, length), kMostStrips);
    count = ceil_div(N, length);
  }

  template <class... Parameters>
  int queue(const Memory& at, void (*kernel)(Strips, Parameters...), void* stream,
            std::type_identity_t<Parameters>... parameters) const {
    return launch(kernel, at.B * groups * count, warps * kWarp, stream, *this, parameters...);
  }
};

// Where a thread of it stands: its row, and among those of all samples.
struct StripPlace {
  int64_t b, first, last;
  int row, strip, lane;
  bool exists;

  explicit __device__ __forceinline__ StripPlace(const Strips& of) {
    strip = blockIdx.x % of.count;
    const int group = blockIdx.x / of.count % of.groups;
    b = blockIdx.x / of.count / of.groups;
    row = group * of.warps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    exists = row < of.M;
    first = int64_t{strip} * of.length, last = min(of.N, first + of.length);
  }
  __device__ __forceinline__ int64_t of_all(const Strips& of) const { return b * of.M + row; }
  template <class T, bool kVectors>
  __device__ __forceinline__ LaneTokens<kLaneTokens<T>, kVectors> tokens(const Strips& of, int64_t from) const {
    return {from, static_cast<int>(of.N), of.padding ? of.padding + b * of.N : nullptr};
  }
};

template <bool kVectors, class T, class A = Accumulate<T>>
__global__ void __launch_bounds__(kTileWarps* kWarp, 1)
    statistics_kernel(Strips of,
                      const T* __restrict__ logits,  // [B, 2 M, N]
                      A* __restrict__ partial) {     // [B, 2, M, count]
  constexpr int V = kLaneTokens<T>;
  const StripPlace at(of);
  logits += (at.b * 2 * of.M + at.row) * of.N;
  auto mine = Statistics<A>::none();
  for (int64_t n = at.first; n < at.last; n += kBlockTokens<T>) {
    Vector<A, V> z[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      z[i] = at.tokens<T, kVectors>(of, n + i * kTileTokens<T>).load(logits, at.exists, lowest<A>());
    A highest = lowest<A>();
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int k = 0; k < V; ++k) highest = z[i].at[k] > highest ? z[i].at[k] : highest;
    mine.raise(highest);
    const A origin = Statistics<A>::origin(mine.maximum);
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int k = 0; k < V; ++k) mine.sum += std::exp(z[i].at[k] - origin);
  }
  const A maximum = team_maximum(mine.maximum, kWarp);
  const A sum = team_sum(mine.sum * std::exp(mine.maximum - Statistics<A>::origin(maximum)), kWarp);
  if (!at.exists || at.lane != 0) return;
  partial += (at.b * 2 * of.M + at.row) * of.count + at.strip;
  partial[0] = maximum;
  partial[int64_t{of.M} * of.count] = sum;
}

template <bool kVectors, class T, class A = Accumulate<T>>
__global__ void __launch_bounds__(kTileWarps* kWarp, 1)
    softmax_kernel(Strips of, int64_t pitch,
                   const T* __restrict__ logits,  // [B, 2 M, N]
                   int parts,
                   const A* __restrict__ statistics,  // [B, 2, M, parts]
                   Row<T>* __restrict__ rows,         // [B, pitch, N]
                   A* __restrict__ sums,              // [B, M], or null
                   A* __restrict__ partial) {         // [B, M, count], or null
  constexpr int V = kLaneTokens<T>;
  const StripPlace at(of);
  Vector<A, V> v[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
    v[i] = at.tokens<T, kVectors>(of, at.first + i * kTileTokens<T>)
               .load(logits + (at.b * 2 * of.M + at.row) * of.N, at.exists);
  statistics += (at.b * 2 * of.M + at.row) * parts;
  A maximum = lowest<A>(), total = 0;
  for (int i = at.lane; at.exists && i < parts; i += kWarp) maximum = statistics[i] > maximum ? statistics[i] : maximum;
  const A origin = Statistics<A>::origin(team_maximum(maximum, kWarp));
  for (int i = at.lane; at.exists && i < parts; i += kWarp)
    total += statistics[int64_t{of.M} * parts + i] * std::exp(statistics[i] - origin);
  total = team_sum(total, kWarp);
  const A factor = A(1) / no_zero(total);
  A here = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const auto tokens = at.tokens<T, kVectors>(of, at.first + i * kTileTokens<T>);
#pragma unroll
    for (int k = 0; k < V; ++k) v[i].at[k] = tokens.shown(k) ? std::exp(v[i].at[k] - origin) * factor : A(0);
    here += tokens.sum(v[i]);
    tokens.store(rows + (at.b * pitch + at.row) * of.N, v[i], at.exists);
  }
  if (!at.exists || at.lane != 0) return;
  if (partial) partial[at.of_all(of) * of.count + at.strip] = here;
  if (sums && at.strip == 0) sums[at.of_all(of)] = total * factor;
}

template <bool kVectors, class T, class A = Accumulate<T>>
__global__ void __launch_bounds__(kTileWarps* kWarp, 1) reduced_kernel(Strips of,
                                                                       const Row<T>* __restrict__ rows,  // [B, 3 M, N]
                                                                       const T* __restrict__ reached,    // [B, M, N]
                                                                       const A* __restrict__ grad_sums,  // [B, M]
                                                                       A* __restrict__ partial) {  // [B, M, count]
  constexpr int V = kLaneTokens<T>;
  const StripPlace at(of);
  const A grad_sum = at.exists ? grad_sums[at.of_all(of)] : A(0);
  A sum = 0;
  for (int64_t n = at.first; n < at.last; n += kBlockTokens<T>) {
    Vector<A, V> phi[kSteps], grad[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const auto tokens = at.tokens<T, kVectors>(of, n + i * kTileTokens<T>);
      phi[i] = tokens.load(rows + (at.b * 3 * of.M + at.row) * of.N, at.exists);
      grad[i] = tokens.load(reached + at.of_all(of) * of.N, at.exists);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int k = 0; k < V; ++k) sum += phi[i].at[k] * (grad[i].at[k] + grad_sum);
  }
  sum = team_sum(sum, kWarp);
  if (at.exists && at.lane == 0) partial[at.of_all(of) * of.count + at.strip] = sum;
}

template <bool kVectors, class T, class A = Accumulate<T>>
__global__ void __launch_bounds__(kTileWarps* kWarp, 1)
    softmax_backward_kernel(Strips of,
                            const T* __restrict__ reached,    // [B, M, N]
                            const A* __restrict__ grad_sums,  // [B, M]
                            int parts,
                            const A* __restrict__ reduced,  // [B, M, parts]
                            Row<T>* rows) {                 // [B, 3 M, N]: phi(k), then the gradient of keys
  constexpr int V = kLaneTokens<T>;
  const StripPlace at(of);
  const Row<T>* const of_phi = rows + (at.b * 3 * of.M + at.row) * of.N;
  Vector<A, V> phi[kSteps], grad[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const auto tokens = at.tokens<T, kVectors>(of, at.first + i * kTileTokens<T>);
    phi[i] = tokens.load(of_phi, at.exists);
    grad[i] = tokens.load(reached + at.of_all(of) * of.N, at.exists);
  }
  A along = 0;
  for (int i = at.lane; at.exists && i < parts; i += kWarp) along += reduced[at.of_all(of) * parts + i];
  const A shift = (at.exists ? grad_sums[at.of_all(of)] : A(0)) - team_sum(along, kWarp);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int k = 0; k < V; ++k) grad[i].at[k] = phi[i].at[k] * (grad[i].at[k] + shift);
    at.tokens<T, kVectors>(of, at.first + i * kTileTokens<T>)
        .store(rows + ((at.b * 3 + 1) * of.M + at.row) * of.N, grad[i], at.exists);
  }
}

}  // namespace

int64_t softmax_partials(const Memory& at, bool known) {
  if (!known) return at.B * 2 * at.H * at.d * Strips(at, true).count;
  const int parts = Strips(at, false).count;
  return parts > 1 ? at.B * at.H * at.d * parts : 0;
}

int softmax_over_tokens(const Memory& at, const void* logits, const void* statistics, void* rows, int64_t pitch,
                        void* partial, void* sums, void* stream) {
  const Strips joined(at, true), strips(at, false);
  return with_rows(at, {logits, rows}, [&](auto type, auto vectors) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const T* const keys = static_cast<const T*>(logits);
    Row<T>* const phi = static_cast<Row<T>*>(rows);
    A *const parts = static_cast<A*>(partial), *const whole = static_cast<A*>(sums);
    const auto kernel = softmax_kernel<vectors.value, T>;
    if (!statistics) {
      const int error = joined.queue(at, statistics_kernel<vectors.value, T>, stream, keys, parts);
      if (error != 0) return error;
      return strips.queue(at, kernel, stream, pitch, keys, joined.count, parts, phi, whole, nullptr);
    }
    A* const of_strips = strips.count > 1 ? parts : whole;
    const int error =
        strips.queue(at, kernel, stream, pitch, keys, 1, static_cast<const A*>(statistics), phi, nullptr, of_strips);
    if (error != 0 || strips.count == 1) return error;
    return join_parts(at.scalar, at.B * strips.M, strips.count, parts, sums, 0, nullptr, nullptr, stream);
  });
}

int64_t softmax_backward_partials(const Memory& at) { return at.B * at.H * at.d * Strips(at, true).count; }

int softmax_over_tokens_backward(const Memory& at, const void* reached, const void* grad_sums, const void* reduced,
                                 void* rows, void* partial, void* stream) {
  const Strips joined(at, true), strips(at, false);
  return with_rows(at, {reached, rows}, [&](auto type, auto vectors) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const T* const grad = static_cast<const T*>(reached);
    Row<T>* const phi = static_cast<Row<T>*>(rows);
    const A* const of_sums = static_cast<const A*>(grad_sums);
    if (!reduced) {
      const int error =
          joined.queue(at, reduced_kernel<vectors.value, T>, stream, phi, grad, of_sums, static_cast<A*>(partial));
      if (error != 0) return error;
    }
    return strips.queue(at, softmax_backward_kernel<vectors.value, T>, stream, grad, of_sums,
                        reduced ? 1 : joined.count, static_cast<const A*>(reduced ? reduced : partial), phi);
  });
}

}  // namespace aia::cuda
