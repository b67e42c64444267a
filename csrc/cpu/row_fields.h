// The two fields that packed maps span over x, row by row of a plane: the gate field G and the unpooled field U.
//
// field.plane(at) is what all rows of a plane share, plane.row(r) what the vectors of its r-th row share, and
// row(of_t, i, column, lanes) the field on the vector of that row that begins in that column, at place i of the plane,
// where of_t, row.over_t(i, lanes), is that of any frame. The context of a field is a constant, kAtMostChannel (that,
// or none) or kAnyContext.
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

// The context of a field of the context kContext; `given` is what is known only when it runs.
template <int kContext>
AIA_INLINE int known_context(int given) {
  return kContext < 0 ? given : kContext;
}

// Whether it is `is`.
template <int kContext>
AIA_INLINE bool context_is(int is, int given) {
  if (kContext == kAtMostChannel && is == kSpacetime) return false;
  return known_context<kContext>(given) == is;
}

template <class A, class Kind, int kContext>
class GateRows {
 public:
  GateRows(const Volume& x, const Gate& gate)
      : maps_(static_cast<const A*>(gate.maps)),
        context_(known_context<kContext>(gate.context)),
        packed_(x.packed(context_)) {}

  struct Row {
    int context;
    const A* map;
    int64_t second;
    Vec<A> of_w;
    const HeldRow<A, Kind>* of_h;  // of the plane: a copy would go through memory

    // What the frames share.
    template <class Lanes>
    AIA_INLINE Vec<A> over_t(int64_t i, Lanes n) const {
      return context_is<kContext>(kSpacetime, context) ? load_row<Kind>(map + i, second, n) : Vec<A>{};
    }
    template <class Lanes>
    AIA_INLINE Vec<A> operator()(Vec<A> of_t, int64_t i, int64_t column, Lanes n) const {
      if (context_is<kContext>(kSpacetime, context)) return (of_t + (*of_h)(column)) * A(1.0 / 3) + of_w;
      return load_shared_row<Kind>(map + i, n);
    }
    // value * G, or the value alone where there is no gate.
    template <class Lanes>
    AIA_INLINE Vec<A> times(Vec<A> value, Vec<A> of_t, int64_t i, int64_t column, Lanes n) const {
      return context_is<kContext>(kNone, context) ? value : value * (*this)(of_t, i, column, n);
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
    plane.context = context_, plane.second = 0;
    const A* clip = maps_ + at.b * packed_;
    if (context_is<kContext>(kSpacetime, context_)) {
      plane.map = clip + at.in_t, plane.w = clip + at.in_w;
      plane.second = at.second(at.H * at.W), plane.second_w = at.second(at.H);
      plane.of_h = HeldRow<A, Kind>(at, clip + at.in_h, at.second(at.W));
    } else {
      plane.map = context_is<kContext>(kNone, context_) ? nullptr : clip + at.in_c;
    }
    return plane;
  }

 private:
  const A* maps_;
  int context_;
  int64_t packed_;
};

// Stored: how its indices lie in memory.
template <class A, class Stored, class Kind, int kContext>
class UnpooledRows {
  using Of = Indices<A, Stored>;
  using I = typename Of::I;

 public:
  UnpooledRows(const Volume& x, const Unpooled& from)
      : grad_(static_cast<const A*>(from.grad)),
        argmax_(static_cast<const char*>(from.argmax)),
        context_(known_context<kContext>(from.context)),
        bytes_(Stored::kCount ? Stored::kCount : from.index_bytes),
        packed_(x.packed(context_)),
        share_t_(A(1) / static_cast<A>(x.T)),
        share_h_(A(1) / static_cast<A>(x.H)),
        share_w_(A(1) / static_cast<A>(x.W)),
        share_c_(A(1) / static_cast<A>(x.C)) {}

  struct OfT {
    Vec<A> mean, peak;
    I argmax;
  };
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

    // What the frames share.
    template <class Lanes>
    AIA_INLINE OfT over_t(int64_t i, Lanes n) const {
      OfT of_t{};
      if (!context_is<kContext>(kSpacetime, context)) return of_t;
      of_t.mean = load_row<Kind>(mean + i, second, n) * share, of_t.peak = load_row<Kind>(peak + i, second, n);
      of_t.argmax = load_indices<A, Stored, Kind>(argmax + i * bytes, second, bytes, n);
      return of_t;
    }
    template <class Lanes>
    AIA_INLINE Vec<A> operator()(const OfT& of_t, int64_t i, int64_t column, Lanes n) const {
      if (!context_is<kContext>(kSpacetime, context)) {
        I where = Of::load(argmax + i * bytes, bytes, n);
        if (Kind::kPair) where = Of::halves(where, where);
        return Of::add_where_equal(where, channel, load_shared_row<Kind>(mean + i, n) * share,
                                   load_shared_row<Kind>(peak + i, n));
      }
      Vec<A> u = of_t.mean + (of_h->mean(column) * share_h + mean_w);
      u = Of::add_where_equal(of_t.argmax, t, u, of_t.peak);
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
    plane.context = context_, plane.bytes = bytes_, plane.second = 0;
    const A* clip = grad_ + at.b * 2 * packed_;
    const char* argmax = argmax_ + at.b * packed_ * bytes_;
    const auto begin = [&](int64_t offset) {
      plane.peak = clip + offset, plane.mean = plane.peak + packed_, plane.argmax = argmax + offset * bytes_;
    };
    if (context_is<kContext>(kSpacetime, context_)) {
      begin(at.in_t);
      plane.h = at.h, plane.w = at.in_w - at.in_t, plane.t = Of::splat(at.t);
      plane.second = at.second(at.H * at.W), plane.second_w = at.second(at.H);
      plane.share = share_t_, plane.share_h = share_h_, plane.share_w = share_w_;
      const int64_t second = at.second(at.W);
      plane.of_h.peak = HeldRow<A, Kind>(at, clip + at.in_h, second);
      plane.of_h.mean = HeldRow<A, Kind>(at, clip + packed_ + at.in_h, second);
      plane.of_h.argmax = HeldIndices<A, Stored, Kind>(at, argmax + at.in_h * bytes_, second, bytes_);
    } else {
      begin(at.in_c);
      plane.share = share_c_;
      plane.channel = Of::splat(at.c);
      if (Kind::kPair) plane.channel = Of::halves(plane.channel, Of::splat(at.c + at.second(1)));
    }
    return plane;
  }
  bool given() const { return !context_is<kContext>(kNone, context_); }

 private:
  static AIA_INLINE int64_t index_at(const char* p, int bytes) {
    if (bytes == 1) return *reinterpret_cast<const uint8_t*>(p);
    return bytes == 2 ? *reinterpret_cast<const int16_t*>(p) : *reinterpret_cast<const int32_t*>(p);
  }

  const A* grad_;
  const char* argmax_;
  int context_, bytes_;
  int64_t packed_;
  A share_t_, share_h_, share_w_, share_c_;
};

}  // namespace aia::cpu::AIA_CPU_LEVEL
