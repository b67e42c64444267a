// Reductions over planes that are met row by row: to spacetime maps, and to channel maps of values that spacetime maps
// make. values(at) is of a plane, values(at)(r) of its r-th row, and values(at)(r)(i, column, lanes) is the value on
// the vector of that row that begins in that column, at place i of the plane. `emit` as in reduce.h. What does not
// depend on the values is not inlined: it serves every type of x.
#pragma once

#include "../common/max_first.h"
#include "reduce.h"
#include "rows.h"

namespace aia::cpu::AIA_CPU_LEVEL {

// One row, folded into a vector: lanes that are no part of it, or are met by the vector before, are left out.
template <class A, class Kind>
struct RowMasks {
  IVec<A> inside, last;

  explicit RowMasks(int64_t W) {
    const IVec<A> lane = iota<A>() & splat_index<A>(Kind::kSide - 1);
    inside = lane < splat_index<A>(W);
    last = lane >= splat_index<A>(W > kLanes ? (kLanes - W % kLanes) % kLanes : 0);
  }
};

// The maximum of so many lanes, whichever comes first in the row.
template <class A, class Stored>
__attribute__((noinline)) MaxFirst<A> first_maximum(const SumAndMax<A, Stored>& row, int first, int count) {
  A values[kLanes];
  int32_t indices[kLanes] = {};
  store(values, row.max);
  Indices<A, Stored>::store(indices, row.argmax, kLanes);
  MaxFirst<A> best{values[first], indices[first]};
  for (int i = first + 1; i < first + count; ++i) best.merge({values[i], indices[i]});
  return best;
}

// Where in its row each maximum is. Rows that may hold a NaN are met in order, and tell the maxima too.
template <class Numbers, class Kind, class A, class Stored>
AIA_INLINE void find_maxima(const SumAndMax<A, Stored>* rows, int64_t count, SumAndMax<A, Stored>& total) {
  using Of = Indices<A, Stored>;
  constexpr int side = Kind::kSide;
  alignas(64) A top[kLanes];
  store(top, total.max);
  if constexpr (Numbers::value && Kind::kPair && Of::kOfMasks) {
    total.argmax = Of::lowest_of_masks([&](int r) { return equal_lanes<A>(rows[r].max, spread<Kind>(top + r, side)); });
    return;
  }
  alignas(64) IndexOf<A> where[kLanes] = {};
  for (int64_t r = 0; r < count; ++r) {
    if constexpr (!Numbers::value) {
      for (int half = 0; half < Kind::kChannels; ++half) {
        const MaxFirst<A> best = first_maximum<A>(rows[r], half * side, side);
        top[half * side + r] = best.value, where[half * side + r] = best.index;
      }
    } else if constexpr (Kind::kOne) {
      const unsigned bits = equal_lanes<A>(rows[r].max, spread<Kind>(top + r, side));
      where[r] = __builtin_ctz(bits);
      if (Kind::kPair) where[side + r] = __builtin_ctz(bits >> side);
    } else {
      where[r] = Indices<A, Stored>::least_where(rows[r].max == splat(top[r]), rows[r].argmax);
    }
  }
  if (!Numbers::value) total.max = load(top);
  IVec<A> index;
  __builtin_memcpy(&index, where, sizeof index);
  total.argmax = Of::from(index);
}

// Over W: lane i of the result is of the i-th row (of a pair, lane kSide + i of the second plane's).
template <class Numbers, class Kind, class A>
AIA_INLINE Sum<A> reduce_rows_over_w(Sum<A>* rows, int64_t) {
  Vec<A> sums[Kind::kSide];
  for (int i = 0; i < Kind::kSide; ++i) sums[i] = rows[i].sum;
  return {join_each<A>(sums, [](Vec<A> a, Vec<A> b) { return a + b; })};
}
template <class Numbers, class Kind, class A, class Stored>
AIA_INLINE SumAndMax<A, Stored> reduce_rows_over_w(SumAndMax<A, Stored>* rows, int64_t count) {
  constexpr int side = Kind::kSide;
  Vec<A> sums[side], maxima[side];
  for (int i = 0; i < side; ++i) sums[i] = rows[i].sum, maxima[i] = rows[i].max;
  SumAndMax<A, Stored> total;
  total.sum = join_each<A>(sums, [](Vec<A> a, Vec<A> b) { return a + b; });
  total.max = join_each<A>(maxima, [](Vec<A> a, Vec<A> b) { return larger<A>(a, b); });
  if constexpr (!Numbers::value || Indices<A, Stored>::kKnown) find_maxima<Numbers, Kind>(rows, count, total);
  return total;
}

// The accumulators of a unit of a reduction to spacetime maps, a group of channels of a clip (reduced_group), and what
// they give to the maps. Those over T stay in cache.
template <class A, class Kind, class Accumulator, class Emit>
class RowMaps {
 public:
  RowMaps(const Volume& x, Emit& emit)
      : x_(x),
        emit_(emit),
        pitch_(x.H * vectors_of<Kind>(x)),
        over_t_(new Accumulator[(reduced_group(x) + Kind::kChannels - 1) / Kind::kChannels * pitch_]),
        over_h_(new Accumulator[kFrames * vectors_of<Kind>(x)]),
        of_w_(new Accumulator[kFrames * kLanes]) {}

  // Of the planes of channel c, in a unit that begins with another.
  Accumulator* over_t(int64_t first, int64_t c) { return over_t_.get() + (c - first) / Kind::kChannels * pitch_; }
  // Of the f-th of the frames that are met together: over H, and of up to a vector's worth of rows, each folded into
  // one.
  Accumulator* of_w(int64_t f) { return of_w_.get() + f * kLanes; }
  Accumulator* over_h(int64_t f) { return over_h_.get() + f * vectors_of<Kind>(x_); }

  bool all_numbers(int64_t first, int64_t c) {
    Vec<A> sum{};
    for (int64_t i = 0; i < pitch_; ++i) sum += over_t(first, c)[i].sum * A(0);
    return sum_lanes<A>(sum) == A(0);
  }

  __attribute__((noinline, flatten)) void finish_t(const RowPlane<Kind>& at, const Accumulator* over_t) {
    const A share = A(1) / static_cast<A>(x_.T);
    at.for_rows([&](int64_t r, auto lanes) {
      at.for_vectors([&](int64_t j, int64_t column) {
        put(at, offset_t(at) + r * x_.W + column, x_.H * x_.W, over_t[r * at.vectors + j], share, lanes);
      });
    });
  }
  // What is stored behind a row without masks belongs to the channels behind it, before `end`: they overwrite it.
  __attribute__((noinline, flatten)) void finish_h(const RowPlane<Kind>& at, const Accumulator* over_h, int64_t end) {
    const A share = A(1) / static_cast<A>(x_.H);
    const bool room = !kMasks && (end - at.c) * x_.W >= kLanes;
    at.for_vectors([&](int64_t j, int64_t column) {
      put(at, offset_h(at) + column, x_.W, over_h[j], share, room ? kLanes : at.lanes());
    });
  }
  template <class Numbers>
  __attribute__((noinline, flatten)) void finish_w(const RowPlane<Kind>& at, Accumulator* rows, int64_t end) {
    const A share = A(1) / static_cast<A>(x_.W);
    const bool room = !kMasks && (end - at.c) * x_.H - at.h >= kLanes;
    const Accumulator total = reduce_rows_over_w<Numbers, Kind, A>(rows, at.rows);
    put(at, offset_w(at), x_.H, total, share, room ? kLanes : static_cast<int>(at.rows));
  }

 private:
  // To a map in which channels lie `second` apart.
  AIA_INLINE void put(const RowPlane<Kind>& at, int64_t offset, int64_t second, const Accumulator& total, A share,
                      int lanes) {
    emit_(at.b, offset, total, share, lanes);
    if (!at.single) emit_(at.b, offset + second, total.halves_swapped(), share, lanes);
  }

  const Volume& x_;
  Emit& emit_;
  const int64_t pitch_;
  const std::unique_ptr<Accumulator[]> over_t_, over_h_, of_w_;
};

// Up to a vector's worth of rows of a few frames. Accumulators are met in plain loops of constant length: within nested
// lambdas GCC keeps them in memory.
template <class Numbers, class Stored, int count, class A, class Kind, class Accumulator, class Emit, class Values>
AIA_INLINE void reduce_block(RowMaps<A, Kind, Accumulator, Emit>& maps, const RowPlane<Kind>& at,
                             const RowMasks<A, Kind>& masks, Accumulator* __restrict over_t, int64_t end,
                             Values&& values) {
  static_assert(count <= 2);  // as the pragmas say
  using Of = Indices<A, Stored>;
  const auto frame = [&](int f) {
    RowPlane<Kind> frame = at;
    frame.t += f;
    return frame;
  };
  const auto planes = at_each<count>([&](int f) { return values(frame(f)); });
  const int64_t vectors = Kind::kOne ? 1 : at.vectors;
  Accumulator of_h[count];  // over H of rows that are one vector: in registers
#pragma GCC unroll 2
  for (int f = 0; f < count; ++f) {
    if (Kind::kOne && at.h) of_h[f] = *maps.over_h(f);
    if (!Kind::kOne && at.h == 0) std::fill_n(maps.over_h(f), at.vectors, Accumulator{});
  }
  at.for_rows([&](int64_t r, auto lanes) {
    const auto rows = at_each<count>([&](int f) { return planes[f](r); });
    const auto h = Of::splat(at.h + r);
    Accumulator folded[count];
    for (int64_t j = 0; j < vectors; ++j) {
      const int64_t column = Kind::kOne ? 0 : std::min(j * kLanes, at.W - kLanes);
      auto w = Of::counting(column);
      if (Kind::kPair) w = Of::halves(w, w);
      Accumulator total;
      if (at.t) total = over_t[r * vectors + j];
#pragma GCC unroll 2
      for (int f = 0; f < count; ++f) {
        const Vec<A> v = rows[f](r * at.W + column, column, lanes);
        total.template add<Numbers>(v, Of::splat(at.t + f));
        if constexpr (Kind::kOne) {
          of_h[f].template add<Numbers>(v, h);
          folded[f].template start<Numbers>(masks.inside, v, w);
        } else {
          maps.over_h(f)[j].template add<Numbers>(v, h);
          folded[f].template fold<Numbers>(j + 1 == vectors, masks.last, v, w);
        }
      }
      over_t[r * vectors + j] = total;
    }
#pragma GCC unroll 2
    for (int f = 0; f < count; ++f) maps.of_w(f)[r] = folded[f];
  });
#pragma GCC unroll 2
  for (int f = 0; f < count; ++f) {
    if (Kind::kOne) *maps.over_h(f) = of_h[f];
    if (at.h + at.rows == at.x.H) maps.finish_h(frame(f), maps.over_h(f), end);
    maps.template finish_w<Numbers>(frame(f), maps.of_w(f), end);
  }
}

// Channels [c, end) of a unit that begins with channel `first`, in a few frames.
template <class Numbers, class Stored, int count, class A, class Kind, class Accumulator, class Emit, class Values>
__attribute__((noinline, flatten)) void reduce_frames(RowMaps<A, Kind, Accumulator, Emit>& maps, const Volume& x,
                                                      int64_t b, int64_t t, int64_t first, int64_t c, int64_t end,
                                                      Values& values) {
  const RowMasks<A, Kind> masks(x.W);
  const int64_t ahead = next_run(x, b, t, first, reduced_group(x), count);
  for (; c < end; c += Kind::kChannels)
    for (int64_t h = 0; h < x.H; h += Kind::kSide) {
      const RowPlane<Kind> at(x, b, t, c, h, std::min<int64_t>(Kind::kSide, x.H - h), end, ahead);
      reduce_block<Numbers, Stored, count>(maps, at, masks, maps.over_t(first, c) + h * at.vectors, end, values);
    }
}

// Maxima are found as if all values were numbers. Where one is none, the sum over T is none: then the channel is done
// once more, in the order of torch.max, which for a sum does not matter. An odd frame at the end is done so too.
template <class A, class Kind, class Accumulator, class Stored, class Values, class Emit>
void reduce_rows_to_spacetime(const Volume& x, int64_t begin, int64_t end, Values&& values, Emit&& emit) {
  RowMaps<A, Kind, Accumulator, std::remove_reference_t<Emit>> maps(x, emit);
  const int64_t group = reduced_group(x), groups = (x.C + group - 1) / group;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / groups, first = unit % groups * group, last = std::min(x.C, first + group);
    int64_t t = 0;
    for (; t + kFrames <= x.T; t += kFrames)
      reduce_frames<std::true_type, Stored, kFrames>(maps, x, b, t, first, first, last, values);
    for (; t < x.T; ++t) reduce_frames<std::false_type, Stored, 1>(maps, x, b, t, first, first, last, values);
    for (int64_t c = first; c < last; c += Kind::kChannels) {
      if (Accumulator::kCompares && !maps.all_numbers(first, c))
        for (t = 0; t < x.T; ++t)
          reduce_frames<std::false_type, Stored, 1>(maps, x, b, t, first, c,
                                                    std::min<int64_t>(last, c + Kind::kChannels), values);
      maps.finish_t(RowPlane<Kind>(x, b, 0, c, 0, x.H, last, 0), maps.over_t(first, c));
    }
  }
}

// Over C: unit = a run of rows of one frame. Its accumulators meet two planes, or pairs of planes, at a time.
template <class A, class Kind, class Accumulator, class Values, class Emit>
__attribute__((flatten)) void reduce_rows_to_channel(const Volume& x, int64_t begin, int64_t end, Values&& values,
                                                     Emit&& emit) {
  constexpr int kPlanes = 2;
  const int64_t length = unit_rows(x), runs = (x.H + length - 1) / length;
  const std::unique_ptr<Accumulator[]> sums(new Accumulator[length * vectors_of<Kind>(x)]);
  for (int64_t unit = begin; unit < end; ++unit) {
    Accumulator* __restrict over_c = sums.get();
    const int64_t b = unit / runs / x.T, t = unit / runs % x.T, h = unit % runs * length;
    const int64_t ahead = std::max(kSoon, kPlanes * Kind::kChannels * x.stride_c);
    const auto plane_at = [&](int64_t c) {
      return RowPlane<Kind>(x, b, t, c, h, std::min(length, x.H - h), x.C, ahead);
    };
    const auto add = [&](int64_t first, auto count) {
      const RowPlane<Kind> at = plane_at(first);
      const auto planes = at_each<count>([&](int k) { return values(plane_at(first + k * Kind::kChannels)); });
      const bool odd = Kind::kPair && first + count * Kind::kChannels > x.C;
      const IVec<A> low = iota<A>() < splat_index<A>(Kind::kSide);
      at.for_rows([&](int64_t r, auto lanes) {
        const auto rows = at_each<count>([&](int k) { return planes[k](r); });
        at.for_vectors([&](int64_t j, int64_t column) {
          Accumulator& kept = over_c[r * at.vectors + j];
          Accumulator total = first ? kept : Accumulator{};
          for (int k = 0; k < count; ++k) {
            const Vec<A> v = rows[k](r * at.W + column, column, lanes);
            const int64_t c = first + k * Kind::kChannels;
            IVec<A> channel = splat_index<A>(c);
            if (Kind::kPair) channel = from_halves(channel, splat_index<A>(c + 1));
            if (odd && k + 1 == count)
              total.add_where(low, v, channel);
            else
              total.template add<std::false_type>(v, channel);
          }
          kept = total;
        });
      });
    };
    int64_t c = 0;
    for (; c + (kPlanes - 1) * Kind::kChannels < x.C; c += kPlanes * Kind::kChannels)
      add(c, std::integral_constant<int, kPlanes>{});
    if (c < x.C) add(c, std::integral_constant<int, 1>{});
    const RowPlane<Kind> at = plane_at(0);
    const int64_t offset = offset_c(at);
    at.for_own_rows([&](int64_t r, auto lanes) {
      at.for_vectors([&](int64_t j, int64_t column) {
        Accumulator total = over_c[r * at.vectors + j];
        if (Kind::kPair) total.merge(total.halves_swapped());
        emit(b, offset + r * x.W + column, total, A(1) / static_cast<A>(x.C), lanes);
      });
    });
  }
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
