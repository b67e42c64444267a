// Vectors of neighbours in memory, and what it takes to move them.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "../common/packed.h"
#include "../common/scalar.h"
#include "launch.cuh"
#include "split.h"

namespace aia::cuda {

// V neighbours in memory, moved by one instruction where that takes 16 bytes.
template <class T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Vector {
  T at[V];
};

template <int V, class T>
__device__ __forceinline__ Vector<T, V> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, V>*>(from);
}

template <class T, int V>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, V>& vector) {
  *reinterpret_cast<Vector<T, V>*>(to) = vector;
}

// Vectors of V elements in whole words. Where one of several paths loads a vector, it is kept as these: the compiler
// takes elements of 16 bits apart where the paths meet, and so would wait for each vector before it asks for the next.
template <class T, int V>
using Words = Vector<uint32_t, V * sizeof(T) / sizeof(uint32_t)>;

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& value) {
  return __builtin_bit_cast(To, value);
}

// Exact conversion to the accumulation type. Of a word with two elements of bfloat16, each takes one instruction.
template <class T, int V>
__device__ __forceinline__ Vector<Accumulate<T>, V> widened(const Vector<T, V>& from) {
  Vector<Accumulate<T>, V> to;
  if constexpr (std::is_same_v<T, BFloat16> && V % 2 == 0) {
    const auto words = bits_as<Words<T, V>>(from);
#pragma unroll
    for (int j = 0; j < V; j += 2) {
      to.at[j] = bits_as<float>(words.at[j / 2] << 16);
      to.at[j + 1] = bits_as<float>(words.at[j / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) to.at[j] = widen(from.at[j]);
  }
  return to;
}

// Whether vectors of 16 bytes may begin at all of these addresses.
inline bool are_aligned(std::initializer_list<const void*> addresses) {
  uintptr_t bits = 0;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return bits % 16 == 0;
}

// Calls body with the width of the vectors of 16 bytes in which rows of this length at these addresses can be moved, or
// with 1.
template <class T, class Body>
int with_width(int64_t length, std::initializer_list<const void*> addresses, Body&& body) {
  constexpr int kWide = 16 / sizeof(T);
  return length % kWide == 0 && are_aligned(addresses) ? body(std::integral_constant<int, kWide>{})
                                                       : body(std::integral_constant<int, 1>{});
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

}  // namespace aia::cuda
