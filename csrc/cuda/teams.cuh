// Teams: 2^k neighbouring lanes of a warp, which have a row in common.
#pragma once

#include "launch.cuh"

namespace aia::cuda {

constexpr int kWarp = 32;

template <class A>
__device__ __forceinline__ A team_sum(A value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) value += shuffle_xor(value, distance);
  return value;
}

template <class A>
__device__ __forceinline__ A team_maximum(A value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    const A other = shuffle_xor(value, distance);
    value = other > value ? other : value;
  }
  return value;
}

// The least k with 2^k >= least.
inline int bits_of(int64_t least) {
  int bits = 0;
  while ((int64_t{1} << bits) < least) ++bits;
  return bits;
}

}  // namespace aia::cuda
