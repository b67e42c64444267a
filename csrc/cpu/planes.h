// Tiles of x where the positions of a plane lie side by side: rows of one plane, or whole planes of some channels, of
// one frame. Lanes are positions. A tile is held as [channels][positions], without gaps.
//
// A plane is met as a run of positions, whatever its rows: whole vectors, the last of which overlaps the one before it.
// What only a row can tell, as the H map and the W map do, is written to a buffer first, row by row.
#pragma once

#include "tile.h"

namespace aia::cpu::AIA_CPU_LEVEL {

// Rows [h, h + rows) of the planes of `channels` channels from c on, in frame t of clip b. All rows, if several.
// `ahead` is the distance in elements to the tile that will be read next, which the hardware does not foresee.
struct Planes {
  int64_t b, t, c, h, rows, channels, ahead;

  int64_t run(const Volume& x) const { return rows * x.W; }  // positions of one plane
  int64_t size(const Volume& x) const { return channels * run(x); }
};

// Where a run begins in x, and in the maps [C, H, W], [T, C, W], [T, C, H] and [T, H, W] of a clip.
inline int64_t run_offset(const Volume& x, const Planes& at, int64_t k) {
  return at.b * x.stride_b + at.t * x.stride_t + (at.c + k) * x.stride_c + at.h * x.W;
}
inline int64_t offset_t(const Volume& x, const Planes& at, int64_t k) { return ((at.c + k) * x.H + at.h) * x.W; }
inline int64_t offset_h(const Volume& x, const Planes& at, int64_t k) {
  return x.map_t() + (at.t * x.C + at.c + k) * x.W;
}
inline int64_t offset_w(const Volume& x, const Planes& at, int64_t k) {
  return x.map_t() + x.map_h() + (at.t * x.C + at.c + k) * x.H + at.h;
}
inline int64_t offset_c(const Volume& x, const Planes& at) { return (at.t * x.H + at.h) * x.W; }

// Loads from a run of x, and asks for the same place of the next tile.
template <class T, class Lanes>
AIA_INLINE Vec<Accumulate<T>> load_ahead(const T* p, int64_t ahead, Lanes n) {
  __builtin_prefetch(p + ahead);
  return load(p, n);
}

// A buffer for a tile of so many elements. Whole vectors may be written and read at its last elements.
template <class A>
class PlaneBuffer {
 public:
  explicit PlaneBuffer(int64_t elements) : data_(elements / kLanes + 2) { std::fill_n(at(0), elements, A(0)); }
  A* at(int64_t i) { return reinterpret_cast<A*>(static_cast<Vec<A>*>(data_)) + i; }

 private:
  Buffer<A> data_;
};

// Elements of the largest tile of an elementwise pass, and of a reduction.
inline int64_t plane_capacity(const Volume& x) { return plane_channels(x) * plane_rows(x) * x.W; }
inline int64_t reduced_capacity(const Volume& x, int context) {
  return context == kChannel ? run_channels(x) * run_rows(x) * x.W : reduced_channels(x) * reduced_rows(x) * x.W;
}

// Calls body(i, lanes) for the vectors of a run of n positions. The last one overlaps its neighbour, which does to
// positions twice what is done to each alone, and spares a remainder.
template <class Body>
AIA_INLINE void for_positions(int64_t n, Body&& body) {
  if (n < kLanes) return body(int64_t{0}, static_cast<int>(n));
  for (int64_t i = 0; i < n; i += kLanes) body(std::min(i, n - kLanes), std::integral_constant<int, kLanes>{});
}

// Calls body(r, i, lanes) for the vectors of rows that lie side by side, in ascending order, `room` elements before the
// end of their memory. A short row is a whole vector where there is room, the last lanes of which belong to the rows
// behind it: what is stored there is overwritten.
template <class Body>
AIA_INLINE void for_rows(int64_t rows, int64_t length, int64_t room, Body&& body) {
  if (length >= kLanes) {
    for (int64_t r = 0; r < rows; ++r) for_positions(length, [&](int64_t i, auto lanes) { body(r, i, lanes); });
    return;
  }
  const int64_t whole = room < kLanes ? 0 : std::min(rows, (room - kLanes) / length + 1);
  for (int64_t r = 0; r < whole; ++r) body(r, int64_t{0}, std::integral_constant<int, kLanes>{});
  for (int64_t r = whole; r < rows; ++r) body(r, int64_t{0}, static_cast<int>(length));
}

// Calls body(k, n) for the runs of a tile: n positions from the k-th plane on. Planes are one run where they lie side
// by side, in x and in the T map, and nothing that is met is the same for all of them, as a channel map is.
template <class Body>
AIA_INLINE void for_runs(const Volume& x, const Planes& at, bool joined, Body&& body) {
  if (joined && x.stride_c == at.run(x)) return body(int64_t{0}, at.size(x));
  for (int64_t k = 0; k < at.channels; ++k) body(k, at.run(x));
}

// The tiles of the unit-th group of channels of a clip, a few frames at a time, in the order of memory. Calls
// each(tile, frames, i): the i-th tile of the group, in the first of so many frames.
template <class Each>
void for_planes_of_unit(const Volume& x, int64_t unit, Each&& each) {
  const int64_t rows = reduced_rows(x), channels = reduced_channels(x), group = reduced_group(x);
  const int64_t groups = (x.C + group - 1) / group, b = unit / groups, first = unit % groups * group;
  for (int64_t t = 0; t < x.T; t += kFrames) {
    int64_t i = 0;
    for (int64_t c = first; c < std::min(x.C, first + group); c += channels)
      for (int64_t h = 0; h < x.H; h += rows, ++i) {
        const int64_t ahead = h + rows < x.H ? rows * x.W : channels * x.stride_c - h * x.W;
        each(Planes{b, t, c, h, std::min(rows, x.H - h), std::min(channels, x.C - c), ahead},
             std::min(kFrames, x.T - t), i);
      }
  }
}

// The tiles of a unit of an elementwise pass that meets maps of contexts up to `highest`, in the order of memory: a
// fresh page is cleared when it is first met, and is best written while it is in cache. Calls each(tile).
template <class Each>
void for_elementwise_planes(const Volume& x, int64_t unit, int highest, Each&& each) {
  const int64_t group = group_channels(x), groups = (x.C + group - 1) / group, first = unit % groups * group;
  const int64_t rows = plane_rows(x), channels = plane_channels(x), last = std::min(x.C, first + group);
  const int64_t frames = unit_frames(x, highest), frame = unit / groups * frames;
  for (int64_t t = frame % x.T; t < frame % x.T + frames; ++t)
    for (int64_t c = first; c < last; c += channels)
      for (int64_t h = 0; h < x.H; h += rows)
        each(
            Planes{frame / x.T, t, c, h, std::min(rows, x.H - h), std::min(channels, last - c), channels * x.stride_c});
}

// The tiles of the unit-th run of rows of a frame (unit_rows), from the first channel to the last, a few at a time, in
// the order of memory. Calls each(tile, r): r rows of the run lie before it.
template <class Each>
void for_planes_of_rows(const Volume& x, int64_t unit, Each&& each) {
  const int64_t rows = unit_rows(x), runs = (x.H + rows - 1) / rows, frame = unit / runs, h = unit % runs * rows;
  const int64_t taken = std::min(rows, x.H - h), channels = run_channels(x), step = run_rows(x);
  for (int64_t c = 0; c < x.C; c += channels)
    for (int64_t r = 0; r < taken; r += step) {
      const int64_t ahead = r + step < taken ? step * x.W : channels * x.stride_c - r * x.W;
      each(Planes{frame / x.T, frame % x.T, c, h + r, std::min(step, taken - r), std::min(channels, x.C - c), ahead},
           r);
    }
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
