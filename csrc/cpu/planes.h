// Tiles of x where the positions of a plane lie side by side: rows of one plane, or whole planes of some channels, of
// one frame. Lanes are positions. A tile is held as [channels][positions], without gaps.
//
// A plane is met as a run of positions, whatever its rows: whole vectors, the last of which overlaps the one before it.
// So do passes that meet channel maps alone; where there are spacetime maps, rows tell more (rows.h).
#pragma once

#include "tile.h"

namespace aia::cpu::AIA_CPU_LEVEL {

// Rows [h, h + rows) of the planes of `channels` channels from c on, in frame t of clip b. All rows, if several.
// `ahead` is the distance in elements to the tile that will be read next, which the hardware does not foresee.
struct Planes {
  int64_t b, t, c, h, rows, channels, ahead;

  int64_t run(const Volume& x) const { return rows * x.W; }  // positions of one plane
};

// Where a run begins in x, and in the map [T, H, W] of a clip.
inline int64_t run_offset(const Volume& x, const Planes& at, int64_t k) {
  return at.b * x.stride_b + at.t * x.stride_t + (at.c + k) * x.stride_c + at.h * x.W;
}
inline int64_t offset_c(const Volume& x, const Planes& at) { return (at.t * x.H + at.h) * x.W; }

// Loads from a run of x, or stores to one, and asks for the same place of the next tile, into the L2 cache: asked for
// into the L1 cache it would push out what is met before it.
template <class T, class Lanes>
AIA_INLINE Vec<Accumulate<T>> load_ahead(const T* p, int64_t ahead, Lanes n) {
  __builtin_prefetch(p + ahead, 0, 2);
  return load(p, n);
}
template <class T, class Lanes>
AIA_INLINE void store_ahead(T* p, int64_t ahead, Vec<Accumulate<T>> v, Lanes n) {
  __builtin_prefetch(p + ahead, 0, 2);
  store(p, v, n);
}

// Calls body(i, lanes) for the vectors of a run of n positions. The last one overlaps its neighbour, which does to
// positions twice what is done to each alone, and spares a remainder.
template <class Body>
AIA_INLINE void for_positions(int64_t n, Body&& body) {
  if (n < kLanes) return body(int64_t{0}, static_cast<int>(n));
  for (int64_t i = 0; i < n; i += kLanes) body(std::min(i, n - kLanes), std::integral_constant<int, kLanes>{});
}

// The tiles of a unit of an elementwise pass: a group of channels of a frame, in the order of memory. Calls each(tile).
template <class Each>
void for_elementwise_planes(const Volume& x, int64_t unit, Each&& each) {
  const int64_t group = group_channels(x), groups = (x.C + group - 1) / group, first = unit % groups * group;
  const int64_t rows = plane_rows(x), channels = plane_channels(x), last = std::min(x.C, first + group);
  const int64_t b = unit / groups / x.T, t = unit / groups % x.T;
  for (int64_t c = first; c < last; c += channels)
    for (int64_t h = 0; h < x.H; h += rows)
      each(Planes{b, t, c, h, std::min(rows, x.H - h), std::min(channels, last - c), channels * x.stride_c});
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
