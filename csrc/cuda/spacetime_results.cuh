// What the reductions over T, H and W write, of one clip.
#pragma once

#include "max_mean.cuh"
#include "volume.cuh"

namespace aia::cuda {

// Of a pool: maximum, its first index, of one byte, and mean.
template <class A>
struct PooledMaps {
  A *maximum, *mean;
  uint8_t* argmax;

  __device__ __forceinline__ PooledMaps(const Volume<A>& v, int64_t clip, A* pooled, uint8_t* argmax)
      : maximum(pooled + 2 * clip * v.packed(kSpacetime)),
        mean(maximum + v.packed(kSpacetime)),
        argmax(argmax + clip * v.packed(kSpacetime)) {
    opaque(maximum), opaque(mean), opaque(this->argmax);
  }
  // Of V lines of such a length, from element k of the maps on.
  template <int V>
  __device__ __forceinline__ void store(int k, const Extreme<A>* of, A per_length) const {
    Vector<A, V> maxima, means;
    Vector<uint8_t, V> indices;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      maxima.at[j] = of[j].value;
      means.at[j] = of[j].sum * per_length;
      indices.at[j] = static_cast<uint8_t>(of[j].index);
    }
    store_vector(maximum + k, maxima);
    store_vector(mean + k, means);
    store_vector(argmax + k, indices);
  }
};

// Of a sum: divided by the number of maps.
template <class A>
struct SummedMaps {
  A* sums;

  __device__ __forceinline__ SummedMaps(const Volume<A>& v, int64_t clip, A* sums)
      : sums(sums + clip * v.packed(kSpacetime)) {
    opaque(this->sums);
  }
  template <int V>
  __device__ __forceinline__ void store(int k, const Plus<A>* of, A) const {
    Vector<A, V> found;
#pragma unroll
    for (int j = 0; j < V; ++j) found.at[j] = of[j].sum * (A(1) / A(kSpacetime));
    store_vector(sums + k, found);
  }
};

}  // namespace aia::cuda
