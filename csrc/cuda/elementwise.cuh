// Elementwise passes: y from x and fields, both x-sized, moved in vectors of V elements.
//
// The operation Op has apply(v, clip, position, values), which turns a group of values of x into those of y, and says
// whether its maps are aligned(). kVectors of x are asked for before the first is used: bytes in flight hide the
// latency of memory.
#pragma once

#include "volume.cuh"

namespace aia::cuda {

constexpr int kElementThreads = 256;

template <class T, int V, int kVectors, class Op, class A = Accumulate<T>>
__global__ void __launch_bounds__(kElementThreads, 1)
    elementwise_kernel(Volume<A> v,
                       const T* __restrict__ x,  // [B, T, C, H, W] in its order of storage
                       T* __restrict__ y,        // as x
                       Op op) {
  constexpr int kStep = kElementThreads * V;
  const int blocks = (v.size() + kVectors * kStep - 1) / (kVectors * kStep);
  const int64_t clip = blockIdx.x / blocks;
  const int first = blockIdx.x % blocks * kVectors * kStep + threadIdx.x * V;
  x += clip * v.size();
  y += clip * v.size();
  Vector<T, V> vectors[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k)
    if (first + k * kStep < v.size()) vectors[k] = load_vector<V>(x + first + k * kStep);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int e = first + k * kStep;
    if (e >= v.size()) return;
    Position p = v.position(e);
    for_groups<V>(v, p, [&](int first) {
      Vector<A, kGroupOf<V, A>> values;
#pragma unroll
      for (int j = 0; j < kGroupOf<V, A>; ++j) values.at[j] = widen(vectors[k].at[first + j]);
      op.apply(v, clip, p, values);
#pragma unroll
      for (int j = 0; j < kGroupOf<V, A>; ++j) vectors[k].at[first + j] = narrow<T>(values.at[j]);
    });
    store_vector(y + e, vectors[k]);
  }
}

// Queues an operation in elements.
template <class T, class Op>
int element_by_element(const Shape& shape, const void* x, void* y, const Op& op, void* stream) {
  const Volume<Accumulate<T>> v(shape);
  const int64_t blocks = shape.B * ceil_div(v.size(), kElementThreads * 4);
  return launch(elementwise_kernel<T, 1, 4, Op>, blocks, kElementThreads, stream, v, static_cast<const T*>(x),
                static_cast<T*>(y), op);
}

// Queues an operation, in vectors where it can; kVectors for vectors of 16 bytes.
template <class T, int kVectors, class Op>
int elementwise(const Shape& shape, const void* x, void* y, const Op& op, void* stream) {
  constexpr int kWide = 16 / sizeof(T);
  const Volume<Accumulate<T>> v(shape);
  if (!are_aligned({x, y}) || v.size() % kWide != 0) return element_by_element<T>(shape, x, y, op, stream);
  const int64_t blocks = shape.B * ceil_div(v.size(), kElementThreads * kWide * kVectors);
  return launch(elementwise_kernel<T, kWide, kVectors, Op>, blocks, kElementThreads, stream,
                v.with_vectors(op.aligned()), static_cast<const T*>(x), static_cast<T*>(y), op);
}

}  // namespace aia::cuda
