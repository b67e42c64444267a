// The statistics by which a softmax is made in one read: a maximum, and the sum of exponentials beside it.
#pragma once

#include <cmath>

#include "../common/scalar.h"
#include "launch.cuh"

namespace aia::cuda {

template <class A>
__device__ __forceinline__ A lowest() {
  return static_cast<A>(-INFINITY);
}

// The maximum and the sum of exp(x - maximum) of some numbers; -inf and 0 where there are none.
template <class A>
struct Statistics {
  A maximum, sum;

  static __device__ __forceinline__ Statistics none() { return {lowest<A>(), 0}; }
  // Where to count from: exp(x - maximum) would be NaN with a maximum of -inf.
  static __device__ __forceinline__ A origin(A maximum) { return maximum == lowest<A>() ? A(0) : maximum; }

  __device__ __forceinline__ void raise(A to) {
    if (!(to > maximum)) return;
    sum *= std::exp(maximum - origin(to));
    maximum = to;
  }
  __device__ __forceinline__ void merge(const Statistics& other) {
    raise(other.maximum);
    sum += other.sum * std::exp(other.maximum - origin(maximum));
  }
  // Comparisons let NaN pass by; it shows in the sum. Only with +inf the sum is NaN and the maximum is not.
  __device__ __forceinline__ A seen_maximum() const { return sum != sum && maximum != -lowest<A>() ? sum : maximum; }
};

}  // namespace aia::cuda
