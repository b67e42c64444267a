// Geometry of one clip, and the two fields that maps spread over it: gates G and unpooled gradients U
// (aia_kernels/ops.py).
#pragma once

#include "../common/scalar.h"
#include "launch.cuh"
#include "passes.h"

namespace aia::cuda {

// An element of a clip. Its channel is o + i, one of which is always 0.
struct Position {
  int t, o, h, w, i;

  __device__ __forceinline__ int channel() const { return o + i; }
};

// One clip of x. All three orders are [T and O in some order, H, W, I], with the channels on O or on I.
template <class A>
struct Volume {
  int T, O, H, W, I;
  bool time_inside;              // [O, T, H, W] instead of [T, O, H, W, I]
  A per_t, per_h, per_w, per_c;  // reciprocals of the lengths: a division costs a subroutine and its stack

  explicit Volume(const Shape& s)
      : T(s.T),
        O(s.order == Order::kTHWC ? 1 : s.C),
        H(s.H),
        W(s.W),
        I(s.order == Order::kTHWC ? s.C : 1),
        time_inside(s.order == Order::kCTHW),
        per_t(A(1) / s.T),
        per_h(A(1) / s.H),
        per_w(A(1) / s.W),
        per_c(A(1) / s.C) {}

  __host__ __device__ __forceinline__ int channels() const { return O * I; }
  __host__ __device__ __forceinline__ int plane_size() const { return H * W * I; }
  __host__ __device__ __forceinline__ int size() const { return T * O * plane_size(); }
  __host__ __device__ __forceinline__ int packed(int context) const {
    return context == kChannel ? T * H * W : O * I * (H * W + T * W + T * H);
  }
  __device__ __forceinline__ int stride_t() const { return time_inside ? plane_size() : O * plane_size(); }

  __device__ __forceinline__ int plane(const Position& p) const { return time_inside ? p.o * T + p.t : p.t * O + p.o; }
  __device__ __forceinline__ int offset(const Position& p) const { return ((plane(p) * H + p.h) * W + p.w) * I + p.i; }
  __device__ __forceinline__ int channel_map(const Position& p) const { return (p.t * H + p.h) * W + p.w; }
  // Offsets into the packed spacetime maps, pooled over T, over H and over W.
  __device__ __forceinline__ int t_map(const Position& p) const { return ((p.o * H + p.h) * W + p.w) * I + p.i; }
  __device__ __forceinline__ int h_map(const Position& p) const {
    return O * plane_size() + (plane(p) * W + p.w) * I + p.i;
  }
  __device__ __forceinline__ int w_map(const Position& p) const {
    return O * I * (H + T) * W + (plane(p) * H + p.h) * I + p.i;
  }

  __device__ __forceinline__ Position position(int offset) const {
    Position p;
    p.i = offset % I, offset /= I;
    p.w = offset % W, offset /= W;
    p.h = offset % H, offset /= H;
    p.t = time_inside ? offset % T : offset / O;
    p.o = time_inside ? offset / T : offset % O;
    return p;
  }
  // Moves to the next element in storage.
  __device__ __forceinline__ void advance(Position& p) const {
    if (++p.i < I) return;
    p.i = 0;
    if (++p.w < W) return;
    p.w = 0;
    if (++p.h < H) return;
    p.h = 0;
    // No reference to the member that moves first: choosing between members by address puts them into local memory.
    if (time_inside) {
      if (++p.t < T) return;
      p.t = 0, ++p.o;
    } else {
      if (++p.o < O) return;
      p.o = 0, ++p.t;
    }
  }
};

// V neighbours in memory, moved by one instruction where that takes 16 bytes.
template <class T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Vector {
  T at[V];
};

// Indices along a pooled axis, of 1, 2 or 4 bytes each, little-endian.
struct Indices {
  void* data;
  int bytes;

  __device__ __forceinline__ int load(int64_t k) const {
    const uint8_t* from = static_cast<const uint8_t*>(data) + k * bytes;
    int index = from[0];
    if (bytes > 1) index |= from[1] << 8;
    if (bytes > 2) index |= from[2] << 16 | from[3] << 24;
    return index;
  }
  __device__ __forceinline__ void store(int64_t k, int index) const {
    if (bytes == 1)
      static_cast<uint8_t*>(data)[k] = static_cast<uint8_t>(index);
    else if (bytes == 2)
      static_cast<int16_t*>(data)[k] = static_cast<int16_t>(index);
    else
      static_cast<int32_t*>(data)[k] = index;
  }
};

// G: the mean of the maps of a gate [B, M], 1 without a gate.
template <class A>
struct GateField {
  static constexpr int kAbsent = 1;

  const A* maps;
  int context;

  explicit GateField(Gate gate) : maps(static_cast<const A*>(gate.maps)), context(gate.context) {}

  __device__ __forceinline__ A channel(const Volume<A>& v, int64_t clip, const Position& p) const {
    return maps[clip * v.packed(kChannel) + v.channel_map(p)];
  }
  __device__ __forceinline__ A spacetime(const Volume<A>& v, int64_t clip, const Position& p) const {
    const A* map = maps + clip * v.packed(kSpacetime);
    return (map[v.t_map(p)] + map[v.h_map(p)] + map[v.w_map(p)]) * (A(1) / 3);
  }
};

// U: the gradients [B, 2, M] of pooled features, handed back to the elements that were pooled; 0 without any.
template <class A>
struct UnpooledField {
  static constexpr int kAbsent = 0;

  const A* grad;
  Indices argmax;
  int context;

  explicit UnpooledField(Unpooled u)
      : grad(static_cast<const A*>(u.grad)), argmax{const_cast<void*>(u.argmax), u.index_bytes}, context(u.context) {}

  __device__ __forceinline__ A channel(const Volume<A>& v, int64_t clip, const Position& p) const {
    return term(v, clip, v.channel_map(p), p.channel(), v.per_c);
  }
  __device__ __forceinline__ A spacetime(const Volume<A>& v, int64_t clip, const Position& p) const {
    return term(v, clip, v.t_map(p), p.t, v.per_t) + term(v, clip, v.h_map(p), p.h, v.per_h) +
           term(v, clip, v.w_map(p), p.w, v.per_w);
  }

 private:
  __device__ __forceinline__ A term(const Volume<A>& v, int64_t clip, int k, int index, A per_length) const {
    const int packed = v.packed(context);
    const A* at_max = grad + 2 * clip * packed + k;
    const A here = argmax.load(clip * packed + k) == index ? *at_max : A(0);
    return at_max[packed] * per_length + here;
  }
};

// A field at V neighbours in memory, the first of which is at p.
template <int V, class A, template <class> class Field>
__device__ __forceinline__ Vector<A, V> spread(const Field<A>& field, const Volume<A>& v, int64_t clip, Position p) {
  Vector<A, V> values;
  if (field.context == kNone) {
#pragma unroll
    for (int k = 0; k < V; ++k) values.at[k] = Field<A>::kAbsent;
  } else if (field.context == kChannel) {
#pragma unroll
    for (int k = 0; k < V; ++k, v.advance(p)) values.at[k] = field.channel(v, clip, p);
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k, v.advance(p)) values.at[k] = field.spacetime(v, clip, p);
  }
  return values;
}

}  // namespace aia::cuda
