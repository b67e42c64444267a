// Reductions over the planes of x to the maps of a context, of a value that is made vector by vector.
//
// values(tile) returns of(k), which returns value(i, lanes): the value on the run that begins with the k-th plane of
// the tile. Where `joined`, one run may be all planes of the tile (for_runs). `emit` as in reduce.h.
#pragma once

#include "planes.h"
#include "reduce.h"

namespace aia::cpu::AIA_CPU_LEVEL {

// Over T: the accumulators lie along the tile, and meet it in every frame. Not inlined, as below: one serves every type
// of x.
template <class A, class Accumulator>
__attribute__((noinline)) void reduce_over_t(int64_t t, const A* tile, int64_t size, Accumulator* acc) {
  const IVec<A> index = splat_index<A>(t);
  for (int64_t i = 0; i < size; i += kLanes, ++acc) acc->add(load(tile + i), index);
}

// Over H: a vector of each row.
template <class A, class Accumulator>
AIA_INLINE void reduce_over_h(int64_t h, int64_t rows, int64_t W, const A* column, Accumulator& acc) {
  IVec<A> index = splat_index<A>(h);
  for (int64_t r = 0; r < rows; ++r, ++index, column += W) acc.add(load(column), index);
}

// Over W: up to a vector's worth of rows, turned so that they are the lanes.
template <class A, class Accumulator>
__attribute__((noinline)) Accumulator reduce_over_w(int64_t rows, int64_t W, const A* first) {
  Accumulator acc;
  IVec<A> index{};
  for (int64_t w = 0; w < W; w += kLanes) {
    Vec<A> block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = load(first + std::min<int64_t>(i, rows - 1) * W + w);
    transpose(block);
    with_lanes(static_cast<int>(std::min<int64_t>(kLanes, W - w)), [&](auto columns) {
      for (int i = 0; i < columns; ++i, ++index) acc.add(block[i], index);
    });
  }
  return acc;
}

template <class A, class Accumulator, class Values, class Emit>
void reduce_spacetime_of_planes(const Volume& x, bool joined, int64_t begin, int64_t end, Values&& values,
                                Emit&& emit) {
  const int64_t W = x.W, capacity = plane_capacity(x), blocks = (W + kLanes - 1) / kLanes;
  const A share_t = A(1) / static_cast<A>(x.T), share_h = A(1) / static_cast<A>(x.H),
          share_w = A(1) / static_cast<A>(W);
  PlaneBuffer<A> tile(capacity);
  std::unique_ptr<Accumulator[]> over_t(new Accumulator[capacity / kLanes + 1]);
  std::unique_ptr<Accumulator[]> over_h(new Accumulator[x.T * blocks]);  // where a plane is several tiles
  for (int64_t unit = begin; unit < end; ++unit)
    for_planes_of_unit(x, unit, plane_channels(x), [&](const Planes& at) {
      const int64_t run = at.run(x), size = at.size(x), rows = at.channels * at.rows;
      const auto of = values(at);
      for_runs(x, at, joined, [&](int64_t k, int64_t n) {
        const auto value = of(k);
        A* to = tile.at(k * run);
        for_positions(n, [&](int64_t i, auto lanes) { store(to + i, value(i, lanes)); });
      });

      if (at.t == 0) std::fill_n(over_t.get(), capacity / kLanes + 1, Accumulator{});
      reduce_over_t<A>(at.t, tile.at(0), size, over_t.get());
      if (at.t == x.T - 1)
        for (int64_t i = 0, offset = offset_t(x, at, 0); i < size; i += kLanes)
          emit(at.b, offset + i, over_t[i / kLanes], share_t, static_cast<int>(std::min<int64_t>(kLanes, size - i)));

      for (int64_t k = 0; k < at.channels; ++k)
        for_rows(1, W, (at.channels - k) * W, [&](int64_t, int64_t w, auto lanes) {
          Accumulator& kept = over_h[at.t * blocks + (w + kLanes - 1) / kLanes];
          Accumulator acc = at.h ? kept : Accumulator{};
          reduce_over_h(at.h, at.rows, W, tile.at(k * run + w), acc);
          if (at.h + at.rows == x.H)
            emit(at.b, offset_h(x, at, k) + w, acc, share_h, lanes);
          else
            kept = acc;
        });

      for_positions(rows, [&](int64_t r, auto lanes) {
        emit(at.b, offset_w(x, at, 0) + r, reduce_over_w<A, Accumulator>(rows - r, W, tile.at(r * W)), share_w, lanes);
      });
    });
}

// Over C: unit = a run of rows of one frame.
template <class A, class Accumulator, class Values, class Emit>
void reduce_channel_of_planes(const Volume& x, int64_t begin, int64_t end, Values&& values, Emit&& emit) {
  const int64_t vectors = (unit_rows(x) * x.W + kLanes - 1) / kLanes;
  std::unique_ptr<Accumulator[]> over_c(new Accumulator[vectors]);
  for (int64_t unit = begin; unit < end; ++unit) {
    std::fill_n(over_c.get(), vectors, Accumulator{});
    for_planes_of_rows(x, unit, [&](const Planes& at) {
      Accumulator* __restrict acc = over_c.get();
      const auto of = values(at);
      for (int64_t k = 0; k < at.channels; ++k) {
        const auto value = of(k);
        const IVec<A> c = splat_index<A>(at.c + k);
        for_positions(at.run(x),
                      [&](int64_t i, auto lanes) { acc[(i + kLanes - 1) / kLanes].add(value(i, lanes), c); });
      }
      if (at.c + at.channels < x.C) return;
      for_positions(at.run(x), [&](int64_t i, auto lanes) {
        emit(at.b, offset_c(x, at) + i, acc[(i + kLanes - 1) / kLanes], A(1) / static_cast<A>(x.C), lanes);
      });
    });
  }
}

template <class A, class Accumulator, class Values, class Emit>
void reduce_planes(const Volume& x, int context, bool joined, int64_t begin, int64_t end, Values&& values,
                   Emit&& emit) {
  if (context == kChannel)
    reduce_channel_of_planes<A, Accumulator>(x, begin, end, values, emit);
  else
    reduce_spacetime_of_planes<A, Accumulator>(x, joined, begin, end, values, emit);
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
