// The field that meets a vector of x while its thread steps through the channels: elements keep their place in a plane.
#pragma once

#include <type_traits>

#include "volume.cuh"

namespace aia::cuda {

// U over T, H and W with indices of a byte, for vectors whose groups meet vectors of the map over T (Volume::runs_t).
// kRows: groups stay in a row, and so meet vectors of the map over H too.
template <class A, bool kRows>
struct UnpooledBytes {
  const A* grad;          // [B, 2, M]
  const uint8_t* argmax;  // [B, M]

  explicit UnpooledBytes(Unpooled u)
      : grad(static_cast<const A*>(u.grad)), argmax(static_cast<const uint8_t*>(u.argmax)) {}
  bool aligned() const { return are_aligned({grad, argmax}); }
};

// multiply(values, c): V neighbours in memory, c channels behind those at p.
template <int V, class A, class Field>
struct ChannelSteps {
  const Volume<A>& v;
  const Field& field;
  int64_t clip;
  Position p;

  __device__ __forceinline__ ChannelSteps(const Volume<A>& v, const Field& field, int64_t clip, const Position& p)
      : v(v), field(field), clip(clip), p(p) {}
  __device__ __forceinline__ void multiply(Vector<A, V>& values, int c) const {
    if (Field::kAbsent == 1 && field.context == kNone) return;  // a factor of 1
    Position here = p;
    if (v.I > 1)
      here.i += c;
    else
      here.o += c;
    for_groups<V>(v, here, [&](int first) {
      const auto factors = spread<kGroupOf<V, A>>(field, v, clip, here);
#pragma unroll
      for (int k = 0; k < kGroupOf<V, A>; ++k) values.at[first + k] *= factors.at[k];
    });
  }
};

// Each map is linear in the channel, so a thread finds its places in the maps once, and a step costs a multiply-add for
// each. p lies on O.
template <int V, class A, bool kRows>
struct ChannelSteps<V, A, UnpooledBytes<A, kRows>> {
  static constexpr int kLong = kGroupOf<V, A>, kPlaces = kRows ? V / kLong : V;

  const A *maximum, *mean;
  const uint8_t* argmax;
  int over_t, over_h[kPlaces], over_w[kPlaces], step_t, step_h, step_w;
  int t, h[kPlaces], w[kPlaces];
  A per_t, per_h, per_w;

  __device__ __forceinline__ ChannelSteps(const Volume<A>& v, const UnpooledBytes<A, kRows>& field, int64_t clip,
                                          Position p)
      : over_t(v.t_map(p)), t(p.t), per_t(v.per_t), per_h(v.per_h), per_w(v.per_w) {
    const int packed = v.packed(kSpacetime), frames = v.time_inside ? v.T : 1;
    maximum = field.grad + 2 * clip * packed, mean = maximum + packed, argmax = field.argmax + clip * packed;
    step_t = v.H * v.W, step_h = frames * v.W, step_w = frames * v.H;
#pragma unroll
    for (int k = 0; k < kPlaces; ++k) {
      over_h[k] = v.h_map(p), over_w[k] = v.w_map(p), h[k] = p.h, w[k] = p.w;
      v.template advance<V / kPlaces>(p);
    }
  }
  __device__ __forceinline__ void multiply(Vector<A, V>& values, int c) const {
#pragma unroll
    for (int first = 0; first < V; first += kLong) {
      Vector<A, kLong> factors = run<kLong>(over_t + first + c * step_t, t, per_t);
      if constexpr (kRows) {
        const int place = first / kLong;
        const auto of_h = run<kLong>(over_h[place] + c * step_h, h[place], per_h);
        const int k = over_w[place] + c * step_w, chosen = argmax[k];
        const A largest = maximum[k], everywhere = mean[k] * per_w;
#pragma unroll
        for (int j = 0; j < kLong; ++j)
          factors.at[j] += of_h.at[j] + (everywhere + (chosen == w[place] + j ? largest : A(0)));
      } else {
#pragma unroll
        for (int j = 0; j < kLong; ++j)
          factors.at[j] += run<1>(over_h[first + j] + c * step_h, h[first + j], per_h).at[0] +
                           run<1>(over_w[first + j] + c * step_w, w[first + j], per_w).at[0];
      }
#pragma unroll
      for (int j = 0; j < kLong; ++j) values.at[first + j] *= factors.at[j];
    }
  }

 private:
  template <int N>
  __device__ __forceinline__ Vector<A, N> run(int k, int index, A per_length) const {
    const auto largest = load_vector<N>(maximum + k), everywhere = load_vector<N>(mean + k);
    const auto chosen = load_vector<N>(argmax + k);
    Vector<A, N> found;
#pragma unroll
    for (int j = 0; j < N; ++j)
      found.at[j] = everywhere.at[j] * per_length + (chosen.at[j] == index ? largest.at[j] : A(0));
    return found;
  }
};

}  // namespace aia::cuda
