// What a pool knows of a run of elements: the maximum, its first index, and the sum.
#pragma once

#include "../common/max_first.h"
#include "vector.cuh"

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

// The same of values that are settled (launch.cuh), met in increasing order, in four instructions each: then a value
// that beats the maximum, a NaN among them, is one that changes it.
template <class A>
struct Extreme {
  static constexpr bool kIndexed = true;
  using Known = Vector<A, 2>;
  A value, sum;
  int index;

  static __device__ __forceinline__ Extreme none() { return {static_cast<A>(-INFINITY), 0, 0}; }
  static __device__ __forceinline__ Extreme of(A first) { return {first, first, 0}; }
  __device__ __forceinline__ void add(A next, int next_index) { merge({next, next, next_index}); }
  // Of elements behind those that were met.
  __device__ __forceinline__ void merge(const Extreme& next) {
    const A larger = larger_or_nan(value, next.value);
    index = same_bits(larger, value) ? index : next.index;
    value = larger;
    sum += next.sum;
  }
  __device__ __forceinline__ Known known() const { return {value, sum}; }
  static __device__ __forceinline__ Extreme of_known(const Known& known, int index) {
    return {known.at[0], known.at[1], index};
  }
};

// A sum, as a part of the same kind.
template <class A>
struct Plus {
  static constexpr bool kIndexed = false;
  using Known = A;
  A sum;

  static __device__ __forceinline__ Plus none() { return {0}; }
  static __device__ __forceinline__ Plus of(A first) { return {first}; }
  __device__ __forceinline__ void add(A next, int) { sum += next; }
  __device__ __forceinline__ void merge(const Plus& next) { sum += next.sum; }
  __device__ __forceinline__ Known known() const { return sum; }
  static __device__ __forceinline__ Plus of_known(Known known, int) { return {known}; }
};

}  // namespace aia::cuda
