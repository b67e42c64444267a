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
// hardware does not foresee.
template <class Kind>
struct RowPlane {
  const Volume& x;
  int64_t b, t, c, h, rows, ahead;
  int64_t W, vectors;  // of a row; here, as a compiler would load them again after each store
  bool single;         // the second channel of a pair is the first once more

  RowPlane(const Volume& x, int64_t b, int64_t t, int64_t c, int64_t h, int64_t rows, int64_t channels, int64_t ahead)
      : x(x),
        b(b),
        t(t),
        c(c),
        h(h),
        rows(rows),
        ahead(ahead),
        W(x.W),
        vectors(vectors_of<Kind>(x)),
        single(!Kind::kPair || c + 1 >= channels) {}

  // From the first channel of a pair to the second, where channels lie `stride` elements apart.
  int64_t second(int64_t stride) const { return single ? 0 : stride; }
  // Lanes of a row that is met alone.
  int lanes() const { return static_cast<int>(std::min<int64_t>(W, Kind::kSide)); }

  // Calls body(r, lanes) for the rows, in ascending order: so many lanes of each half may be met.
  template <class Body>
  AIA_INLINE void for_rows(Body&& body) const {
    for_rows_before(x.H, body);
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
      const int64_t room = (end - h) * W - Kind::kSide;
      const int64_t whole = room < 0 ? 0 : std::min(rows, room / W + 1);
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

// Where a plane begins in x, and in the maps [C, H, W], [T, C, W], [T, C, H] and [T, H, W] of a clip.
template <class Kind>
int64_t plane_offset(const RowPlane<Kind>& at) {
  return at.b * at.x.stride_b + at.t * at.x.stride_t + at.c * at.x.stride_c + at.h * at.x.W;
}
template <class Kind>
int64_t offset_t(const RowPlane<Kind>& at) {
  return (at.c * at.x.H + at.h) * at.x.W;
}
template <class Kind>
int64_t offset_h(const RowPlane<Kind>& at) {
  return at.x.map_t() + (at.t * at.x.C + at.c) * at.x.W;
}
template <class Kind>
int64_t offset_w(const RowPlane<Kind>& at) {
  return at.x.map_t() + at.x.map_h() + (at.t * at.x.C + at.c) * at.x.H + at.h;
}
template <class Kind>
int64_t offset_c(const RowPlane<Kind>& at) {
  return (at.t * at.x.H + at.h) * at.x.W;
}

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
// cleared when it is first met, and is best written while it is in cache. Calls each(plane).
template <class Kind, class Each>
void for_row_planes(const Volume& x, int64_t unit, Each&& each) {
  const int64_t group = group_channels(x), groups = (x.C + group - 1) / group;
  const int64_t b = unit / groups, first = unit % groups * group, last = std::min(x.C, first + group);
  for (int64_t t = 0; t < x.T; ++t) {
    const int64_t ahead = group * x.H * x.W > kLongRun ? kSoon : next_run(x, b, t, first, group, 1);
    for (int64_t c = first; c < last; c += Kind::kChannels) each(RowPlane<Kind>(x, b, t, c, 0, x.H, last, ahead));
  }
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

// Asks for what lies `ahead`, into the L2 cache: much else is met before it.
template <class Kind, class T>
AIA_INLINE void ask_ahead(const T* p, int64_t second, int64_t ahead) {
  __builtin_prefetch(p + ahead, 0, 2);
  if (Kind::kPair) __builtin_prefetch(p + second + ahead, 0, 2);
}
template <class Kind, class T, class Lanes>
AIA_INLINE Vec<Accumulate<T>> load_row_ahead(const T* p, int64_t second, int64_t ahead, Lanes n) {
  ask_ahead<Kind>(p, second, ahead);
  return load_row<Kind>(p, second, n);
}
template <class Kind, class T, class Lanes>
AIA_INLINE void store_row_ahead(T* p, int64_t second, int64_t ahead, Vec<Accumulate<T>> v, Lanes n) {
  ask_ahead<Kind>(p, second, ahead);
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
