// CBAM's passes (aia_kernels/schemas.py has the equations).
//
//   cbam_pool_*              reads 1 |X|               maximum, its first index, and mean over one axis of x * gate
//   cbam_recalibrate         reads 1, writes 1 |X|     x times both gates; writes 2 |X| with the confounder
//   cbam_recalibrate_reduce  reads 2 |X|               sums of grad_y * x over either axis; 3 |X| with a confounder
//   cbam_unpool_reduce       reads 1 |X|               sums over positions of x * U
//   cbam_unpool              reads 1, writes 1 |X|     the gradient of x; reads 2 |X| with a confounder
//
// Threads lie along the columns of a sample (../common/matrix.h) and meet several rows at a time: what belongs to the
// columns is then loaded once for all of them, and several vectors of x are on their way.
#include "cbam.h"

#include "columns.cuh"
#include "max_mean.cuh"
#include "rows.cuh"

namespace aia::cuda {
namespace {

// Rows that a thread asks for before it uses the first: of elements that lie alone, twice as many.
template <int V>
constexpr int kBatch = V == 1 ? 8 : 4;

template <int V, class A>
__device__ __forceinline__ Vector<A, V> filled(A value) {
  Vector<A, V> values;
#pragma unroll
  for (int k = 0; k < V; ++k) values.at[k] = value;
  return values;
}

// Neighbours of a gate [B, n]; ones without it.
template <int V, class A>
__device__ __forceinline__ Vector<A, V> gate_at(const A* gate, int64_t n, int64_t b, int64_t i) {
  return gate ? load_vector<V>(gate + b * n + i) : filled<V>(A(1));
}

// What the pooled features of V rows or columns send back: that of the mean to every element, and that of the maximum
// to where it was.
template <class A, int V>
struct Sent {
  Vector<A, V> mean, peak;
  Vector<int32_t, V> argmax;

  // To the element at this place of the axis that was pooled.
  __device__ __forceinline__ A to(int k, int place) const {
    return mean.at[k] + (argmax.at[k] == place ? peak.at[k] : A(0));
  }
};

// A Side of an axis, n long; share: of an element of the pooled axis in its mean.
template <class A>
struct Axis {
  const A *gate, *grad;
  const int32_t* argmax;
  int64_t n;
  A share;

  Axis(const Side& side, int64_t n, int64_t pooled)
      : gate(static_cast<const A*>(side.gate)),
        grad(static_cast<const A*>(side.grad)),
        argmax(side.argmax),
        n(n),
        share(A(1) / static_cast<A>(pooled)) {}

  template <int V>
  __device__ __forceinline__ Vector<A, V> gates(int64_t b, int64_t i) const {
    return gate_at<V>(gate, n, b, i);
  }
  template <int V>
  __device__ __forceinline__ Sent<A, V> sent_if_any(int64_t b, int64_t i) const {
    if (grad) return sent<V>(b, i);
    return {filled<V>(A(0)), filled<V>(A(0)), filled<V>(int32_t{-1})};
  }
  template <int V>
  __device__ __forceinline__ Sent<A, V> sent(int64_t b, int64_t i) const {
    const A* const at_peak = grad + b * 2 * n + i;
    Sent<A, V> found{load_vector<V>(at_peak + n), load_vector<V>(at_peak), load_vector<V>(argmax + b * n + i)};
#pragma unroll
    for (int k = 0; k < V; ++k) found.mean.at[k] *= share;
    return found;
  }
};

// Calls each(c, loaded) for the columns c of a lane, with its vectors of kRows rows of x.
template <class T, int V, class Each>
__device__ __forceinline__ void for_columns(const T* x, int M, const RowPlace& at, Each&& each) {
  constexpr int kColumns = V == 1 ? 2 : 1;
  const T* row[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) row[r] = x + (at.b * at.rows + at.existing(r)) * M;
#pragma unroll 1
  for (int c = at.column; c < M; c += kColumns * at.step) {
    Vector<T, V> loaded[kColumns][kRows];
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (c + i * at.step < M) loaded[i][r] = load_vector<V>(row[r] + c + i * at.step);
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      if (c + i * at.step < M) each(c + i * at.step, loaded[i]);
  }
}

template <class T, int V, class A = Accumulate<T>>
struct PoolRowOp {
  static constexpr int kVector = V;
  using Partial = MaxMean<A>;
  const T* x;       // [B, rows, M]
  const A* gate;    // [B, M], or null
  A* pooled;        // [B, 2, rows]
  int32_t* argmax;  // [B, rows]
  A share;
  int M;

  __device__ __forceinline__ void accumulate(Partial* mine, const RowPlace& at) const {
    for_columns<T, V>(x, M, at, [&](int c, const Vector<T, V>* loaded) {
      const auto factors = gate_at<V>(gate, M, at.b, c);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int k = 0; k < V; ++k) mine[r].add(widen(loaded[r].at[k]) * factors.at[k], c + k);
    });
  }
  __device__ __forceinline__ void store(const RowPlace& at, int64_t row, const Partial& total) const {
    A* const maximum = pooled + at.b * 2 * at.rows + row;
    maximum[0] = total.max.value;
    maximum[at.rows] = total.sum * share;
    argmax[at.b * at.rows + row] = total.max.index;
  }
};

// Of x times what the columns send to a row.
template <class T, int V, class A = Accumulate<T>>
struct UnpoolRowOp {
  static constexpr int kVector = V;
  using Partial = Total<A>;
  const T* x;       // [B, rows, M]
  Axis<A> columns;  // M long
  A* sums;          // [B, rows]
  int M;

  __device__ __forceinline__ void accumulate(Partial* mine, const RowPlace& at) const {
    for_columns<T, V>(x, M, at, [&](int c, const Vector<T, V>* loaded) {
      const auto sent = columns.template sent<V>(at.b, c);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int k = 0; k < V; ++k) mine[r].sum += widen(loaded[r].at[k]) * sent.to(k, static_cast<int>(at.row) + r);
    });
  }
  __device__ __forceinline__ void store(const RowPlace& at, int64_t row, const Partial& total) const {
    sums[at.b * at.rows + row] = total.sum;
  }
};

// Calls each(row, loaded) for the rows of a thread.
template <class T, int V, class Each>
__device__ __forceinline__ void for_rows(const T* x, int64_t rows, int M, const Place& at, Each&& each) {
  const T* const start = x + at.b * rows * M + at.column;
#pragma unroll 1
  for (int64_t n = at.first + at.slice; n < at.last; n += kBatch<V> * at.slices) {
    Vector<T, V> loaded[kBatch<V>];
#pragma unroll
    for (int i = 0; i < kBatch<V>; ++i)
      if (n + i * at.slices < at.last) loaded[i] = load_vector<V>(start + (n + i * at.slices) * M);
#pragma unroll
    for (int i = 0; i < kBatch<V>; ++i)
      if (n + i * at.slices < at.last) each(n + i * at.slices, loaded[i]);
  }
}

// Pooled features in memory: [B, chunks, 2, M] and [B, chunks, M].
template <class A>
struct PooledColumns {
  A* pooled;
  int32_t* argmax;
  A share;
  int M;

  __device__ __forceinline__ void store(const Place& at, int column, const MaxMean<A>& total) const {
    const int64_t chunk = at.b * at.chunks + at.chunk;
    A* const maximum = pooled + chunk * 2 * M + column;
    maximum[0] = total.max.value;
    maximum[M] = total.sum * share;
    argmax[chunk * M + column] = total.max.index;
  }
};

template <class T, int V, class A = Accumulate<T>>
struct PoolColumnOp {
  using Partial = MaxMean<A>;
  const T* x;     // [B, rows, M]
  const A* gate;  // [B, rows], or null
  PooledColumns<A> to;
  int64_t rows;

  __device__ __forceinline__ void accumulate(Partial* partial, const Place& at) const {
    if (!at.active) return;
    for_rows<T, V>(x, rows, to.M, at, [&](int64_t row, const Vector<T, V>& loaded) {
      const A factor = gate ? gate[at.b * rows + row] : A(1);
#pragma unroll
      for (int k = 0; k < V; ++k) partial[k].add(widen(loaded.at[k]) * factor, static_cast<int>(row));
    });
  }
  __device__ __forceinline__ void store(const Place& at, int column, const Partial& total) const {
    to.store(at, column, total);
  }
};

template <class A>
struct JoinPooled {
  using Partial = MaxMean<A>;
  const A* from;           // [B, rows, 2, M]
  const int32_t* indices;  // [B, rows, M]
  PooledColumns<A> to;
  int64_t rows;

  __device__ __forceinline__ void accumulate(Partial* partial, const Place& at) const {
    if (!at.active) return;
    for (int64_t n = at.first + at.slice; n < at.last; n += at.slices) {
      const int64_t chunk = at.b * rows + n;
      const A* const maximum = from + chunk * 2 * to.M + at.column;
      partial->merge({{maximum[0], indices[chunk * to.M + at.column]}, maximum[to.M]});
    }
  }
  __device__ __forceinline__ void store(const Place& at, int column, const Partial& total) const {
    to.store(at, column, total);
  }
};

// Of x times what the rows send to a column.
template <class T, int V, class A = Accumulate<T>>
struct UnpoolColumnOp {
  using Partial = Total<A>;
  const T* x;    // [B, rows, M]
  Axis<A> rows;  // of each row
  A* to;         // [B, chunks, M]
  int M;

  __device__ __forceinline__ void accumulate(Partial* partial, const Place& at) const {
    if (!at.active) return;
    for_rows<T, V>(x, rows.n, M, at, [&](int64_t row, const Vector<T, V>& loaded) {
      const auto sent = rows.template sent<1>(at.b, row);
#pragma unroll
      for (int k = 0; k < V; ++k) partial[k].sum += widen(loaded.at[k]) * sent.to(0, at.column + k);
    });
  }
  __device__ __forceinline__ void store(const Place& at, int column, const Partial& total) const {
    to[(at.b * at.chunks + at.chunk) * M + column] = total.sum;
  }
};

// The gradient of y = x - confounder, or of y alone.
template <class T, int V, bool kConfounder>
struct Gradient {
  Vector<T, V> y, confounder;

  __device__ __forceinline__ void load(const T* grad_y, const T* grad_confounder, int64_t e) {
    y = load_vector<V>(grad_y + e);
    if constexpr (kConfounder) confounder = load_vector<V>(grad_confounder + e);
  }
  __device__ __forceinline__ Accumulate<T> of_confounder(int k) const {
    return kConfounder ? widen(confounder.at[k]) : Accumulate<T>(0);
  }
  __device__ __forceinline__ Accumulate<T> at(int k) const {
    return kConfounder ? widen(y.at[k]) - widen(confounder.at[k]) : widen(y.at[k]);
  }
};

// Both sums of q = grad * x. A team of lanes finds those over the columns of its tile.
template <class T, int V, bool kConfounder, class A = Accumulate<T>>
struct ReduceOp {
  using Partial = Total<A>;
  const T *grad_y, *x, *grad_confounder;  // [B, rows, M]
  const A *of_rows, *of_columns;          // [B, rows] and [B, M], or null
  A *over_columns, *over_rows;            // [B, tiles, rows] and [B, chunks, M]
  int64_t rows;
  int M, lanes, tiles;

  __device__ __forceinline__ void accumulate(Partial* partial, const Place& at) const {
    constexpr int kBatch = V == 1 ? 8 : 2;
    const int64_t sample = at.b * rows;
    A* const row_sums = over_columns + (at.b * tiles + at.tile) * rows;
    const auto factors = at.active ? gate_at<V>(of_columns, M, at.b, at.column) : filled<V>(A(0));
    // All threads of a warp come along: they meet in the sums of their teams.
#pragma unroll 1
    for (int64_t n = at.first; n < at.last; n += kBatch * at.slices) {
      Gradient<T, V, kConfounder> grad[kBatch];
      Vector<T, V> values[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t row = n + i * at.slices + at.slice, e = (sample + row) * M + at.column;
        if (!at.active || row >= at.last) continue;
        grad[i].load(grad_y, grad_confounder, e);
        values[i] = load_vector<V>(x + e);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t row = n + i * at.slices + at.slice;
        A sum = 0;
        if (at.active && row < at.last) {
          const A factor = of_rows ? of_rows[sample + row] : A(1);
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const A q = grad[i].at(k) * widen(values[i].at[k]);
            sum += q * factors.at[k];
            partial[k].sum += q * factor;
          }
        }
        sum = team_sum(sum, lanes);
        if (threadIdx.x % lanes == 0 && row < at.last) row_sums[row] = sum;
      }
    }
  }
  __device__ __forceinline__ void store(const Place& at, int column, const Partial& total) const {
    over_rows[(at.b * at.chunks + at.chunk) * M + column] = total.sum;
  }
};

// Passes that leave nothing to be joined.
template <int V, class Op>
__global__ void __launch_bounds__(kColumnThreads, 2)
    elements_kernel(Op op, int64_t rows, int M, int64_t length, int chunks, int across) {
  const Place at = place_of<V>(rows, M, length, chunks, across);
  if (at.active) op.apply(at);
}

template <class T, int V, class A = Accumulate<T>>
struct RecalibrateOp {
  const T* x;                     // [B, rows, M]
  T *y, *confounder;              // [B, rows, M]; the confounder may be null
  const A *of_rows, *of_columns;  // [B, rows] and [B, M], or null
  int64_t rows;
  int M;

  __device__ __forceinline__ void apply(const Place& at) const {
    const auto factors = gate_at<V>(of_columns, M, at.b, at.column);
    for_rows<T, V>(x, rows, M, at, [&](int64_t row, const Vector<T, V>& loaded) {
      const A factor = of_rows ? of_rows[at.b * rows + row] : A(1);
      const int64_t e = (at.b * rows + row) * M + at.column;
      Vector<T, V> product, rest;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const A value = widen(loaded.at[k]), scaled = value * (factors.at[k] * factor);
        product.at[k] = narrow<T>(scaled);
        rest.at[k] = narrow<T>(value - scaled);
      }
      store_vector(y + e, product);
      if (confounder) store_vector(confounder + e, rest);
    });
  }
};

template <class T, int V, bool kConfounder, class A = Accumulate<T>>
struct UnpoolOp {
  const T *grad_y, *grad_confounder;  // [B, rows, M]
  T* grad_x;                          // [B, rows, M]
  Axis<A> of_rows, of_columns;
  bool rows_are_channels;

  __device__ __forceinline__ void apply(const Place& at) const {
    constexpr int kBatch = kConfounder ? 2 : 4;  // each row brings numbers of its own, which take registers
    const int M = static_cast<int>(of_columns.n);
    const auto gates = of_columns.template gates<V>(at.b, at.column);
    const auto sent = of_columns.template sent_if_any<V>(at.b, at.column);
    // What the spatial features send back goes through the channel gate.
    Vector<A, V> behind = gates;
    if (rows_are_channels) behind = filled<V>(A(1));
    const int64_t sample = at.b * of_rows.n;
#pragma unroll 1
    for (int64_t n = at.first + at.slice; n < at.last; n += kBatch * at.slices) {
      Gradient<T, V, kConfounder> grad[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (n + i * at.slices < at.last)
          grad[i].load(grad_y, grad_confounder, (sample + n + i * at.slices) * M + at.column);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t row = n + i * at.slices;
        if (row >= at.last) break;
        const A gate = of_rows.template gates<1>(at.b, row).at[0], factor = rows_are_channels ? gate : A(1);
        const auto of_row = of_rows.template sent_if_any<1>(at.b, row);
        Vector<T, V> result;
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const A through = grad[i].at(k) * (gates.at[k] * gate) + sent.to(k, static_cast<int>(row)) * factor;
          result.at[k] = narrow<T>(through + of_row.to(0, at.column + k) * behind.at[k] + grad[i].of_confounder(k));
        }
        store_vector(grad_x + (sample + row) * M + at.column, result);
      }
    }
  }
};

// Calls body with the width of the vectors in which x at these addresses, and what belongs to its columns, can be
// moved: of two bytes each, four elements where there are no eight.
template <class T, class Body>
int in_vectors(const Matrix& m, std::initializer_list<const void*> addresses, Body&& body) {
  if constexpr (sizeof(T) == 2)
    if (m.columns % 8 != 0 && m.columns % 4 == 0 && are_aligned(addresses))
      return body(std::integral_constant<int, 4>{});
  return with_width<T>(m.columns, addresses, body);
}

int width_of(const Matrix& m) { return static_cast<int>(m.columns); }

template <int V, class Op>
int launch_elements(const Op& op, const Matrix& m, void* stream) {
  constexpr int kAcross = 64;
  const int across = std::min(ceil_div(m.columns, V), kAcross);
  Split split(m.rows, 1, 1);
  split.length = kColumnThreads / across * 2 * kBatch<V>;
  split.chunks = ceil_div(m.rows, split.length);
  return launch_places<V>(elements_kernel<V, Op>, op, m.B, m.rows, width_of(m), split, across, stream);
}

// Lanes of a team of cbam_recalibrate_reduce.
int reduce_lanes(const Matrix& m, int V) { return std::min(1 << bits_of(ceil_div(m.columns, V)), kWarp); }

template <class T, class Body>
int with_gradients(const Matrix& m, const CbamGradients& of, Body&& body) {
  return in_vectors<T>(m, {of.grad_y, of.grad_confounder, of.x, of.of_columns}, body);
}

}  // namespace

Split cbam_split(const Matrix& m) {
  constexpr int kLeast = 64, kColumns = 256;
  return Split(m.rows, m.B * ceil_div(m.columns, kColumns), kLeast);
}

int cbam_pool_columns(const Matrix& m, const void* x, const void* gate, void* pooled, int32_t* argmax, void* stream) {
  return with_scalar(m.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    return in_vectors<T>(m, {x, gate}, [&](auto V) {
      const PoolRowOp<T, V.value> op{static_cast<const T*>(x),         static_cast<const A*>(gate),
                                     static_cast<A*>(pooled),          argmax,
                                     A(1) / static_cast<A>(m.columns), width_of(m)};
      return launch_rows(op, m.B, m.rows, width_of(m), stream);
    });
  });
}

int cbam_pool_rows(const Matrix& m, const void* x, const void* gate, void* partial, int32_t* indices, void* pooled,
                   int32_t* argmax, void* stream) {
  return with_scalar(m.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const Split split = cbam_split(m);
    const PooledColumns<A> result{static_cast<A*>(pooled), argmax, A(1) / static_cast<A>(m.rows), width_of(m)};
    const PooledColumns<A> parts{static_cast<A*>(partial), indices, 1, width_of(m)};
    const int error = in_vectors<T>(m, {x}, [&](auto V) {
      const PoolColumnOp<T, V.value> op{static_cast<const T*>(x), static_cast<const A*>(gate),
                                        split.chunks > 1 ? parts : result, m.rows};
      return launch_columns<V.value>(op, m.B, m.rows, width_of(m), split, kColumnThreads / 4, stream);
    });
    if (error != 0 || split.chunks == 1) return error;
    const JoinPooled<A> join{parts.pooled, indices, result, split.chunks};
    return join_columns(join, m.B, split.chunks, width_of(m), stream);
  });
}

int cbam_recalibrate(const Matrix& m, const void* x, const void* of_rows, const void* of_columns, void* y,
                     void* confounder, void* stream) {
  return with_scalar(m.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    return in_vectors<T>(m, {x, of_columns, y, confounder}, [&](auto V) {
      const RecalibrateOp<T, V.value> op{static_cast<const T*>(x),
                                         static_cast<T*>(y),
                                         static_cast<T*>(confounder),
                                         static_cast<const A*>(of_rows),
                                         static_cast<const A*>(of_columns),
                                         m.rows,
                                         width_of(m)};
      return launch_elements<V.value>(op, m, stream);
    });
  });
}

int cbam_reduce_tiles(const Matrix& m, const CbamGradients& of) {
  int tiles = 0;
  with_scalar(m.scalar, [&](auto type) {
    return with_gradients<decltype(type)>(m, of, [&](auto V) {
      tiles = ceil_div(m.columns, int64_t{V.value} * reduce_lanes(m, V.value));
      return 0;
    });
  });
  return tiles;
}

int cbam_recalibrate_reduce(const Matrix& m, const CbamGradients& of, void* row_parts, void* over_columns,
                            void* column_parts, void* over_rows, void* stream) {
  return with_scalar(m.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const Split split = cbam_split(m);
    const int tiles = cbam_reduce_tiles(m, of);
    A *const to_rows = static_cast<A*>(tiles > 1 ? row_parts : over_columns), *const to_columns = static_cast<A*>(
                                                                                  split.chunks > 1 ? column_parts
                                                                                                   : over_rows);
    const int error = with_gradients<T>(m, of, [&](auto V) {
      const int lanes = reduce_lanes(m, V.value);
      const auto run = [&](auto with_confounder) {
        const ReduceOp<T, V.value, with_confounder.value> op{static_cast<const T*>(of.grad_y),
                                                             static_cast<const T*>(of.x),
                                                             static_cast<const T*>(of.grad_confounder),
                                                             static_cast<const A*>(of.of_rows),
                                                             static_cast<const A*>(of.of_columns),
                                                             to_rows,
                                                             to_columns,
                                                             m.rows,
                                                             width_of(m),
                                                             lanes,
                                                             tiles};
        return launch_places<V.value>(reduce_columns<V.value, ReduceOp<T, V.value, with_confounder.value>>, op, m.B,
                                      m.rows, width_of(m), split, lanes, stream);
      };
      return of.grad_confounder ? run(std::true_type{}) : run(std::false_type{});
    });
    const auto join = [&](const A* parts, void* sums, int count, int64_t n) {
      const int length = static_cast<int>(n);
      return join_columns(JoinTotals<A>{parts, static_cast<A*>(sums), count, length}, m.B, count, length, stream);
    };
    if (error != 0) return error;
    if (tiles > 1)
      if (const int failed = join(to_rows, over_columns, tiles, m.rows)) return failed;
    return split.chunks > 1 ? join(to_columns, over_rows, split.chunks, m.columns) : 0;
  });
}

int cbam_unpool_reduce(const Matrix& m, const void* x, const Side& spatial, void* partial, void* sums, void* stream) {
  return with_scalar(m.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const Axis<A> positions(spatial, m.positions(), m.channels());
    const T* const data = static_cast<const T*>(x);
    if (m.rows_are_channels)
      return in_vectors<T>(m, {x, spatial.grad, spatial.argmax}, [&](auto V) {
        const UnpoolRowOp<T, V.value> op{data, positions, static_cast<A*>(sums), width_of(m)};
        return launch_rows(op, m.B, m.rows, width_of(m), stream);
      });
    const Split split = cbam_split(m);
    A* const to = static_cast<A*>(split.chunks > 1 ? partial : sums);
    const int error = in_vectors<T>(m, {x}, [&](auto V) {
      const UnpoolColumnOp<T, V.value> op{data, positions, to, width_of(m)};
      return launch_columns<V.value>(op, m.B, m.rows, width_of(m), split, kColumnThreads / 4, stream);
    });
    if (error != 0 || split.chunks == 1) return error;
    return join_columns(JoinTotals<A>{to, static_cast<A*>(sums), split.chunks, width_of(m)}, m.B, split.chunks,
                        width_of(m), stream);
  });
}

int cbam_unpool(const Matrix& m, const void* grad_y, const void* grad_confounder, const Side& of_rows,
                const Side& of_columns, void* grad_x, void* stream) {
  return with_scalar(m.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const Axis<A> rows(of_rows, m.rows, m.columns), columns(of_columns, m.columns, m.rows);
    const auto addresses = {grad_y,          grad_confounder, static_cast<const void*>(grad_x),
                            of_columns.gate, of_columns.grad, static_cast<const void*>(of_columns.argmax)};
    return in_vectors<T>(m, addresses, [&](auto V) {
      const auto run = [&](auto with_confounder) {
        const UnpoolOp<T, V.value, with_confounder.value> op{static_cast<const T*>(grad_y),
                                                             static_cast<const T*>(grad_confounder),
                                                             static_cast<T*>(grad_x),
                                                             rows,
                                                             columns,
                                                             m.rows_are_channels};
        return launch_elements<V.value>(op, m, stream);
      };
      return grad_confounder ? run(std::true_type{}) : run(std::false_type{});
    });
  });
}

}  // namespace aia::cuda
