// Planes met row by row, with lanes along the positions of a row: what a pass needs that meets spacetime maps, of which
// the H map has one row for all rows of a plane, and the W map one number for each.
//
// A row is whole vectors, the last of which overlaps the one before it. A row that is shorter than a vector is masked,
// or where masks are dear met with what follows it, if there is room: the next rows overwrite what is stored there.
#pragma once

#include "planes.h"

namespace aia::cpu::AIA_CPU_LEVEL {

// How rows are held: as one vector, or as several. Where kPair, a row is half a vector, and a vector has a row of each
// of two channels.
template <bool one, bool pair>
struct RowKind {
  static constexpr bool kOne = one, kPair = pair;
  static constexpr int kChannels = pair ? 2 : 1, kSide = kLanes / kChannels;
};

// Calls body with the RowKind of rows of W elements.
template <class A, class Body>
AIA_INLINE void with_rows(int64_t W, Body&& body) {
  if constexpr (kLoadsHalves<A>)
    if (W <= kLanes / 2) return body(RowKind<true, true>{});
  if (W <= kLanes)
    body(RowKind<true, false>{});
  else
    body(RowKind<false, false>{});
}

// Vectors of a row.
template <class Kind>
int64_t vectors_of(const Volume& x) {
  return Kind::kOne ? 1 : (x.W + kLanes - 1) / kLanes;
}

// Rows [h, h + rows) of the plane of channel c, in frame t of clip b; where Kind has pairs, and there is one more
// channel, of the next one too. `ahead` is the distance in elements of x to what will be met a while later, which the
// hardware does not foresee. All numbers are its own: a compiler would load those of a Volume again after each store.
template <class Kind>
struct RowPlane {
  int64_t b, t, c, h, rows, ahead;
  int64_t H, W, vectors;                 // of a row
  int64_t in_x, in_t, in_h, in_w, in_c;  // where it begins in x, and in the maps [C, H, W], [T, C, W], [T, C, H] and
                                         // [T, H, W] of a clip
  bool single;                           // the second channel of a pair is the first once more

  AIA_INLINE RowPlane(const Volume& x, int64_t b, int64_t t, int64_t c, int64_t h, int64_t rows, int64_t channels,
                      int64_t ahead)
      : b(b),
        t(t),
        c(c),
        h(h),
        rows(rows),
        ahead(ahead),
        H(x.H),
        W(x.W),
        vectors(vectors_of<Kind>(x)),
        in_x(b * x.stride_b + t * x.stride_t + c * x.stride_c + h * x.W),
        in_t((c * x.H + h) * x.W),
        in_h(x.map_t() + (t * x.C + c) * x.W),
        in_w(x.map_t() + x.map_h() + (t * x.C + c) * x.H + h),
        in_c((t * x.H + h) * x.W),
        single(!Kind::kPair || c + 1 >= channels) {}

  // The same rows of a later frame.
  AIA_INLINE RowPlane later(const Volume& x, int64_t frames) const {
    RowPlane plane = *this;
    plane.t += frames, plane.in_x += frames * x.stride_t, plane.in_c += frames * H * W;
    plane.in_h += frames * x.C * W, plane.in_w += frames * x.C * H;
    return plane;
  }

  // From the first channel of a pair to the second, where channels lie `stride` elements apart.
  int64_t second(int64_t stride) const { return single ? 0 : stride; }
  // The distance to what the r-th row asks for. The channels of a pair ask in turns: two short rows are one line.
  int64_t ahead_of(int64_t r, int64_t second) const { return Kind::kPair && r & 1 ? ahead + second : ahead; }
  // Lanes of a row that is met alone.
  int lanes() const { return static_cast<int>(std::min<int64_t>(W, Kind::kSide)); }

  // Rows, the first ones, that are met with what follows them without meeting row `end` of the plane.
  int64_t whole_rows(int64_t end) const {
    const int64_t room = (end - h) * W - Kind::kSide;
    return room < 0 ? 0 : std::min(rows, room / W + 1);
  }
  // Calls body(r, lanes) for the rows, in ascending order: so many lanes of each half may be met.
  template <class Body>
  AIA_INLINE void for_rows(Body&& body) const {
    for_rows_before(H, body);
  }
  // The same where rows are stored to x one after the other: what a store puts behind a row is overwritten.
  template <class Body>
  AIA_INLINE void for_stored_rows(Body&& body) const {
    if constexpr (Kind::kOne && kMasks) {
      const int64_t whole = whole_rows(h + rows);
      const Part part{lanes()};
      for (int64_t r = 0; r < whole; ++r) body(r, PartBefore{part});
      for (int64_t r = whole; r < rows; ++r) body(r, part);
    } else {
      for_rows(body);
    }
  }
  // The same where body stores to a map whose next rows another thread may have stored already.
  template <class Body>
  AIA_INLINE void for_own_rows(Body&& body) const {
    for_rows_before(h + rows, body);
  }
  // The same: no lane lies in row `end` of the plane, or behind it.
  template <class Body>
  AIA_INLINE void for_rows_before(int64_t end, Body&& body) const {
    constexpr std::integral_constant<int, Kind::kSide> full;
    if constexpr (!Kind::kOne) {
      for (int64_t r = 0; r < rows; ++r) body(r, full);
    } else if constexpr (kMasks) {
      const Part part{lanes()};
      for (int64_t r = 0; r < rows; ++r) body(r, part);
    } else {
      const int64_t whole = whole_rows(end);
      for (int64_t r = 0; r < whole; ++r) body(r, full);
      for (int64_t r = whole; r < rows; ++r) body(r, lanes());
    }
  }
  // Calls body(j, column) for the vectors of a row.
  template <class Body>
  AIA_INLINE void for_vectors(Body&& body) const {
    const int64_t last = Kind::kOne ? 0 : W - kLanes;
    int64_t j = 0;
    if constexpr (!Kind::kOne)
      for (int64_t i = 0; i < last; ++j, i += kLanes) body(j, i);
    body(j, last);
  }
};

// Runs of more elements than this would not stay in the L2 cache till they are met; of what is met in the order of
// memory what follows soon is asked for.
constexpr int64_t kLongRun = 16384, kSoon = 2048;

// The distance in elements of x from a run of channels, `group` at a time from `first` on, in frame t of clip b, to
// what is met behind it: the same channels `frames` later or, at the end of a clip, the next channels or the next clip.
inline int64_t next_run(const Volume& x, int64_t b, int64_t t, int64_t first, int64_t group, int64_t frames) {
  if (t + frames < x.T) return frames * x.stride_t;
  const int64_t to_group = first + group < x.C ? group * x.stride_c : x.stride_b - first * x.stride_c;
  return (b + 1 < x.B || first + group < x.C ? to_group : 0) - t * x.stride_t;
}

// The planes of a unit of an elementwise pass that meets spacetime maps, in the order of memory: a fresh page is
// cleared when it is first met, and is best written while it is in cache. Calls each(plane) or, where there are
// registers for the H maps of two frames, each(plane, plane of the next frame): they share what the T map says.
template <class Kind, class Each>
AIA_INLINE void for_row_planes(const Volume& x, int64_t unit, Each&& each) {
  const int64_t group = group_channels(x), groups = (x.C + group - 1) / group;
  const int64_t b = unit / groups, first = unit % groups * group, last = std::min(x.C, first + group);
  const auto meet = [&](int64_t t, auto... next) {
    const int64_t frames = 1 + sizeof...(next);
    const int64_t ahead = group * x.H * x.W > kLongRun ? kSoon : next_run(x, b, t, first, group, frames);
    const auto plane = [&](int64_t t, int64_t c) { return RowPlane<Kind>(x, b, t, c, 0, x.H, last, ahead); };
    for (int64_t c = first; c < last; c += Kind::kChannels) each(plane(t, c), plane(next, c)...);
  };
  int64_t t = 0;
  if constexpr (Kind::kOne && kMasks)
    for (; t + 2 <= x.T; t += 2) meet(t, t + 1);
  for (; t < x.T; ++t) meet(t);
}

// Meets the rows of the planes of for_row_planes one after the other: row.store(of_t, i, column, lanes) stores a vector
// of each, where of_t, row.over_t(i, lanes), is of all frames.
template <class Kind, class... Frame>
AIA_INLINE void store_rows(const RowPlane<Kind>& at, const Frame&... frame) {
  at.for_stored_rows([&](int64_t r, auto lanes) {
    const auto meet = [&](const auto& row, const auto&... others) {
      at.for_vectors([&](int64_t, int64_t column) {
        const int64_t i = as_index(r * at.W + column);
        const auto of_t = row.over_t(i, lanes);
        row.store(of_t, i, column, lanes);
        (others.store(of_t, i, column, lanes), ...);
      });
    };
    meet(frame.row(r)...);
  });
}

// A vector of a row; of a pair a half from each of two places.
template <class Kind, class T, class Lanes>
AIA_INLINE Vec<Accumulate<T>> load_row(const T* p, int64_t second, Lanes n) {
  if constexpr (Kind::kPair)
    return load_from_each(p, p + second, n);
  else
    return load(p, n);
}
// A row of a map that the channels of a pair share.
template <class Kind, class A, class Lanes>
AIA_INLINE Vec<A> load_shared_row(const A* p, Lanes n) {
  if constexpr (Kind::kPair)
    return load_in_both(p, n);
  else
    return load(p, n);
}
template <class Kind, class T, class Lanes>
AIA_INLINE void store_row(T* p, int64_t second, Vec<Accumulate<T>> v, Lanes n) {
  if constexpr (Kind::kPair)
    store_to_each(p, p + second, v, n);
  else
    store(p, v, n);
}

// The same, and asks for what lies `ahead`, into the L2 cache: much else is met before it.
template <class Kind, class T, class Lanes>
AIA_INLINE Vec<Accumulate<T>> load_row_ahead(const T* p, int64_t second, int64_t ahead, Lanes n) {
  __builtin_prefetch(p + ahead, 0, 2);
  return load_row<Kind>(p, second, n);
}
template <class Kind, class T, class Lanes>
AIA_INLINE void store_row_ahead(T* p, int64_t second, int64_t ahead, Vec<Accumulate<T>> v, Lanes n) {
  __builtin_prefetch(p + ahead, 0, 2);
  store_row<Kind>(p, second, v, n);
}

// A number in every lane; of a pair one in each half.
template <class Kind, class A>
AIA_INLINE Vec<A> spread(const A* p, int64_t second) {
  if constexpr (Kind::kPair)
    return splat_each(p[0], p[second]);
  else
    return splat(*p);
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
