// The batch norm of external attention's block, folded into V (aia_kernels/schemas.py has the equations). No x-sized
// traffic: what torch would do in some fifty small operators.
//
//   fold        one launch    mean and variance of z = A V^T by the moments of A; V and the shift that follow
//   fold_sums   one launch    what a process group sums
//   fold_back   one launch    the gradient of V, and what the gradient of A gains
//
// A block has kRows channels, whose rows of V meet all of the second moment, so that each of its elements serves them
// all.
#include "fold.h"

#include "../common/norm.h"
#include "teams.cuh"
#include "vector.cuh"

namespace aia::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRows = kWarps;  // a warp for each where a row is summed
constexpr int kStaged = 64;    // columns of V that lie in shared memory at a time
constexpr int kTile = 16;      // rows and columns of a tile of inner

// A number of a parameter, or its default where that is absent.
template <class A>
__device__ __forceinline__ A number_of(const Parameter& p, int i, A otherwise) {
  return p.data ? read<A>(p, i) : otherwise;
}

// Rows of V.
template <class T, class A>
struct Values {
  const T* value;  // [C, M]
  int C, M;

  // 0 beyond the last row or column.
  __device__ __forceinline__ A at(int c, int j) const {
    return c < C && j < M ? static_cast<A>(widen(value[static_cast<int64_t>(c) * M + j])) : A(0);
  }
  // The dot product with numbers [M], of the whole warp.
  __device__ __forceinline__ A dot(int c, const A* numbers) const {
    A sum = 0;
    if (c < C)
      for (int j = threadIdx.x % kWarp; j < M; j += kWarp) sum += at(c, j) * numbers[j];
    return team_sum(sum, kWarp);
  }
};

// The threads of a block beside one another along the columns, a power of two of them, and the slices that they make.
struct Across {
  int columns, slices;

  explicit Across(int M) : columns(std::clamp(1 << bits_of(M), kWarp, kThreads)), slices(kThreads / columns) {}
};

// Calls body(j, products) for the columns j of a thread, kRows products of rows from c on with column j of the second
// moment. They are the part of a slice, over its rows of that: what the slices have is to be added up.
template <class T, class A, class Body>
__device__ __forceinline__ void times_second(const Values<T, A>& v, int c, const A* second, const Across& across,
                                             A* staged, Body&& body) {
  const int slice = threadIdx.x / across.columns, column = threadIdx.x % across.columns;
  for (int first = 0; first < v.M; first += across.columns) {
    const int j = first + column;
    A products[kRows] = {};
    for (int i0 = 0; i0 < v.M; i0 += kStaged) {
      __syncthreads();
      for (int e = threadIdx.x; e < kStaged * kRows; e += kThreads)
        staged[e % kStaged * kRows + e / kStaged] = v.at(c + e / kStaged, i0 + e % kStaged);
      __syncthreads();
      const int last = min(kStaged, v.M - i0);
      if (j < v.M) {
#pragma unroll 4
        for (int i = slice; i < last; i += across.slices) {
          const A s = second[static_cast<int64_t>(i0 + i) * v.M + j];
          const auto rows = load_vector<kRows>(staged + i * kRows);
#pragma unroll
          for (int r = 0; r < kRows; ++r) products[r] += rows.at[r] * s;
        }
      }
    }
    body(j, products);
  }
}

// The batch norm: its parameters, which may be absent, fixed statistics, eps, and the share of a token in the batch.
template <class A>
struct BatchNorm {
  Parameter weight, bias, mean, var;
  A eps, share;
};

template <class T, class A = Accumulate<T>>
__global__ void __launch_bounds__(kThreads, 1) fold_kernel(Values<T, A> v, BatchNorm<A> norm, Across across,
                                                           const A* __restrict__ origin,  // [M], or null
                                                           const A* __restrict__ total,   // [M]
                                                           const A* __restrict__ second,  // [M, M]
                                                           T* __restrict__ folded,        // [C, M]
                                                           A* __restrict__ shift,         // [C]
                                                           A* __restrict__ statistics,    // [C, 3]
                                                           A* __restrict__ off) {         // [M]
  AIA_SHARED(A, staged, kStaged * kRows);
  AIA_SHARED(A, squares, kWarps * kRows);
  AIA_SHARED(A, factors, kRows);
  const int c0 = blockIdx.x * kRows, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  A sums[kRows] = {};
  if (origin) {
    times_second(v, c0, second, across, staged, [&](int j, const A(&products)[kRows]) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r] += products[r] * v.at(c0 + r, j);
    });
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const A sum = team_sum(sums[r], kWarp);
    if (lane == 0) squares[warp * kRows + r] = sum;
  }
  const int c = c0 + warp;
  const A mean_off = origin ? v.dot(c, total) * norm.share : A(0), at_origin = origin ? v.dot(c, origin) : A(0);
  __syncthreads();
  if (lane == 0 && c < v.C) {
    A m = at_origin + mean_off, variance = 0;
    if (origin) {
      for (int k = 0; k < kWarps; ++k) variance += squares[k * kRows + warp];
      variance = variance * norm.share - mean_off * mean_off;
      if (variance < 0) variance = 0;  // NaN stays
    } else {
      m = read<A>(norm.mean, c), variance = read<A>(norm.var, c);
    }
    const A factor = number_of<A>(norm.weight, c, 1) / std::sqrt(variance + norm.eps);
    shift[c] = number_of<A>(norm.bias, c, 0) - m * factor;
    statistics[3 * c] = m, statistics[3 * c + 1] = variance, statistics[3 * c + 2] = origin ? norm.share : A(0);
    factors[warp] = factor;
  }
  __syncthreads();
  for (int r = 0; r < kRows && c0 + r < v.C; ++r)
    for (int j = threadIdx.x; j < v.M; j += kThreads)
      folded[static_cast<int64_t>(c0 + r) * v.M + j] = narrow<T>(factors[r] * v.at(c0 + r, j));
  if (origin && blockIdx.x == 0)
    for (int j = threadIdx.x; j < v.M; j += kThreads) off[j] = total[j] * norm.share;
}

template <class T, class A = Accumulate<T>>
__global__ void __launch_bounds__(kThreads, 1) fold_sums_kernel(Values<T, A> v, A eps,
                                                                const A* __restrict__ statistics,  // [C, 3]
                                                                const A* __restrict__ off,         // [M], or null
                                                                const A* __restrict__ product,     // [C, M]
                                                                const A* __restrict__ sums,        // [C]
                                                                A* __restrict__ joint,             // [2, C]
                                                                A* __restrict__ center) {          // [C]
  const int c = blockIdx.x * kRows + threadIdx.x / kWarp;
  const A* const row = product + static_cast<int64_t>(min(c, v.C - 1)) * v.M;
  const A along = v.dot(c, row), off_center = off ? v.dot(c, off) : A(0);
  if (threadIdx.x % kWarp != 0 || c >= v.C) return;
  const A middle = off ? off_center : statistics[3 * c];
  joint[c] = sums[c];
  joint[v.C + c] = (along - middle * sums[c]) / std::sqrt(statistics[3 * c + 1] + eps);
  center[c] = middle;
}

// What the batch norm of a channel does to the gradient behind it: dz = factor * (g - mean - (z - center) * slope).
template <class A>
struct Through {
  A factor, mean, slope, center;
};

template <class A>
struct Channels {
  Parameter weight;
  A eps;
  const A *statistics, *joint, *center;  // [C, 3], [2, C], [C]
  int C;

  __device__ __forceinline__ Through<A> at(int c) const {
    const A rstd = A(1) / std::sqrt(statistics[3 * c + 1] + eps), share = statistics[3 * c + 2];
    return {number_of<A>(weight, c, 1) * rstd, joint[c] * share, rstd * joint[C + c] * share, center[c]};
  }
};

// The gradient of kRows rows of V.
template <class T, class A>
__device__ __forceinline__ void rows_back(const Values<T, A>& v, const Channels<A>& channels, const Across& across,
                                          int c0, const A* total, const A* second, const A* product, T* grad,
                                          T* folded) {
  AIA_SHARED(A, staged, kStaged * kRows);
  AIA_SHARED(A, parts, kThreads * kRows);
  const auto store = [&](int j, const A* products) {
    for (int r = 0; r < kRows && c0 + r < v.C; ++r) {
      const int64_t e = static_cast<int64_t>(c0 + r) * v.M + j;
      const Through<A> of = channels.at(c0 + r);
      A found = product[e];
      if (products) found -= of.mean * total[j] + of.slope * (products[r] - of.center * total[j]);
      grad[e] = narrow<T>(of.factor * found);
      folded[e] = narrow<T>(of.factor * v.at(c0 + r, j));
    }
  };
  if (!second) {
    for (int j = threadIdx.x; j < v.M; j += kThreads) store(j, nullptr);
    return;
  }
  times_second(v, c0, second, across, staged, [&](int j, A(&products)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) parts[threadIdx.x * kRows + r] = products[r];
    __syncthreads();
    if (threadIdx.x >= across.columns || j >= v.M) return;
    for (int k = 1; k < across.slices; ++k)
#pragma unroll
      for (int r = 0; r < kRows; ++r) products[r] += parts[(k * across.columns + threadIdx.x) * kRows + r];
    store(j, products);
  });
}

// A tile of inner = -V^T diag(factor * slope) V and, beside its first row of tiles, of constant.
template <class T, class A>
__device__ __forceinline__ void tile_back(const Values<T, A>& v, const Channels<A>& channels, int i0, int j0, A* inner,
                                          A* constant) {
  constexpr int kChannels = 32;
  AIA_SHARED(A, left, kChannels * kTile);
  AIA_SHARED(A, right, kChannels * kTile);
  AIA_SHARED(A, constants, kChannels);
  const int i = threadIdx.x / kTile, j = threadIdx.x % kTile;
  A sum = 0, of_constant = 0;
  for (int c0 = 0; c0 < v.C; c0 += kChannels) {
    __syncthreads();
    for (int e = threadIdx.x; e < kChannels * kTile; e += kThreads) {
      const int k = e / kTile, c = c0 + k, column = e % kTile;
      const Through<A> of = c < v.C ? channels.at(c) : Through<A>{};
      left[e] = -of.factor * of.slope * v.at(c, i0 + column);
      right[e] = v.at(c, j0 + column);
      if (column == 0) constants[k] = of.factor * (of.slope * of.center - of.mean);
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kChannels; ++k) sum += left[k * kTile + i] * right[k * kTile + j];
    if (i0 == 0)  // every sixteenth channel
#pragma unroll
      for (int k = 0; k < kChannels; k += kTile) of_constant += constants[k + i] * right[(k + i) * kTile + j];
  }
  if (i0 + i < v.M && j0 + j < v.M) inner[static_cast<int64_t>(i0 + i) * v.M + j0 + j] = sum;
  if (i0 != 0) return;
  __syncthreads();
  left[threadIdx.x] = of_constant;
  __syncthreads();
  if (i != 0 || j0 + j >= v.M) return;
  for (int k = 1; k < kTile; ++k) of_constant += left[k * kTile + j];
  constant[j0 + j] = of_constant;
}

template <class T, class A = Accumulate<T>>
__global__ void __launch_bounds__(kThreads, 1) fold_back_kernel(Values<T, A> v, Channels<A> channels, Across across,
                                                                const A* __restrict__ total,    // [M], or null
                                                                const A* __restrict__ second,   // [M, M], or null
                                                                const A* __restrict__ product,  // [C, M]
                                                                T* __restrict__ grad,           // [C, M]
                                                                T* __restrict__ folded,         // [C, M]
                                                                A* __restrict__ inner,          // [M, M]
                                                                A* __restrict__ constant) {     // [M]
  const int rows = (v.C + kRows - 1) / kRows, block = blockIdx.x, tiles = (v.M + kTile - 1) / kTile;
  if (block < rows)
    rows_back(v, channels, across, block * kRows, total, second, product, grad, folded);
  else
    tile_back(v, channels, (block - rows) / tiles * kTile, (block - rows) % tiles * kTile, inner, constant);
}

template <class T, class A = Accumulate<T>>
Values<T, A> values_of(const Folding& at, const void* value) {
  return {static_cast<const T*>(value), at.C, at.M};
}

}  // namespace

int fold(const Folding& at, const void* value, Parameter weight, Parameter bias, const BatchSums& sums, double count,
         Parameter mean, Parameter var, const Folded& to, void* stream) {
  return with_scalar(at.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const BatchNorm<A> norm{weight, bias, mean, var, static_cast<A>(at.eps), static_cast<A>(1 / count)};
    return launch(fold_kernel<T>, ceil_div(at.C, kRows), kThreads, stream, values_of<T>(at, value), norm, Across(at.M),
                  static_cast<const A*>(sums.origin), static_cast<const A*>(sums.total),
                  static_cast<const A*>(sums.second), static_cast<T*>(to.value), static_cast<A*>(to.shift),
                  static_cast<A*>(to.statistics), static_cast<A*>(to.off));
  });
}

int fold_sums(const Folding& at, const FoldKept& kept, const void* product, const void* sums, void* joint, void* center,
              void* stream) {
  return with_scalar(at.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    return launch(fold_sums_kernel<T>, ceil_div(at.C, kRows), kThreads, stream, values_of<T>(at, kept.value),
                  static_cast<A>(at.eps), static_cast<const A*>(kept.statistics), static_cast<const A*>(kept.off),
                  static_cast<const A*>(product), static_cast<const A*>(sums), static_cast<A*>(joint),
                  static_cast<A*>(center));
  });
}

int fold_back(const Folding& at, const FoldKept& kept, Parameter weight, const void* product, const void* joint,
              const void* center, const FoldGradients& to, void* stream) {
  const int tiles = kept.off ? ceil_div(at.M, kTile) : 0;
  const int64_t blocks = ceil_div(at.C, kRows) + int64_t{tiles} * tiles;
  return with_scalar(at.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const Channels<A> channels{weight,
                               static_cast<A>(at.eps),
                               static_cast<const A*>(kept.statistics),
                               static_cast<const A*>(joint),
                               static_cast<const A*>(center),
                               at.C};
    return launch(fold_back_kernel<T>, blocks, kThreads, stream, values_of<T>(at, kept.value), channels, Across(at.M),
                  static_cast<const A*>(kept.total), static_cast<const A*>(kept.second), static_cast<const A*>(product),
                  static_cast<T*>(to.value), static_cast<T*>(to.folded), static_cast<A*>(to.inner),
                  static_cast<A*>(to.constant));
  });
}

}  // namespace aia::cuda
