// Reductions over the planes of x to the maps of a context, of a value that is made vector by vector.
//
// values(tile) returns of(k), which returns value(i, lanes): the value on the run that begins with the k-th plane of
// the tile. Where `joined`, one run may be all planes of the tile (for_runs). `emit` as in reduce.h.
//
// Over space and time the values of a tile in a few frames are written to a buffer in L1 first, and are met there once
// for each axis. Where all of them are numbers, as they nearly always are, maxima are found by fewer instructions.
#pragma once

#include "planes.h"
#include "reduce.h"

namespace aia::cpu::AIA_CPU_LEVEL {

// Over T: the accumulators lie along the tile, and meet it in a few frames at a time: `frames` tiles from frame t on,
// `pitch` elements apart. Not inlined, as below: one serves every type of x.
template <class Numbers, class A, class Accumulator>
__attribute__((noinline)) void reduce_over_t(int64_t t, int64_t frames, const A* tile, int64_t pitch, int64_t size,
                                             Accumulator* acc) {
  const auto run = [&](auto n) {
    for (int64_t i = 0; i < size; i += kLanes, ++acc) {
      Accumulator total = t ? *acc : Accumulator{};
      for (int64_t f = 0; f < n; ++f) total.template add<Numbers>(load(tile + f * pitch + i), splat_index<A>(t + f));
      *acc = total;
    }
  };
  if (frames == kFrames)
    run(std::integral_constant<int64_t, kFrames>{});
  else
    run(frames);
}

// Over H: the rows [h, h + rows) of a few columns of vectors at a time, so that additions do not wait for each other.
// Of each, so many lanes begin at its first and at its second place.
// Not inlined: GCC then keeps the accumulators in registers.
template <class Numbers, int side, int columns, class A, class Accumulator, class Ask>
__attribute__((noinline)) void reduce_over_h(int64_t h, int64_t rows, int64_t W, const A* const (&place)[columns][2],
                                             Accumulator* acc, Ask ask) {
  IVec<A> index = splat_index<A>(h);
  Accumulator total[columns];
  for (int j = 0; j < columns; ++j) total[j] = acc[j];
  for (int64_t r = 0, i = 0; r < rows; ++r, i += W, ++index)
    for (int j = 0; j < columns; ++j) {
      ask(j, i);
      total[j].template add<Numbers>(load_from_each<side>(place[j][0] + i, place[j][1] + i), index);
    }
  for (int j = 0; j < columns; ++j) acc[j] = total[j];
}

// Over W: up to a vector's worth of rows. Squares of so many lanes are turned so that rows are the lanes, or rows are
// summed; where rows are short, a vector holds a part of two. `row(i)` is the i-th row.
template <class Numbers, int side, class A, class Row>
AIA_INLINE SumAndMax<A> reduce_each_row(int64_t W, Row&& row, SumAndMax<A> acc) {
  IVec<A> index{};
  for (int64_t w = 0; w < W; w += side) {
    Vec<A> square[side];
    for (int i = 0; i < side; ++i) square[i] = load_from_each<side>(row(i) + w, row(i + side) + w);
    transpose(square);
    const auto run = [&](auto columns) {
      for (int i = 0; i < columns; ++i, ++index) acc.template add<Numbers>(square[i], index);
    };
    if (W - w >= side)
      run(std::integral_constant<int, side>{});
    else
      run(static_cast<int>(W - w));
  }
  return acc;
}
template <class Numbers, int side, class A, class Row>
AIA_INLINE Sum<A> reduce_each_row(int64_t W, Row&& row, Sum<A>) {
  const int64_t whole = W / side * side;
  const IVec<A> rest = (iota<A>() & splat_index<A>(side - 1)) < splat_index<A>(W - whole);
  Vec<A> sums[side];
  for (int i = 0; i < side; ++i) {
    Vec<A> sum{};
    for (int64_t w = 0; w < whole; w += side) sum += load_from_each<side>(row(i) + w, row(i + side) + w);
    if (whole < W) sum += keep_where<A>(rest, load_from_each<side>(row(i) + whole, row(i + side) + whole));
    sums[i] = sum;
  }
  return {sum_of_each<A>(sums)};
}
template <class Numbers, class A, class Accumulator>
__attribute__((noinline)) Accumulator reduce_over_w(int64_t rows, int64_t W, const A* first) {
  const auto row = [&](int i) { return first + std::min<int64_t>(i, rows - 1) * W; };
  if constexpr (kLoadsHalves<A>)
    if (W <= kLanes / 2) return reduce_each_row<Numbers, kLanes / 2>(W, row, Accumulator{});
  return reduce_each_row<Numbers, kLanes>(W, row, Accumulator{});
}

// The maps of a tile of planes in a few frames, from its values.
template <class A, class Accumulator>
class SpacetimeReduction {
 public:
  explicit SpacetimeReduction(const Volume& x)
      : x_(x),
        pitch_((reduced_channels(x) * reduced_rows(x) * x.W + kLanes - 1) / kLanes * kLanes + kLanes),
        blocks_((x.W + kLanes - 1) / kLanes),
        tiles_(kFrames * pitch_),
        over_t_(new Accumulator[tiles_of_unit(x) * pitch_ / kLanes]),
        over_h_(new Accumulator[x.T * reduced_channels(x) * blocks_]) {}

  // The values of frame `at`.t + f of a tile go here.
  A* tile(int64_t f) { return tiles_.at(f * pitch_); }

  // i: as in for_planes_of_unit.
  template <class Numbers, class Emit, class Ask>
  void reduce(const Planes& at, int64_t frames, int64_t i, Emit&& emit, Ask&& ask) {
    const int64_t size = at.size(x_);
    Accumulator* over_t = over_t_.get() + i * pitch_ / kLanes;
    reduce_over_t<Numbers>(at.t, frames, tile(0), pitch_, size, over_t);
    if (at.t + frames == x_.T) {
      const A share = A(1) / static_cast<A>(x_.T);
      for (int64_t i = 0, offset = offset_t(x_, at, 0); i < size; i += kLanes)
        emit(at.b, offset + i, over_t[i / kLanes], share, static_cast<int>(std::min<int64_t>(kLanes, size - i)));
    }
    for (int64_t f = 0; f < frames; ++f) {
      Planes frame = at;
      frame.t += f;
      if (short_rows())
        reduce_h<Numbers, kShort>(frame, tile(f), emit, ask);
      else
        reduce_h<Numbers, kLanes>(frame, tile(f), emit, ask);
      const int64_t rows = at.channels * at.rows;
      for_positions(rows, [&](int64_t r, auto lanes) {
        const Accumulator total = reduce_over_w<Numbers, A, Accumulator>(rows - r, x_.W, tile(f) + r * x_.W);
        emit(at.b, offset_w(x_, frame, 0) + r, total, A(1) / static_cast<A>(x_.W), lanes);
      });
    }
  }

 private:
  // Columns of vectors; where rows are short, those of two planes are one.
  template <class Numbers, int side, class Emit, class Ask>
  void reduce_h(const Planes& at, const A* tile, Emit&& emit, Ask&& ask) {
    constexpr int planes = kLanes / side;
    const int64_t W = x_.W, columns = (at.channels + planes - 1) / planes * blocks_;
    const bool last = at.h + at.rows == x_.H;
    const auto run = [&](int64_t begin, auto count) {
      const A* place[count][2];
      Accumulator acc[count];
      int64_t plane[count], w[count];
      for (int j = 0; j < count; ++j) {
        plane[j] = (begin + j) / blocks_ * planes;
        w[j] = std::min((begin + j) % blocks_ * kLanes, std::max<int64_t>(0, W - kLanes));
        place[j][0] = tile + plane[j] * at.run(x_) + w[j];
        place[j][1] = plane[j] + 1 < at.channels ? place[j][0] + at.run(x_) : place[j][0];
        if (at.h) acc[j] = over_h_[at.t * columns + begin + j];
      }
      int64_t next[count];
      for (int j = 0; j < count; ++j) next[j] = run_offset(x_, at, plane[j]) + w[j] + at.ahead;
      reduce_over_h<Numbers, side, count, A>(at.h, at.rows, W, place, acc, [=, this](int j, int64_t position) {
        ask(next[j] + position);
        if (planes > 1) ask(next[j] + position + x_.stride_c);
      });
      for (int j = 0; j < count; ++j) {
        if (!last) over_h_[at.t * columns + begin + j] = acc[j];
        for (int64_t k = plane[j]; last && k < std::min(plane[j] + planes, at.channels); ++k) {
          // What is stored behind a short row is overwritten by the next.
          const int lanes = static_cast<int>((at.channels - k) * W < kLanes ? W : kLanes);
          emit(at.b, offset_h(x_, at, k) + w[j], k == plane[j] ? acc[j] : acc[j].halves_swapped(),
               A(1) / static_cast<A>(x_.H), lanes);
        }
      }
    };
    int64_t i = 0;
    for (; i + kColumns <= columns; i += kColumns) run(i, std::integral_constant<int, kColumns>{});
    for (; i < columns; ++i) run(i, std::integral_constant<int, 1>{});
  }

  static int64_t tiles_of_unit(const Volume& x) {
    return reduced_group(x) / reduced_channels(x) * ((x.H + reduced_rows(x) - 1) / reduced_rows(x));
  }
  // Whether a vector holds rows of two planes.
  bool short_rows() const { return kShort < kLanes && x_.W <= kShort; }
  static constexpr int kShort = kLoadsHalves<A> ? kLanes / 2 : kLanes;
  static constexpr int kColumns = 2;

  const Volume& x_;
  const int64_t pitch_, blocks_;
  PlaneBuffer<A> tiles_;
  std::unique_ptr<Accumulator[]> over_t_, over_h_;  // over H where a plane is several tiles
};

template <class A, class Accumulator, class Values, class Ask, class Emit>
void reduce_spacetime_of_planes(const Volume& x, bool joined, int64_t begin, int64_t end, Values&& values, Ask&& ask,
                                Emit&& emit) {
  SpacetimeReduction<A, Accumulator> reduction(x);
  for (int64_t unit = begin; unit < end; ++unit)
    for_planes_of_unit(x, unit, [&](const Planes& at, int64_t frames, int64_t index) {
      Vec<A> no_number{};  // NaN where a value is no number, or infinite
      for (int64_t f = 0; f < frames; ++f) {
        Planes frame = at;
        frame.t += f;
        frame.ahead = 0;
        const auto of = values(frame);
        for_runs(x, at, joined, [&](int64_t k, int64_t n) {
          const auto value = of(k);
          A* to = reduction.tile(f) + k * at.run(x);
          for_positions(n, [&](int64_t i, auto lanes) {
            const Vec<A> v = value(i, lanes);
            if (Accumulator::kCompares) no_number += v * A(0);
            store(to + i, v);
          });
        });
      }
      if (!Accumulator::kCompares || sum_lanes<A>(no_number) == A(0))
        reduction.template reduce<std::true_type>(at, frames, index, emit, ask);
      else
        reduction.template reduce<std::false_type>(at, frames, index, emit, ask);
    });
}

// Over C: unit = a run of rows of one frame. Its accumulators meet a few channels at a time.
template <class A, class Accumulator, class Values, class Emit>
void reduce_channel_of_planes(const Volume& x, int64_t begin, int64_t end, Values&& values, Emit&& emit) {
  const int64_t tile = (run_rows(x) * x.W + kLanes - 1) / kLanes;  // vectors
  std::unique_ptr<Accumulator[]> over_c(new Accumulator[(unit_rows(x) + run_rows(x) - 1) / run_rows(x) * tile]);
  for (int64_t unit = begin; unit < end; ++unit)
    for_planes_of_rows(x, unit, [&](const Planes& at, int64_t r) {
      Accumulator* __restrict acc = over_c.get() + r / run_rows(x) * tile;
      const auto of = values(at);
      const auto run = [&](int64_t k, auto channels) {
        std::array<decltype(of(0)), channels> value = at_each<channels>([&](int j) { return of(k + j); });
        for_positions(at.run(x), [&](int64_t i, auto lanes) {
          Accumulator& kept = acc[(i + kLanes - 1) / kLanes];
          Accumulator total = at.c + k ? kept : Accumulator{};
          for (int j = 0; j < channels; ++j)
            total.template add<std::false_type>(value[j](i, lanes), splat_index<A>(at.c + k + j));
          kept = total;
        });
      };
      int64_t k = 0;
      for (; k + kRunChannels <= at.channels; k += kRunChannels) run(k, std::integral_constant<int, kRunChannels>{});
      for (; k < at.channels; ++k) run(k, std::integral_constant<int, 1>{});
      if (at.c + at.channels < x.C) return;
      for_positions(at.run(x), [&](int64_t i, auto lanes) {
        emit(at.b, offset_c(x, at) + i, acc[(i + kLanes - 1) / kLanes], A(1) / static_cast<A>(x.C), lanes);
      });
    });
}

template <class A, class Accumulator, class Values, class Ask, class Emit>
void reduce_planes(const Volume& x, int context, bool joined, int64_t begin, int64_t end, Values&& values, Ask&& ask,
                   Emit&& emit) {
  if (context == kChannel)
    reduce_channel_of_planes<A, Accumulator>(x, begin, end, values, emit);
  else
    reduce_spacetime_of_planes<A, Accumulator>(x, joined, begin, end, values, ask, emit);
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
