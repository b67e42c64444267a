// What a pool knows of a run of elements: the maximum, its first index, and the sum.
#pragma once

#include "../common/max_first.h"
#include "launch.cuh"

namespace aia::cuda {

template <class A>
struct MaxMean {
  MaxFirst<A> max;
  A sum;

  static __device__ __forceinline__ MaxMean starting_at(int first) { return {MaxFirst<A>::starting_at(first), 0}; }
  // Of no elements. Where all that is merged is -inf, the first element is the maximum.
  static __device__ __forceinline__ MaxMean none() { return starting_at(0); }
  __device__ __forceinline__ void add(A value, int index) {
    max.add(value, index);
    sum += value;
  }
  __device__ __forceinline__ void merge(const MaxMean& other) {
    max.merge(other.max);
    sum += other.sum;
  }
  // That of the lane whose number differs by these bits.
  __device__ __forceinline__ MaxMean exchanged(int bits) const {
    return {{shuffle_xor(max.value, bits), shuffle_xor(max.index, bits)}, shuffle_xor(sum, bits)};
  }
};

}  // namespace aia::cuda
