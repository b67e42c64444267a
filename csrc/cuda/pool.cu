// pool and its transposes (aia_kernels/ops.py has the equations).
//
//   pool           reads 1 |X|   maximum, its first index, and mean of x * G over the axes of a context
//   unpool_reduce  reads 1 |X|   sum of x * U over the axes of a context, over its number of maps
//   unpool         reads 1 |X|, writes 1 |X|   grad_y * G + G_inner * U + U_inner
#include "../common/max_first.h"
#include "reduce.cuh"

namespace aia::cuda {
namespace {

template <class A>
struct MaxMean {
  MaxFirst<A> max;
  A sum;

  static __device__ __forceinline__ MaxMean starting_at(int first) { return {MaxFirst<A>::starting_at(first), 0}; }
  __device__ __forceinline__ void add(A value, int index) {
    max.add(value, index);
    sum += value;
  }
  __device__ __forceinline__ void merge(const MaxMean& other) {
    max.merge(other.max);
    sum += other.sum;
  }
};

template <class A>
struct Sum {
  A sum;

  static __device__ __forceinline__ Sum starting_at(int) { return {0}; }
  __device__ __forceinline__ void add(A value, int) { sum += value; }
  __device__ __forceinline__ void merge(const Sum& other) { sum += other.sum; }
};

template <class A>
struct PoolOp {
  using Partial = MaxMean<A>;

  GateField<A> field;
  int context;
  A* pooled;
  Indices argmax;

  __device__ __forceinline__ Partial load(const Volume<A>& v, int64_t clip, int k) const {
    const int packed = v.packed(context);
    const A* maximum = pooled + 2 * clip * packed + k;
    return {{*maximum, argmax.load(clip * packed + k)}, maximum[packed]};
  }
  __device__ __forceinline__ void store(const Volume<A>& v, int64_t clip, int k, const Partial& partial, bool done,
                                        A per_length) const {
    const int packed = v.packed(context);
    A* maximum = pooled + 2 * clip * packed + k;
    *maximum = partial.max.value;
    maximum[packed] = done ? partial.sum * per_length : partial.sum;
    argmax.store(clip * packed + k, partial.max.index);
  }
};

template <class A>
struct UnpoolReduceOp {
  using Partial = Sum<A>;

  UnpooledField<A> field;
  int context;
  A* grad_gate;
  A share;  // 1 over the number of maps

  __device__ __forceinline__ Partial load(const Volume<A>& v, int64_t clip, int k) const {
    return {grad_gate[clip * v.packed(context) + k]};
  }
  __device__ __forceinline__ void store(const Volume<A>& v, int64_t clip, int k, const Partial& partial, bool done,
                                        A) const {
    grad_gate[clip * v.packed(context) + k] = done ? partial.sum * share : partial.sum;
  }
};

template <class T, int V, class A = Accumulate<T>>
__global__ void __launch_bounds__(kThreads, 1)
    unpool_kernel(Volume<A> v, const T* __restrict__ grad_y, T* __restrict__ grad_x, GateField<A> gate,
                  UnpooledField<A> outer, GateField<A> inner_gate, UnpooledField<A> inner) {
  const int blocks = (v.size() + kThreads * V - 1) / (kThreads * V);
  const int64_t clip = blockIdx.x / blocks;
  const int e = (blockIdx.x % blocks * kThreads + threadIdx.x) * V;
  if (e >= v.size()) return;

  Vector<T, V> vector = load_vector<V>(grad_y + clip * v.size() + e);
  const Position p = v.position(e);
  const auto g = spread<V>(gate, v, clip, p), inside = spread<V>(inner_gate, v, clip, p);
  const auto u = spread<V>(outer, v, clip, p), inner_u = spread<V>(inner, v, clip, p);
#pragma unroll
  for (int k = 0; k < V; ++k)
    vector.at[k] = narrow<T>(widen(vector.at[k]) * g.at[k] + inside.at[k] * u.at[k] + inner_u.at[k]);
  *reinterpret_cast<Vector<T, V>*>(grad_x + clip * v.size() + e) = vector;
}

// Calls body with a value of the storage type.
template <class Body>
int with_scalar(Scalar scalar, Body&& body) {
  switch (scalar) {
    case Scalar::kFloat32: return body(float{});
    case Scalar::kFloat64: return body(double{});
    case Scalar::kBFloat16: return body(BFloat16{});
    default: return body(Float16{});
  }
}

}  // namespace

int pool(const Shape& shape, const void* x, int context, Gate gate, void* pooled, void* argmax, int index_bytes,
         void* stream) {
  return with_scalar(shape.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const PoolOp<A> op{GateField<A>(gate), context, static_cast<A*>(pooled), Indices{argmax, index_bytes}};
    return reduce<T>(shape, x, context, op, stream);
  });
}

int unpool_reduce(const Shape& shape, const void* x, Unpooled unpooled, int gate_context, void* grad_gate,
                  void* stream) {
  return with_scalar(shape.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const UnpoolReduceOp<A> op{UnpooledField<A>(unpooled), gate_context, static_cast<A*>(grad_gate),
                               A(1) / gate_context};  // a context counts its maps
    return reduce<T>(shape, x, gate_context, op, stream);
  });
}

int unpool(const Shape& shape, const void* grad_y, Gate gate, Unpooled outer, Gate inner_gate, Unpooled inner,
           void* grad_x, void* stream) {
  return with_scalar(shape.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    constexpr int kWide = 16 / sizeof(T);
    const Volume<A> v(shape);
    const auto run = [&](auto kernel, int width) {
      const int64_t blocks = shape.B * ceil_div(v.size(), kThreads * width);
      return launch(kernel, blocks, kThreads, stream, v, static_cast<const T*>(grad_y), static_cast<T*>(grad_x),
                    GateField<A>(gate), UnpooledField<A>(outer), GateField<A>(inner_gate), UnpooledField<A>(inner));
    };
    const bool aligned = (reinterpret_cast<uintptr_t>(grad_y) | reinterpret_cast<uintptr_t>(grad_x)) % 16 == 0;
    return aligned && v.size() % kWide == 0 ? run(unpool_kernel<T, kWide, A>, kWide) : run(unpool_kernel<T, 1, A>, 1);
  });
}

const char* error_string(int error) { return describe(error); }

}  // namespace aia::cuda
