// recalibrate and its transpose (aia_kernels/schemas.py has the equations).
//
//   recalibrate         reads 1 |X|, writes 1 |X|   x * G
//   recalibrate_reduce  reads 2 |X|                 sum of grad_y * x over the axes of a context, over its number of
//   maps
#include "elementwise.cuh"
#include "reduce.cuh"
#include "strips.h"
#include "unpool.h"

namespace aia::cuda {
namespace {

template <class A>
struct RecalibrateOp {
  GateField<A> gate;

  bool aligned() const { return gate.aligned(); }

  template <int V>
  __device__ __forceinline__ void apply(const Volume<A>& v, int64_t clip, const Position& p, Vector<A, V>& x) const {
    const auto g = spread<V>(gate, v, clip, p);
#pragma unroll
    for (int k = 0; k < V; ++k) x.at[k] *= g.at[k];
  }
};

}  // namespace

int recalibrate(const Shape& shape, const void* x, Gate gate, void* y, void* stream) {
  if (gate.context == kSpacetime) {
    const int error = recalibrate_by_walk(shape, x, gate, y, stream);
    if (error >= 0) return error;
  }
  return with_scalar(shape.scalar, [&](auto type) {
    using T = decltype(type);
    return elementwise<T, 4>(shape, x, y, RecalibrateOp<Accumulate<T>>{GateField<Accumulate<T>>(gate)}, stream);
  });
}

int recalibrate_reduce(const Shape& shape, const void* grad_y, const void* x, int context, void* grad_gate,
                       void* stream) {
  if (context == kSpacetime) {
    const int error = recalibrate_reduce_by_strips(shape, grad_y, x, grad_gate, stream);
    if (error >= 0) return error;
  }
  return with_scalar(shape.scalar, [&](auto type) {
    using T = decltype(type);
    using A = Accumulate<T>;
    const Product<T> source{static_cast<const T*>(grad_y), static_cast<const T*>(x)};
    return reduce(shape, source, context, SumOp<A, One<A>>({}, context, grad_gate), stream);
  });
}

}  // namespace aia::cuda
