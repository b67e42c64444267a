// The storage types and the type in which each is accumulated. Usable from C++ and from CUDA C++.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define AIA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#include <bit>
#define AIA_HOST_DEVICE inline
#endif

namespace aia {

#if defined(__CUDACC__)
using BFloat16 = __nv_bfloat16;
using Float16 = __half;
#else
struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;
#endif

template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateType<T>::type;

// Exact conversion to the accumulation type.
template <class T>
AIA_HOST_DEVICE Accumulate<T> widen(T value) {
  return static_cast<Accumulate<T>>(value);
}

// Conversion to a storage type, to nearest, ties to even.
template <class T>
AIA_HOST_DEVICE T narrow(Accumulate<T> value) {
  return static_cast<T>(value);
}

#if !defined(__CUDACC__)
template <>
inline float widen(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

template <>
inline BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};  // quiet, and never rounded up to infinity
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
#endif

}  // namespace aia
