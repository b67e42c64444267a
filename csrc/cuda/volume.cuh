// Geometry of one clip, and the two fields that maps spread over it: gates G and unpooled gradients U
// (aia_kernels/schemas.py).
#pragma once

#include "passes.h"
#include "vector.cuh"

namespace aia::cuda {

// An element of a clip. Its channel is o + i, one of which is always 0.
struct Position {
  int t, o, h, w, i;

  __device__ __forceinline__ int channel() const { return o + i; }
};

// Maps move in vectors of so many elements, beside as many of x.
template <class A>
constexpr int kGroup = 16 / sizeof(A);
template <int V, class A>
constexpr int kGroupOf = V < kGroup<A> ? V : kGroup<A>;

// One clip of x. All three orders are [T and O in some order, H, W, I], with the channels on O or on I.
template <class A>
struct Volume {
  int T, O, H, W, I;
  bool time_inside;                    // [O, T, H, W] instead of [T, O, H, W, I]
  Divisor by_outer, by_h, by_w, by_i;  // by_outer: by T if that is inside, else by O
  A per_t, per_h, per_w, per_c;        // reciprocals of the lengths: a division costs a subroutine and its stack
  // Of groups of kGroup<A> elements of a vector of x: none leaves a row, so that it meets vectors or single elements of
  // every spacetime map; it meets a vector of the map pooled over T; it meets a vector or a single element of the
  // channel map.
  bool in_rows = false, runs_t = false, runs_c = false;

  explicit Volume(const Shape& s)
      : T(s.T),
        O(s.order == Order::kTHWC ? 1 : s.C),
        H(s.H),
        W(s.W),
        I(s.order == Order::kTHWC ? s.C : 1),
        time_inside(s.order == Order::kCTHW),
        by_outer(time_inside ? T : O),
        by_h(H),
        by_w(W),
        by_i(I),
        per_t(A(1) / s.T),
        per_h(A(1) / s.H),
        per_w(A(1) / s.W),
        per_c(A(1) / s.C) {}

  // For kernels that move x in vectors, beside maps that begin at addresses aligned or not.
  Volume with_vectors(bool aligned) const {
    Volume v = *this;
    if (!aligned) return v;
    const int plane = H * W, n = kGroup<A>;
    const bool channels = I > 1 && I % n == 0, whole = I == 1 && packed(kSpacetime) % n == 0;
    v.in_rows = channels || (whole && W % n == 0);
    v.runs_t = channels || (whole && (plane % n == 0 || (!time_inside && O * plane % n == 0)));
    v.runs_c = channels || (I == 1 && plane % n == 0);
    return v;
  }

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
    const int column = by_i.divide(offset);
    Position p{0, 0, 0, column, offset};
    p.h = by_w.divide(p.w);
    int plane = by_h.divide(p.h);
    const int outer = by_outer.divide(plane);
    p.t = time_inside ? plane : outer;
    p.o = time_inside ? outer : plane;
    return p;
  }
  // Moves on by `count` elements in storage.
  template <int kCount>
  __device__ __forceinline__ void advance(Position& p) const {
    // No reference to the member that moves first: choosing between members by address puts them into local memory.
    p.i += kCount;
    if (p.i < I) return;
    int carry = carry_over(p.i, I);
    p.w += carry;
    if (p.w < W) return;
    carry = carry_over(p.w, W);
    p.h += carry;
    if (p.h < H) return;
    carry = carry_over(p.h, H);
    if (time_inside) {
      p.t += carry;
      p.o += carry_over(p.t, T);
    } else {
      p.o += carry;
      p.t += carry_over(p.o, O);
    }
  }

 private:
  static __device__ __forceinline__ int carry_over(int& index, int length) {
    int carry = 0;
    while (index >= length) index -= length, ++carry;
    return carry;
  }
};

// Indices along a pooled axis, of 1, 2 or 4 bytes each, little-endian.
struct Indices {
  void* data;
  int bytes;

  template <int V>
  __device__ __forceinline__ Vector<int, V> load(int64_t k) const {
    if (bytes == 1) return load_as<uint8_t, V>(k);
    return bytes == 2 ? load_as<int16_t, V>(k) : load_as<int32_t, V>(k);
  }
  template <int V>
  __device__ __forceinline__ void store(int64_t k, const Vector<int, V>& indices) const {
    if (bytes == 1)
      store_as<uint8_t>(k, indices);
    else if (bytes == 2)
      store_as<int16_t>(k, indices);
    else
      store_as<int32_t>(k, indices);
  }

 private:
  template <class Index, int V>
  __device__ __forceinline__ Vector<int, V> load_as(int64_t k) const {
    const auto narrow = load_vector<V>(static_cast<const Index*>(data) + k);
    Vector<int, V> indices;
#pragma unroll
    for (int j = 0; j < V; ++j) indices.at[j] = narrow.at[j];
    return indices;
  }
  template <class Index, int V>
  __device__ __forceinline__ void store_as(int64_t k, const Vector<int, V>& indices) const {
    Vector<Index, V> narrow;
#pragma unroll
    for (int j = 0; j < V; ++j) narrow.at[j] = static_cast<Index>(indices.at[j]);
    store_vector(static_cast<Index*>(data) + k, narrow);
  }
};

// The fields. Of one map of a field, `run` reads V neighbours from element k on, for elements of x that have one index
// along the pooled axis, and `one` reads element k alone, for elements of x that follow one another along that axis.

// G: the mean of the maps of a gate [B, M], 1 without a gate.
template <class A>
struct GateField {
  static constexpr int kAbsent = 1;

  const A* maps;
  int context;

  __host__ __device__ explicit GateField(Gate gate) : maps(static_cast<const A*>(gate.maps)), context(gate.context) {}
  bool aligned() const { return are_aligned({maps}); }

  __device__ __forceinline__ A share() const { return context == kSpacetime ? A(1) / 3 : A(1); }
  template <int V>
  __device__ __forceinline__ Vector<A, V> run(const Volume<A>& v, int64_t clip, int k, int, A) const {
    return load_vector<V>(of_clip(v, clip) + k);
  }
  template <int V>
  __device__ __forceinline__ Vector<A, V> one(const Volume<A>& v, int64_t clip, int k, int, A) const {
    const A map = of_clip(v, clip)[k];
    Vector<A, V> values;
#pragma unroll
    for (int j = 0; j < V; ++j) values.at[j] = map;
    return values;
  }

 private:
  __device__ __forceinline__ const A* of_clip(const Volume<A>& v, int64_t clip) const {
    const A* at = maps + clip * v.packed(context);
    opaque(at);  // else the offset of the clip is added for each load
    return at;
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
  bool aligned() const { return are_aligned({grad, argmax.data}); }

  __device__ __forceinline__ A share() const { return 1; }
  template <int V>
  __device__ __forceinline__ Vector<A, V> run(const Volume<A>& v, int64_t clip, int k, int index, A per_length) const {
    const int packed = v.packed(context);
    const A* at_max = grad + 2 * clip * packed + k;
    const auto maximum = load_vector<V>(at_max);
    auto values = load_vector<V>(at_max + packed);
    const auto indices = argmax.template load<V>(clip * packed + k);
#pragma unroll
    for (int j = 0; j < V; ++j)
      values.at[j] = values.at[j] * per_length + (indices.at[j] == index ? maximum.at[j] : A(0));
    return values;
  }
  template <int V>
  __device__ __forceinline__ Vector<A, V> one(const Volume<A>& v, int64_t clip, int k, int index, A per_length) const {
    const int packed = v.packed(context);
    const A* at_max = grad + 2 * clip * packed + k;
    const A maximum = *at_max, mean = at_max[packed] * per_length;
    const int chosen = argmax.template load<1>(clip * packed + k).at[0];
    Vector<A, V> values;
#pragma unroll
    for (int j = 0; j < V; ++j) values.at[j] = mean + (chosen == index + j ? maximum : A(0));
    return values;
  }
};

// A field at V neighbours in memory, one or a group, the first of which is at p.
template <int V, class A, template <class> class Field>
__device__ __forceinline__ Vector<A, V> spread(const Field<A>& field, const Volume<A>& v, int64_t clip, Position p) {
  Vector<A, V> values;
  if (field.context == kNone) {
#pragma unroll
    for (int k = 0; k < V; ++k) values.at[k] = Field<A>::kAbsent;
    return values;
  }
  if (field.context == kChannel) {
    if constexpr (V > 1) {
      if (!v.runs_c) {
#pragma unroll
        for (int k = 0; k < V; ++k, v.template advance<1>(p))
          values.at[k] = field.template run<1>(v, clip, v.channel_map(p), p.channel(), v.per_c).at[0];
        return values;
      }
      if (v.I > 1) return field.template one<V>(v, clip, v.channel_map(p), p.channel(), v.per_c);
    }
    return field.template run<V>(v, clip, v.channel_map(p), p.channel(), v.per_c);
  }
  const bool vector_t = V == 1 || v.runs_t;
  if (vector_t) values = field.template run<V>(v, clip, v.t_map(p), p.t, v.per_t);
  if constexpr (V > 1) {
    if (!v.in_rows && vector_t && v.I == 1) {
      // They leave rows, and perhaps planes, but not a frame. A step moves on by one in the map over W where a row
      // ends, and in the map over H but for a way back to the first column.
      int over_h = v.h_map(p), over_w = v.w_map(p);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        values.at[k] += field.template run<1>(v, clip, over_h, p.h, v.per_h).at[0];
        values.at[k] += field.template run<1>(v, clip, over_w, p.w, v.per_w).at[0];
        values.at[k] *= field.share();
        ++p.w, ++over_h;
        if (p.w < v.W) continue;
        p.w = 0, ++p.h, ++over_w;
        if (p.h < v.H)
          over_h -= v.W;
        else
          p.h = 0;
      }
      return values;
    }
    if (!v.in_rows) {
#pragma unroll
      for (int k = 0; k < V; ++k, v.template advance<1>(p)) {
        if (!vector_t) values.at[k] = field.template run<1>(v, clip, v.t_map(p), p.t, v.per_t).at[0];
        values.at[k] += field.template run<1>(v, clip, v.h_map(p), p.h, v.per_h).at[0];
        values.at[k] += field.template run<1>(v, clip, v.w_map(p), p.w, v.per_w).at[0];
        values.at[k] *= field.share();
      }
      return values;
    }
  }
  const auto over_h = field.template run<V>(v, clip, v.h_map(p), p.h, v.per_h);
  const auto over_w = V == 1 || v.I > 1 ? field.template run<V>(v, clip, v.w_map(p), p.w, v.per_w)
                                        : field.template one<V>(v, clip, v.w_map(p), p.w, v.per_w);
#pragma unroll
  for (int k = 0; k < V; ++k) values.at[k] = (values.at[k] + over_h.at[k] + over_w.at[k]) * field.share();
  return values;
}

// Calls body(first) for the first element of each group of V neighbours in memory; p, the position of the first of all,
// moves along.
template <int V, class A, class Body>
__device__ __forceinline__ void for_groups(const Volume<A>& v, Position& p, Body&& body) {
#pragma unroll
  for (int first = 0; first < V; first += kGroupOf<V, A>) {
    body(first);
    if (first + kGroupOf<V, A> < V) v.template advance<kGroupOf<V, A>>(p);
  }
}

}  // namespace aia::cuda
