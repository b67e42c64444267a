// The two fields that packed maps span over x, row by row of a plane: the gate field G and the unpooled field U.
//
// field.plane(at) is what all rows of a plane share, plane.row(r) what the vectors of its r-th row share, and
// row(i, column, lanes) the field on the vector of that row that begins in that column, at place i of the plane. The
// context of a field is a constant, kAtMostChannel (that, or none) or kAnyContext.
#pragma once

#include "indices.h"
#include "rows.h"

namespace aia::cpu::AIA_CPU_LEVEL {

constexpr int kAnyContext = -1, kAtMostChannel = -2;

// A row of a map that all rows of a plane meet: in a register where it is one vector.
template <class A, class Kind, bool one = Kind::kOne>
class HeldRow {
 public:
  HeldRow() = default;
  AIA_INLINE HeldRow(const RowPlane<Kind>&, const A* p, int64_t) : p_(p) {}
  AIA_INLINE Vec<A> operator()(int64_t column) const { return load(p_ + column); }

 private:
  const A* p_;
};
template <class A, class Kind>
class HeldRow<A, Kind, true> {
 public:
  HeldRow() = default;
  // The rows of a pair lie `second` apart.
  AIA_INLINE HeldRow(const RowPlane<Kind>& at, const A* p, int64_t second)
      : held_(load_row<Kind>(p, second, Part{at.lanes()})) {}
  AIA_INLINE Vec<A> operator()(int64_t) const { return held_; }

 private:
  Vec<A> held_;
};

// The same for indices.
template <class A, class Stored, class Kind, class Lanes>
AIA_INLINE auto load_indices(const char* p, int64_t second, int bytes, Lanes n) {
  using Of = Indices<A, Stored>;
  if constexpr (Kind::kPair) {
    return Of::halves(Of::load(p, bytes, n), Of::load(p + second * bytes, bytes, n));
  } else {
    return Of::load(p, bytes, n);
  }
}
template <class A, class Stored, class Kind, bool one = Kind::kOne>
class HeldIndices {
 public:
  HeldIndices() = default;
  AIA_INLINE HeldIndices(const RowPlane<Kind>&, const char* p, int64_t, int) : p_(p) {}
  AIA_INLINE auto operator()(int64_t column, int bytes) const {
    return Indices<A, Stored>::load(p_ + column * bytes, bytes, std::integral_constant<int, kLanes>{});
  }

 private:
  const char* p_;
};
template <class A, class Stored, class Kind>
class HeldIndices<A, Stored, Kind, true> {
 public:
  HeldIndices() = default;
  AIA_INLINE HeldIndices(const RowPlane<Kind>& at, const char* p, int64_t second, int bytes)
      : held_(load_indices<A, Stored, Kind>(p, second, bytes, Part{at.lanes()})) {}
  AIA_INLINE auto operator()(int64_t, int) const { return held_; }

 private:
  typename Indices<A, Stored>::I held_;
};

// The columns of a vector that begins in column `first`.
template <class Of, class Kind>
AIA_INLINE auto counting(int64_t first) {
  if constexpr (Kind::kPair)
    return Of::halves(Of::counting(0), Of::counting(0));
  else
    return Of::counting(first);
}

// Whether a field of the context kContext is of the context `is`; `given` is what is known only when it runs.
template <int kContext>
AIA_INLINE bool context_is(int is, int given) {
  if (kContext == kAtMostChannel && is == kSpacetime) return false;
  return (kContext < 0 ? given : kContext) == is;
}

// Rows of a map of a field of the context kContext: channels share those of channel maps.
template <int kContext>
constexpr bool kShared = kContext == kChannel || kContext == kAtMostChannel;
template <class Kind, int kContext, class A, class Lanes>
AIA_INLINE Vec<A> load_map_row(const A* p, int64_t second, Lanes n) {
  if constexpr (kShared<kContext>)
    return load_shared_row<Kind>(p, n);
  else
    return load_row<Kind>(p, second, n);
}

template <class A, class Kind, int kContext>
class GateRows {
 public:
  GateRows(const Volume& x, const Gate& gate) : x_(x), gate_(gate) {}

  struct Row {
    int context;
    const A* map;
    int64_t second;
    Vec<A> of_w;
    const HeldRow<A, Kind>* of_h;  // of the plane: a copy would go through memory

    template <class Lanes>
    AIA_INLINE Vec<A> operator()(int64_t i, int64_t column, Lanes n) const {
      const Vec<A> g = load_map_row<Kind, kContext>(map + i, second, n);
      return context_is<kContext>(kSpacetime, context) ? (g + (*of_h)(column)) * A(1.0 / 3) + of_w : g;
    }
    // value * G, or the value alone where there is no gate.
    template <class Lanes>
    AIA_INLINE Vec<A> times(Vec<A> value, int64_t i, int64_t column, Lanes n) const {
      return context_is<kContext>(kNone, context) ? value : value * (*this)(i, column, n);
    }
  };

  struct Plane {
    int context;
    const A *map, *w;
    int64_t second, second_w;
    HeldRow<A, Kind> of_h;

    AIA_INLINE Row row(int64_t r) const {
      Row row;
      row.context = context, row.map = map, row.second = second;
      if (context_is<kContext>(kSpacetime, context))
        row.of_w = spread<Kind>(w + r, second_w) * A(1.0 / 3), row.of_h = &of_h;
      return row;
    }
  };

  AIA_INLINE Plane plane(const RowPlane<Kind>& at) const {
    Plane plane;
    plane.context = gate_.context, plane.second = 0;
    const A* clip = static_cast<const A*>(gate_.maps) + at.b * x_.packed(gate_.context);
    if (context_is<kContext>(kSpacetime, plane.context)) {
      plane.map = clip + offset_t(at), plane.w = clip + offset_w(at);
      plane.second = at.second(x_.H * x_.W), plane.second_w = at.second(x_.H);
      plane.of_h = HeldRow<A, Kind>(at, clip + offset_h(at), at.second(x_.W));
    } else {
      plane.map = context_is<kContext>(kNone, plane.context) ? nullptr : clip + offset_c(at);
    }
    return plane;
  }

 private:
  const Volume& x_;
  const Gate& gate_;
};

// Stored: how its indices lie in memory.
template <class A, class Stored, class Kind, int kContext>
class UnpooledRows {
  using Of = Indices<A, Stored>;
  using I = typename Of::I;

 public:
  UnpooledRows(const Volume& x, const Unpooled& from) : x_(x), from_(from) {}

  struct OfH {
    HeldRow<A, Kind> peak, mean;
    HeldIndices<A, Stored, Kind> argmax;
  };

  struct Row {
    int context, bytes;
    const A *peak, *mean;
    const char* argmax;
    int64_t second;
    A share, share_h;
    I channel, t, h, of_w;
    Vec<A> mean_w, peak_w;
    const OfH* of_h;

    template <class Lanes>
    AIA_INLINE Vec<A> operator()(int64_t i, int64_t column, Lanes n) const {
      const Vec<A> means = load_map_row<Kind, kContext>(mean + i, second, n) * share;
      const Vec<A> peaks = load_map_row<Kind, kContext>(peak + i, second, n);
      const char* indices = argmax + i * bytes;
      if (!context_is<kContext>(kSpacetime, context)) {
        I where = Of::load(indices, bytes, n);
        if (Kind::kPair) where = Of::halves(where, where);
        return Of::add_where_equal(where, channel, means, peaks);
      }
      Vec<A> u = means + (of_h->mean(column) * share_h + mean_w);
      u = Of::add_where_equal(load_indices<A, Stored, Kind>(indices, second, bytes, n), t, u, peaks);
      u = Of::add_where_equal(of_h->argmax(column, bytes), h, u, of_h->peak(column));
      return Of::add_where_equal(counting<Of, Kind>(column), of_w, u, peak_w);
    }
  };

  struct Plane {
    int context, bytes;
    const A *peak, *mean;
    const char* argmax;
    int64_t h, second, second_w, w;  // w: from the T map to the W map
    A share, share_h, share_w;
    I channel, t;
    OfH of_h;

    AIA_INLINE Row row(int64_t r) const {
      Row row;
      row.context = context, row.bytes = bytes, row.second = second, row.share = share;
      row.peak = peak, row.mean = mean, row.argmax = argmax;
      if (context_is<kContext>(kSpacetime, context)) {
        row.t = t, row.h = Of::splat(h + r), row.share_h = share_h, row.of_h = &of_h;
        row.mean_w = spread<Kind>(mean + w + r, second_w) * share_w;
        row.peak_w = spread<Kind>(peak + w + r, second_w);
        const char* of_w = argmax + (w + r) * bytes;
        row.of_w = Of::splat(index_at(of_w, bytes));
        if (Kind::kPair) row.of_w = Of::halves(row.of_w, Of::splat(index_at(of_w + second_w * bytes, bytes)));
      } else {
        row.channel = channel;
      }
      return row;
    }
  };

  AIA_INLINE Plane plane(const RowPlane<Kind>& at) const {
    Plane plane;
    plane.context = from_.context, plane.second = 0;
    plane.bytes = Stored::kCount ? Stored::kCount : from_.index_bytes;
    const int64_t packed = x_.packed(from_.context);
    const A* clip = static_cast<const A*>(from_.grad) + at.b * 2 * packed;
    const char* argmax = static_cast<const char*>(from_.argmax) + at.b * packed * plane.bytes;
    const auto begin = [&](int64_t offset) {
      plane.peak = clip + offset, plane.mean = plane.peak + packed, plane.argmax = argmax + offset * plane.bytes;
    };
    if (context_is<kContext>(kSpacetime, plane.context)) {
      begin(offset_t(at));
      plane.h = at.h, plane.w = offset_w(at) - offset_t(at), plane.t = Of::splat(at.t);
      plane.second = at.second(x_.H * x_.W), plane.second_w = at.second(x_.H);
      plane.share = A(1) / static_cast<A>(x_.T), plane.share_h = A(1) / static_cast<A>(x_.H);
      plane.share_w = A(1) / static_cast<A>(x_.W);
      const int64_t h = offset_h(at), second = at.second(x_.W);
      plane.of_h.peak = HeldRow<A, Kind>(at, clip + h, second);
      plane.of_h.mean = HeldRow<A, Kind>(at, clip + packed + h, second);
      plane.of_h.argmax = HeldIndices<A, Stored, Kind>(at, argmax + h * plane.bytes, second, plane.bytes);
    } else {
      begin(offset_c(at));
      plane.share = A(1) / static_cast<A>(x_.C);
      plane.channel = Of::splat(at.c);
      if (Kind::kPair) plane.channel = Of::halves(plane.channel, Of::splat(at.c + at.second(1)));
    }
    return plane;
  }
  bool given() const { return !context_is<kContext>(kNone, from_.context); }

 private:
  static AIA_INLINE int64_t index_at(const char* p, int bytes) {
    if (bytes == 1) return *reinterpret_cast<const uint8_t*>(p);
    return bytes == 2 ? *reinterpret_cast<const int16_t*>(p) : *reinterpret_cast<const int32_t*>(p);
  }

  const Volume& x_;
  const Unpooled& from_;
};

}  // namespace aia::cpu::AIA_CPU_LEVEL
