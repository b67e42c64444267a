// Reductions over planes that are met row by row: to spacetime maps, and to channel maps of values that spacetime maps
// make. values(at) is of a plane, values(at)(r) of its r-th row, and values(at)(r)(i, column, lanes) is the value on
// the vector of that row that begins in that column, at place i of the plane. `emit` as in reduce.h.
#pragma once

#include "../common/max_first.h"
#include "reduce.h"
#include "rows.h"

namespace aia::cpu::AIA_CPU_LEVEL {

// Lanes that are of a row of one vector, and those of the last vector of a longer row that the one before has not met.
template <class A, class Kind>
struct RowMasks {
  IVec<A> inside, last;

  explicit RowMasks(int64_t W) {
    const IVec<A> lane = iota<A>() & splat_index<A>(Kind::kSide - 1);
    inside = lane < splat_index<A>(W);
    last = lane >= splat_index<A>(W > kLanes ? (kLanes - W % kLanes) % kLanes : 0);
  }
};

// A row that waits for the other rows of its block: the values of one that is one vector; a longer one is folded.
template <class A, class Kind, class Accumulator>
using WaitingRow = std::conditional_t<Kind::kOne, Vec<A>, Accumulator>;

// Over W: lane i of the total is of the i-th row (of a pair, lane kSide + i of the second plane's). Sums are joined
// across the lanes of each row. Rows of one vector that are compared are transposed and met column by column, in the
// order of torch.max; longer ones, folded, are joined, and then each is searched for its maximum.
template <class A>
AIA_INLINE Vec<A> plus(Vec<A> a, Vec<A> b) {
  return a + b;
}
template <class Numbers, class Kind, class A>
AIA_INLINE Sum<A> reduce_over_w(const Vec<A>* rows, const RowMasks<A, Kind>& masks, int64_t, int64_t, Sum<A>) {
  const auto row = [&](int i) { return keep_where<A>(masks.inside, rows[i]); };
  return {join_each<A, Kind::kSide>(row, plus<A>)};
}
template <class Numbers, class Kind, class A>
AIA_INLINE Sum<A> reduce_over_w(const Sum<A>* rows, const RowMasks<A, Kind>&, int64_t, int64_t, Sum<A>) {
  return {join_each<A, kLanes>([&](int i) { return rows[i].sum; }, plus<A>)};
}
template <class Numbers, class Kind, class A, class Stored>
AIA_INLINE SumAndMax<A, Stored> reduce_over_w(const Vec<A>* rows, const RowMasks<A, Kind>&, int64_t W, int64_t,
                                              const SumAndMax<A, Stored>&) {
  SumAndMax<A, Stored> total;
  Vec<A> columns[Kind::kSide];
  for (int i = 0; i < Kind::kSide; ++i) columns[i] = rows[i];
  transpose(columns);
  for_each<Kind::kSide>([&](auto w) {
    if (w < W) total.template add<Numbers>(columns[w], Indices<A, Stored>::splat(w));
  });
  return total;
}

// The maximum of a row, whichever comes first in it.
template <class A, class Stored>
__attribute__((noinline)) MaxFirst<A> first_maximum(const SumAndMax<A, Stored>& row) {
  A values[kLanes];
  int32_t indices[kLanes] = {};
  store(values, row.max);
  Indices<A, Stored>::store(indices, row.argmax, kLanes);
  MaxFirst<A> best{values[0], indices[0]};
  for (int i = 1; i < kLanes; ++i) best.merge({values[i], indices[i]});
  return best;
}

// Where in its row each maximum is. Rows that may hold a NaN are met in order, and tell the maxima too.
template <class Numbers, class A, class Stored>
AIA_INLINE void find_maxima(const SumAndMax<A, Stored>* rows, int64_t count, SumAndMax<A, Stored>& total) {
  alignas(64) A top[kLanes];
  store(top, total.max);
  alignas(64) IndexOf<A> where[kLanes] = {};
  for (int64_t r = 0; r < count; ++r) {
    if constexpr (!Numbers::value) {
      const MaxFirst<A> best = first_maximum<A>(rows[r]);
      top[r] = best.value, where[r] = best.index;
    } else {
      where[r] = Indices<A, Stored>::least_where(rows[r].max == splat(top[r]), rows[r].argmax);
    }
  }
  if (!Numbers::value) total.max = load(top);
  IVec<A> index;
  __builtin_memcpy(&index, where, sizeof index);
  total.argmax = Indices<A, Stored>::from(index);
}
template <class Numbers, class Kind, class A, class Stored>
AIA_INLINE SumAndMax<A, Stored> reduce_over_w(const SumAndMax<A, Stored>* rows, const RowMasks<A, Kind>&, int64_t,
                                              int64_t count, SumAndMax<A, Stored> total) {
  total.sum = join_each<A, kLanes>([&](int i) { return rows[i].sum; }, plus<A>);
  total.max = join_each<A, kLanes>([&](int i) { return rows[i].max; }, larger<A>);
  if constexpr (!Numbers::value || Indices<A, Stored>::kKnown) find_maxima<Numbers>(rows, count, total);
  return total;
}

// The accumulators of a unit of a reduction to spacetime maps, a group of channels of a clip (reduced_group), and what
// they give to the maps. Those over T stay in cache.
template <class A, class Kind, class Accumulator, class Emit>
class RowMaps {
 public:
  using Waiting = WaitingRow<A, Kind, Accumulator>;

  RowMaps(const Volume& x, const Emit& emit)
      : x_(x),
        emit_(emit),
        pitch_(x.H * vectors_of<Kind>(x)),
        over_t_(new Accumulator[(reduced_group(x) + Kind::kChannels - 1) / Kind::kChannels * pitch_]),
        over_h_(new Accumulator[kFrames * vectors_of<Kind>(x)]),
        of_w_(new Waiting[kFrames * kLanes]()) {}

  // Of the planes of channel c, in a unit that begins with another.
  Accumulator* over_t(int64_t first, int64_t c) { return over_t_.get() + (c - first) / Kind::kChannels * pitch_; }
  // Of the f-th of the frames that are met together: over H, and up to a vector's worth of rows.
  Waiting* of_w(int64_t f) { return of_w_.get() + f * kLanes; }
  Accumulator* over_h(int64_t f) { return over_h_.get() + f * vectors_of<Kind>(x_); }

  // Puts totals of so many elements of clip b, put(offset, total, lanes, single), to a map in which channels lie
  // `second` apart. It holds copies: after each store a compiler would load again what lies behind a pointer.
  AIA_INLINE auto putting(int64_t b, int64_t second, int64_t elements) const {
    return [emit = emit_, share = A(1) / static_cast<A>(elements), b, second](int64_t offset, const Accumulator& total,
                                                                              Part lanes, bool single) {
      emit(b, offset, total, share, lanes);
      if (!single) emit(b, offset + second, total.halves_swapped(), share, lanes);
    };
  }

  // Returns whether all values were finite, of a channel or a pair of them, as far as the sums tell.
  __attribute__((noinline, flatten)) bool finish_t(const RowPlane<Kind>& at, const Accumulator* over_t) {
    const auto put = putting(at.b, x_.H * x_.W, x_.T);
    const int64_t offset = at.in_t, W = at.W, vectors = at.vectors;
    Vec<A> zero{};
    at.for_rows([=, single = at.single, &zero](int64_t r, auto lanes) {
      at.for_vectors([=, &zero](int64_t j, int64_t column) {
        const Accumulator total = over_t[r * vectors + j];
        zero += total.sum * A(0);
        put(offset + r * W + column, total, Part{lanes}, single);
      });
    });
    return equal_lanes<A>(zero, Vec<A>{}) == kAllLanes;
  }

 private:
  const Volume& x_;
  const Emit emit_;
  const int64_t pitch_;
  const std::unique_ptr<Accumulator[]> over_t_, over_h_;
  const std::unique_ptr<Waiting[]> of_w_;
};

// Up to a vector's worth of rows of a few frames. Accumulators are met in plain loops of constant length: within nested
// lambdas GCC keeps them in memory.
template <class Numbers, class Stored, int count, class A, class Kind, class Accumulator, class Emit, class Values>
AIA_INLINE void reduce_block(RowMaps<A, Kind, Accumulator, Emit>& maps, const Volume& x, const RowPlane<Kind>& at,
                             const RowMasks<A, Kind>& masks, Accumulator* __restrict over_t, Values&& values) {
  static_assert(count <= 2);  // as the pragmas say
  using Of = Indices<A, Stored>;
  const auto planes = at_each<count>([&](int f) { return values(at.later(x, f)); });
  const int64_t vectors = Kind::kOne ? 1 : at.vectors;
  const auto over_h = at_each<count>([&](int f) { return maps.over_h(f); });
  const auto of_w = at_each<count>([&](int f) { return maps.of_w(f); });
  Accumulator of_h[count];  // over H of rows that are one vector: in registers
#pragma GCC unroll 2
  for (int f = 0; f < count; ++f) {
    if (Kind::kOne && at.h) of_h[f] = *over_h[f];
    if (!Kind::kOne && at.h == 0) std::fill_n(over_h[f], at.vectors, Accumulator{});
  }
  at.for_rows([&](int64_t r, auto lanes) {
    const auto rows = at_each<count>([&](int f) { return planes[f](r); });
    const auto h = Of::splat(at.h + r);
    Accumulator folded[count];
    for (int64_t j = 0; j < vectors; ++j) {
      const int64_t column = Kind::kOne ? 0 : std::min(j * kLanes, at.W - kLanes);
      const auto w = Of::counting(column);
      Accumulator total;
      if (at.t) total = over_t[r * vectors + j];
#pragma GCC unroll 2
      for (int f = 0; f < count; ++f) {
        const Vec<A> v = rows[f](r * at.W + column, column, lanes);
        total.template add<Numbers>(v, Of::splat(at.t + f));
        if constexpr (Kind::kOne) {
          of_h[f].template add<Numbers>(v, h);
          of_w[f][r] = v;
        } else {
          over_h[f][j].template add<Numbers>(v, h);
          folded[f].template fold<Numbers>(j + 1 == vectors, masks.last, v, w);
        }
      }
      over_t[r * vectors + j] = total;
    }
    if constexpr (!Kind::kOne)
#pragma GCC unroll 2
      for (int f = 0; f < count; ++f) of_w[f][r] = folded[f];
  });
  if (Kind::kOne)
#pragma GCC unroll 2
    for (int f = 0; f < count; ++f) *over_h[f] = of_h[f];
}

// Channels [c, end) of a unit that begins with channel `first`, in a few frames. What is stored to a map without masks
// behind a row belongs to the channels behind it: they overwrite it, if there are any.
template <class Numbers, class Stored, int count, class A, class Kind, class Accumulator, class Emit, class Values>
__attribute__((noinline, flatten)) void reduce_frames(RowMaps<A, Kind, Accumulator, Emit>& maps, const Volume& x,
                                                      int64_t b, int64_t t, int64_t first, int64_t c, int64_t end,
                                                      Values& values) {
  const RowMasks<A, Kind> masks(x.W);
  const int64_t ahead = next_run(x, b, t, first, reduced_group(x), count), H = x.H, W = x.W;
  const int64_t frame_h = x.C * W, frame_w = x.C * H;
  const auto to_h = maps.putting(b, W, H), to_w = maps.putting(b, H, W);
  for (; c < end; c += Kind::kChannels)
    for (int64_t h = 0; h < H; h += Kind::kSide) {
      const RowPlane<Kind> at(x, b, t, c, h, std::min<int64_t>(Kind::kSide, H - h), end, ahead);
      int64_t of_h = at.in_h, of_w = at.in_w;
      const auto room = [&](int64_t behind, int64_t lanes) {
        return Part{!kMasks && behind >= kLanes ? kLanes : static_cast<int>(lanes)};
      };
      const Part lanes_h = room((end - c) * W, at.lanes()), lanes_w = room((end - c) * H - h, at.rows);
      reduce_block<Numbers, Stored, count>(maps, x, at, masks, maps.over_t(first, c) + h * at.vectors, values);
#pragma GCC unroll 2
      for (int f = 0; f < count; ++f, of_h += frame_h, of_w += frame_w) {
        if (h + Kind::kSide >= H)
          at.for_vectors(
              [&](int64_t j, int64_t column) { to_h(of_h + column, maps.over_h(f)[j], lanes_h, at.single); });
        to_w(of_w, reduce_over_w<Numbers, Kind>(maps.of_w(f), masks, W, at.rows, Accumulator{}), lanes_w, at.single);
      }
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
      const RowPlane<Kind> at(x, b, 0, c, 0, x.H, last, 0);
      if (maps.finish_t(at, maps.over_t(first, c)) || !Accumulator::kCompares) continue;
      for (t = 0; t < x.T; ++t)
        reduce_frames<std::false_type, Stored, 1>(maps, x, b, t, first, c, std::min<int64_t>(last, c + Kind::kChannels),
                                                  values);
      maps.finish_t(at, maps.over_t(first, c));
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
    const int64_t offset = at.in_c;
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
