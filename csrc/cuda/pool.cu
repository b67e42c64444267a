// pool and unpool_reduce (aia_kernels/schemas.py has the equations).
//
//   pool           reads 1 |X|   maximum, its first index, and mean of x * G over the axes of a context
//   unpool_reduce  reads 1 |X|   sum of x * U over the axes of a context, over its number of maps
#include "bricks.h"
#include "max_mean.cuh"
#include "reduce.cuh"
#include "strips.h"

namespace aia::cuda {
namespace {

template <class A>
struct PoolOp {
  using Partial = MaxMean<A>;

  GateField<A> field;
  int context;
  A* pooled;       // [B, 2, M]: maximum, mean
  Indices argmax;  // [B, M]

  bool aligned() const { return field.aligned() && are_aligned({pooled, argmax.data}); }

  __device__ __forceinline__ Partial load(const Volume<A>& v, int64_t clip, int k) const {
    const int packed = v.packed(context);
    const A* maximum = pooled + 2 * clip * packed + k;
    return {{*maximum, argmax.template load<1>(clip * packed + k).at[0]}, maximum[packed]};
  }
  template <int V>
  __device__ __forceinline__ void store(const Volume<A>& v, int64_t clip, int k, const Partial* partials, bool done,
                                        A per_length) const {
    const int packed = v.packed(context);
    A* at_max = pooled + 2 * clip * packed + k;
    Vector<A, V> maximum, mean;
    Vector<int, V> index;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      maximum.at[j] = partials[j].max.value;
      mean.at[j] = done ? partials[j].sum * per_length : partials[j].sum;
      index.at[j] = partials[j].max.index;
    }
    store_vector(at_max, maximum);
    store_vector(at_max + packed, mean);
    argmax.store(clip * packed + k, index);
  }
};

}  // namespace

int pool(const Shape& shape, const void* x, int context, Gate gate, void* pooled, void* argmax, int index_bytes,
         void* stream) {
  if (context == kSpacetime) {
    const int error = pool_by_strips(shape, x, gate, pooled, argmax, index_bytes, stream);
    if (error >= 0) return error;
  }
  return with_scalar(shape.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const PoolOp<A> op{GateField<A>(gate), context, static_cast<A*>(pooled), Indices{argmax, index_bytes}};
    return reduce(shape, Plain<T>{static_cast<const T*>(x)}, context, op, stream);
  });
}

int unpool_reduce(const Shape& shape, const void* x, Unpooled unpooled, int gate_context, void* grad_gate,
                  void* stream) {
  if (gate_context == kSpacetime) {
    const int error = unpool_reduce_by_strips(shape, x, unpooled, grad_gate, stream);
    if (error >= 0) return error;
  } else {
    const int error = unpool_reduce_by_bricks(shape, x, unpooled, grad_gate, stream);
    if (error >= 0) return error;
  }
  return with_scalar(shape.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const Plain<T> source{static_cast<const T*>(x)};
    const SumOp<A, UnpooledField<A>> op(UnpooledField<A>(unpooled), gate_context, grad_gate);
    return reduce(shape, source, gate_context, op, stream);
  });
}

const char* error_string(int error) { return describe(error); }

}  // namespace aia::cuda
