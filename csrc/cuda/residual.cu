// The end of external attention's block (aia_kernels/schemas.py has the equations).
//
//   residual_relu_          reads 2 |X|, writes 1 |X|   relu(z + shift + x), and its signs
//   residual_relu_backward  reads 1 |X|, writes 1 |X|   the gradient where the sign is set, and its sums per feature
//
// A thread has whole bytes of signs, eight elements in the order of storage.
#include "residual.h"

#include "columns.cuh"
#include "teams.cuh"

namespace aia::cuda {
namespace {

constexpr int kThreads = 256, kByte = 8;
constexpr int kBatch = 4;  // vectors that a thread asks for before it uses the first

// The quotient and, left in n, the rest.
__device__ __forceinline__ int64_t divide(int64_t& n, const Divisor& by) {
  if (n <= INT32_MAX) {
    int rest = static_cast<int>(n);
    const int quotient = by.divide(rest);
    n = rest;
    return quotient;
  }
  const int64_t quotient = n / by.divisor;
  n -= quotient * by.divisor;
  return quotient;
}

// What is added to the elements of a feature, if anything is.
template <class A>
struct Shift {
  const A* shift;  // [C], or null
  Divisor by_c, by_n;
  bool maps, in_vectors;

  Shift(const Features& f, const void* shift)
      : shift(static_cast<const A*>(shift)),
        by_c(static_cast<int>(f.C)),
        by_n(static_cast<int>(f.N)),
        maps(f.maps),
        in_vectors(!f.maps && f.C % kByte == 0 && are_aligned({shift})) {}

  // For eight elements from e on.
  __device__ __forceinline__ Vector<A, kByte> at(int64_t e) const {
    Vector<A, kByte> values{};
    if (shift == nullptr) return values;
    int64_t n = 0, c = e;
    if (maps) {
      n = e;
      c = divide(n, by_n);
    }
    divide(c, by_c);
    if (in_vectors) return load_vector<kByte>(shift + c);
#pragma unroll
    for (int k = 0; k < kByte; ++k) {
      values.at[k] = shift[c];
      if (maps && ++n < by_n.divisor) continue;
      n = 0;
      c = c + 1 < by_c.divisor ? c + 1 : 0;
    }
    return values;
  }
};

template <bool kVectors, class T>
using Held = std::conditional_t<kVectors, Words<T, kByte>, Vector<T, kByte>>;

// Eight elements, of which `count` exist.
template <bool kVectors, class T>
__device__ __forceinline__ Held<kVectors, T> load_byte(const T* from, int count) {
  if (kVectors && count >= kByte) return *reinterpret_cast<const Held<kVectors, T>*>(from);
  Vector<T, kByte> values{};
#pragma unroll
  for (int k = 0; k < kByte; ++k)
    if (k < count) values.at[k] = from[k];
  return bits_as<Held<kVectors, T>>(values);
}

template <class T, bool kVectors, class A = Accumulate<T>>
__global__ void __launch_bounds__(kThreads, 1)
    residual_relu_kernel(int64_t numel,
                         T* __restrict__ z,        // [B, N, C] in the order of storage; becomes y
                         const T* __restrict__ x,  // as z
                         Shift<A> shift,
                         uint8_t* __restrict__ signs) {  // [ceil(numel / 8)], a bit per element
  constexpr int kBytes = sizeof(T) == 2 ? 2 : 1;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kBytes + threadIdx.x;
  Held<kVectors, T> held_a[kBytes], held_b[kBytes];
  int count[kBytes];
#pragma unroll
  for (int i = 0; i < kBytes; ++i) {
    const int64_t e = (first + i * kThreads) * kByte;
    count[i] = static_cast<int>(min(static_cast<int64_t>(kByte), numel - e));
    if (count[i] <= 0) continue;
    held_a[i] = load_byte<kVectors>(z + e, count[i]);
    held_b[i] = load_byte<kVectors>(x + e, count[i]);
  }
#pragma unroll
  for (int i = 0; i < kBytes; ++i) {
    if (count[i] <= 0) return;
    const int64_t byte = first + i * kThreads, e = byte * kByte;
    const auto added = shift.at(e);
    auto a = bits_as<Vector<T, kByte>>(held_a[i]);
    const auto b = bits_as<Vector<T, kByte>>(held_b[i]);
    int bits = 0;
#pragma unroll
    for (int k = 0; k < kByte; ++k) {
      const A total = widen(a.at[k]) + added.at[k] + widen(b.at[k]);
      const bool shown = !(total <= 0) && k < count[i];
      bits |= shown << k;
      a.at[k] = narrow<T>(shown ? total : A(0));
    }
    signs[byte] = static_cast<uint8_t>(bits);
    if (kVectors && count[i] == kByte) {
      store_vector(z + e, a);
    } else {
#pragma unroll
      for (int k = 0; k < kByte; ++k)
        if (k < count[i]) z[e + k] = a.at[k];
    }
  }
}

// The gradient at V elements from e on, all of one byte of signs; stored, and widened.
template <int V, class T, class A = Accumulate<T>>
__device__ __forceinline__ Vector<A, V> select(const Vector<T, V>& grad_y, int signs, T* grad, int64_t e) {
  Vector<T, V> kept;
  Vector<A, V> values;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const bool shown = signs >> ((e + k) % kByte) & 1;
    kept.at[k] = shown ? grad_y.at[k] : narrow<T>(A(0));
    values.at[k] = widen(kept.at[k]);
  }
  store_vector(grad + e, kept);
  return values;
}

// Token by token: columns are features.
template <class T, int V, class A = Accumulate<T>>
struct TokenOp {
  using Partial = Total<A>;
  const T* grad_y;       // [B * N, C]
  const uint8_t* signs;  // [ceil(B * N * C / 8)], a bit per element
  T* grad;               // [B * N, C]
  A* to;                 // [chunks, C]
  int C;

  __device__ __forceinline__ void accumulate(Partial* partial, const Place& at) const {
    if (!at.active) return;
    for (int64_t n = at.first + at.slice; n < at.last; n += kBatch * at.slices) {
      Vector<T, V> rows[kBatch];
      int bytes[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t token = n + i * at.slices, e = token * C + at.column;
        if (token < at.last) rows[i] = load_vector<V>(grad_y + e), bytes[i] = signs[e / kByte];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t token = n + i * at.slices;
        if (token >= at.last) break;
        const auto values = select(rows[i], bytes[i], grad, token * C + at.column);
#pragma unroll
        for (int k = 0; k < V; ++k) partial[k].sum += values.at[k];
      }
    }
  }
  __device__ __forceinline__ void store(const Place& at, int column, const Partial& total) const {
    to[at.chunk * static_cast<int64_t>(C) + column] = total.sum;
  }
};

// Of maps: a warp has a chunk of the N elements of a feature of a sample.
template <class T, int V, class A = Accumulate<T>>
__global__ void __launch_bounds__(kThreads, 1)
    map_kernel(Features f, Split split,
               const T* __restrict__ grad_y,       // [B, C, N]
               const uint8_t* __restrict__ signs,  // [ceil(B * C * N / 8)], a bit per element
               T* __restrict__ grad,               // [B, C, N]
               A* __restrict__ to) {               // [B, chunks, C]
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t row = item / split.chunks, chunk = item % split.chunks, step = kWarp * V;
  A sum = 0;
  if (row < f.B * f.C) {
    const int64_t last = min(f.N, (chunk + 1) * split.length);
    for (int64_t n = chunk * split.length + threadIdx.x % kWarp * V; n < last; n += kBatch * step) {
      Vector<T, V> parts[kBatch];
      int bytes[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t e = row * f.N + n + i * step;
        if (n + i * step < last) parts[i] = load_vector<V>(grad_y + e), bytes[i] = signs[e / kByte];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (n + i * step >= last) break;
        const auto values = select(parts[i], bytes[i], grad, row * f.N + n + i * step);
#pragma unroll
        for (int k = 0; k < V; ++k) sum += values.at[k];
      }
    }
  }
  sum = team_sum(sum, kWarp);
  if (row < f.B * f.C && threadIdx.x % kWarp == 0) to[(row / f.C * split.chunks + chunk) * f.C + row % f.C] = sum;
}

// Tokens, or the elements of a map, in chunks of whole bytes.
Split split_of(const Features& f) {
  constexpr int kLeast = 64, kLeastOfMap = 2048, kColumns = 512;
  if (!f.maps) return Split(f.B * f.N, ceil_div(f.C, kColumns), kLeast);
  Split split(f.N, ceil_div(f.B * f.C, kThreads / kWarp), kLeastOfMap);
  split.length = (split.length + kByte - 1) / kByte * kByte;
  split.chunks = ceil_div(f.N, split.length);
  return split;
}

}  // namespace

int residual_relu(const Features& f, void* z, const void* x, const void* shift, uint8_t* signs, void* stream) {
  return with_scalar(f.scalar, [&](auto type) {
    using T = decltype(type);
    constexpr int kBytes = sizeof(T) == 2 ? 2 : 1;
    const auto run = [&](auto kernel) {
      const int64_t elements = int64_t{kThreads} * kBytes * kByte;
      return launch(kernel, (f.numel() + elements - 1) / elements, kThreads, stream, f.numel(), static_cast<T*>(z),
                    static_cast<const T*>(x), Shift<Accumulate<T>>(f, shift), signs);
    };
    return are_aligned({z, x}) ? run(residual_relu_kernel<T, true>) : run(residual_relu_kernel<T, false>);
  });
}

int64_t residual_partials(const Features& f) { return (f.maps ? f.B : 1) * split_of(f).chunks; }

int residual_relu_backward(const Features& f, const void* grad_y, const uint8_t* signs, void* grad, void* partial,
                           void* sums, void* stream) {
  return with_scalar(f.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const Split split = split_of(f);
    const int64_t rows = residual_partials(f);
    A* const to = static_cast<A*>(rows > 1 ? partial : sums);
    const T* const from = static_cast<const T*>(grad_y);
    T* const out = static_cast<T*>(grad);
    const int C = static_cast<int>(f.C);
    const auto run = [&](auto V) {
      if (f.maps) {
        const int64_t blocks = (f.B * f.C * split.chunks + kThreads / kWarp - 1) / (kThreads / kWarp);
        return launch(map_kernel<T, V.value>, blocks, kThreads, stream, f, split, from, signs, out, to);
      }
      const TokenOp<T, V.value> op{from, signs, out, to, C};
      return launch_columns<V.value>(op, 1, f.B * f.N, C, split, kColumnThreads / 4, stream);
    };
    const bool vectors = (f.maps ? f.N : f.C) % kByte == 0 && are_aligned({grad_y, grad});
    const int error = vectors ? run(std::integral_constant<int, kByte>{}) : run(std::integral_constant<int, 1>{});
    if (error != 0 || rows == 1) return error;
    return join_columns(JoinTotals<A>{to, static_cast<A*>(sums), rows, C}, 1, static_cast<int>(rows), C, stream);
  });
}

}  // namespace aia::cuda
