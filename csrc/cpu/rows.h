// Passes between x and channel maps alone, where the positions of a plane are adjacent in memory: lanes run along
// positions, as the channel maps themselves do, and nothing is transposed.
#pragma once

#include "tile.h"

namespace aia::cpu::AIA_CPU_LEVEL {

// The unit-th run of rows of a frame: the unit of the reductions over channels.
inline Tile rows_of_unit(const Volume& x, int64_t unit) {
  const int64_t rows = unit_rows(x, kChannel), runs = (x.H + rows - 1) / rows;
  return tile_at(x, unit / runs / x.T, unit / runs % x.T, 0, unit % runs * rows, rows, 1);
}

// The unit-th block of channels of a frame, all rows: the unit of the elementwise passes. Calls body(tile, c, row)
// with every channel and the offset in x of its plane.
template <class Body>
AIA_INLINE void for_channels_of_unit(const Volume& x, int64_t unit, Body&& body) {
  const int64_t first = unit % channel_blocks(x) * kLanes, frame = unit / channel_blocks(x);
  const Tile at = tile_at(x, frame / x.T, frame % x.T, 0, 0, x.H, 1);
  for (int64_t c = first; c < std::min(x.C, first + kLanes); ++c) body(at, c, tile_offset(x, at) + c * x.stride_c);
}

// Loads from channel c of x at position i, and asks for the same position of the next channel.
template <class T, class Lanes>
AIA_INLINE Vec<Accumulate<T>> load_channel(const T* source, int64_t stride_c, int64_t c, int64_t i, Lanes n) {
  __builtin_prefetch(source + (c + 1) * stride_c + i);
  return load(source + c * stride_c + i, n);
}

// Calls body(i, lanes) for the vectors of a run of n positions. The last one overlaps its neighbour, which does to
// positions twice what is done to each alone, and spares a remainder.
template <class Body>
AIA_INLINE void for_positions(int64_t n, Body&& body) {
  if (n < kLanes) return body(int64_t{0}, static_cast<int>(n));
  for (int64_t i = 0; i < n; i += kLanes) body(std::min(i, n - kLanes), std::integral_constant<int, kLanes>{});
}

// Reduces over the channels what values(tile)(c, i, lanes) gives at channel c and position i; emit as in reduce.h. A
// function of its own: inlined into a pass beside its other form, its loop takes up to a fifth longer.
template <class A, class Accumulator, class Values, class Emit>
__attribute__((noinline)) void reduce_channel_rows(const Volume& x, int64_t begin, int64_t end, Values&& values,
                                                   Emit&& emit) {
  const int64_t longest = unit_rows(x, kChannel) * x.W;
  std::unique_ptr<Accumulator[]> over_c(new Accumulator[(longest + kLanes - 1) / kLanes]);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Tile at = rows_of_unit(x, unit);
    const auto value = values(at);
    const int64_t n = at.rows * x.W, first = (at.t * x.H + at.h) * x.W;
    Accumulator* __restrict acc = over_c.get();
    std::fill_n(acc, (n + kLanes - 1) / kLanes, Accumulator{});
    for (int64_t c = 0; c < x.C; ++c) {
      const IVec<A> channel = splat_index<A>(c);
      for_positions(n, [&](int64_t i, auto lanes) { acc[(i + kLanes - 1) / kLanes].add(value(c, i, lanes), channel); });
    }
    for_positions(n, [&](int64_t i, auto lanes) { emit(at.b, first + i, acc[(i + kLanes - 1) / kLanes], x.C, lanes); });
  }
}

// A channel map [B, T * H * W] at the positions of a tile; pitch elements lie between clips.
template <class Value>
const Value* map_row(const Volume& x, const Tile& at, const void* map, int64_t pitch) {
  return static_cast<const Value*>(map) + at.b * pitch + (at.t * x.H + at.h) * x.W;
}

// U of channel maps, with lanes along positions.
template <class A, class I>
struct ChannelUnpooled {
  const A *peak, *mean;
  const I* argmax;
  A share;

  ChannelUnpooled(const Volume& x, const Tile& at, const Unpooled& from)
      : peak(map_row<A>(x, at, from.grad, 2 * x.packed(kChannel))),
        mean(peak + x.packed(kChannel)),
        argmax(map_row<I>(x, at, from.argmax, x.packed(kChannel))),
        share(A(1) / static_cast<A>(x.C)) {}

  template <class Lanes>
  AIA_INLINE Vec<A> operator()(int64_t c, int64_t i, Lanes n) const {
    const IVec<A> here = load_index<A>(argmax + i, n) == splat_index<A>(c);
    return add_where<A>(here, load(mean + i, n) * share, load(peak + i, n));
  }
};

}  // namespace aia::cpu::AIA_CPU_LEVEL
