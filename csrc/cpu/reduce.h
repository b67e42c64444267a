// Reductions of a value over x, given tile by tile, to the maps of a context.
//
// `fill(tile, values)` writes the value at each position and channel of a tile; `emit(clip, offset, accumulator,
// share, lanes)` receives each finished group of elements: its offset in the packed maps of the clip, and the share of
// one element in the mean.
#pragma once

#include "indices.h"
#include "tile.h"

namespace aia::cpu::AIA_CPU_LEVEL {

template <class A>
struct Sum {
  static constexpr bool kCompares = false;
  Vec<A> sum{};

  template <class Numbers = std::false_type, class I>
  AIA_INLINE void add(Vec<A> v, I) {
    sum += v;
  }
  // A value of a row of several vectors; of the last one the lanes that the vector before it has not met.
  template <class Numbers, class I>
  AIA_INLINE void fold(bool is_last, IVec<A> last, Vec<A> v, I) {
    sum += is_last ? keep_where<A>(last, v) : v;
  }
  void merge(const Sum& other) { sum += other.sum; }
  AIA_INLINE void add_where(IVec<A> valid, Vec<A> v, IVec<A>) { sum += valid ? v : Vec<A>{}; }
  Sum halves_swapped() const { return {swap_halves(sum)}; }
  // Accumulators, one per position with lanes along channels, into one with lanes along the positions.
  static Sum across_lanes(const Sum* from) {
    Vec<A> sums[kLanes];
    for (int i = 0; i < kLanes; ++i) sums[i] = from[i].sum;
    transpose(sums);
    Sum total;
    for (const Vec<A>& s : sums) total.sum += s;
    return total;
  }
};

// Stored: how its indices will lie in memory (indices.h).
template <class A, class Stored = AnyBytes>
struct SumAndMax {
  using Of = Indices<A, Stored>;
  using I = typename Of::I;
  static constexpr bool kCompares = true;
  Vec<A> sum{}, max = splat(-std::numeric_limits<A>::infinity());
  [[no_unique_address]] I argmax{};

  // Numbers: whether v has no NaN.
  template <class Numbers = std::false_type>
  AIA_INLINE void add(Vec<A> v, I index) {
    sum += v;
    Of::template max_first<Numbers::value>(v, index, max, argmax);
  }
  AIA_INLINE void add_where(IVec<A> valid, Vec<A> v, IVec<A> index) {
    sum += valid ? v : Vec<A>{};
    max_first<A>(valid ? v : splat(-std::numeric_limits<A>::infinity()), index, max, argmax);
  }
  // As in Sum. What is met twice does no harm to a maximum.
  template <class Numbers>
  AIA_INLINE void fold(bool is_last, IVec<A> last, Vec<A> v, I index) {
    sum += is_last ? keep_where<A>(last, v) : v;
    Of::template max_first<Numbers::value>(v, index, max, argmax);
  }
  AIA_INLINE SumAndMax halves_swapped() const {
    return {swap_halves(sum), swap_halves(max), Of::halves_swapped(argmax)};
  }
  // With accumulators that met other elements, not all of them behind those of this one: among equals the smaller index
  // must win.
  void merge(const SumAndMax& other) {
    sum += other.sum;
    const Vec<A> v = other.max;
    const IVec<A> equal = (v == max) | ((v != v) & (max != max));
    const IVec<A> above = ~(v <= max) & (max == max);
    const IVec<A> take = above | (equal & (other.argmax < argmax));
    max = take ? v : max;
    argmax = take ? other.argmax : argmax;
  }
  static SumAndMax across_lanes(const SumAndMax* from) {
    Vec<A> sums[kLanes], maxima[kLanes];
    IVec<A> indices[kLanes];
    for (int i = 0; i < kLanes; ++i) sums[i] = from[i].sum, maxima[i] = from[i].max, indices[i] = from[i].argmax;
    transpose(sums);
    transpose(maxima);
    transpose(indices);
    SumAndMax total{sums[0], maxima[0], indices[0]};
    for (int i = 1; i < kLanes; ++i) total.merge({sums[i], maxima[i], indices[i]});
    return total;
  }
};

// Rows walked side by side: as many independent chains of maxima along W, and one visit to the H accumulators for all.
constexpr int kRows = 4;

// v: the values of one block of the tile, `pitch` vectors apart.
template <class A, int kCount, class Accumulator, class EmitRow>
AIA_INLINE void reduce_rows(const Volume& x, const Tile& at, int64_t r, const Vec<A>* __restrict v, int64_t pitch,
                            Accumulator* __restrict acc_t, Accumulator* __restrict acc_h, EmitRow&& emit_row) {
  const int64_t W = x.W;
  const IVec<A> t = splat_index<A>(at.t);
  IVec<A> h[kCount], w{};
  Accumulator acc_w[kCount];
  for (int k = 0; k < kCount; ++k) h[k] = splat_index<A>(at.h + r + k);
  for (int64_t i = 0; i < W; ++i, w += splat_index<A>(1)) {
    Accumulator over_h = acc_h[i];
    for (int k = 0; k < kCount; ++k) {
      const Vec<A> value = v[((r + k) * W + i) * pitch];
      acc_w[k].add(value, w);
      acc_t[(r + k) * W + i].add(value, t);
      over_h.add(value, h[k]);
    }
    acc_h[i] = over_h;
  }
  for (int k = 0; k < kCount; ++k) emit_row(at.h + r + k, acc_w[k]);
}

// Over T, H and W at once: unit = x.blocks blocks of channels of one clip.
template <class A, class Accumulator, class Fill, class Emit>
void reduce_spacetime(const Volume& x, int64_t begin, int64_t end, Fill&& fill, Emit&& emit) {
  const int64_t all_t = reduction_capacity(x, kSpacetime), pitch = all_t / x.blocks, all_h = x.blocks * x.T * x.W;
  Buffer<A> values(all_t);
  std::unique_ptr<Accumulator[]> over_t(new Accumulator[all_t]), over_h(new Accumulator[all_h]);
  for (int64_t unit = begin; unit < end; ++unit) {
    std::fill_n(over_h.get(), all_h, Accumulator{});
    for_each_tile(x, unit, x.blocks, reduction_vectors(x) / x.blocks, [&](const Tile& at) {
      fill(at, static_cast<Vec<A>*>(values));
      if (at.t == 0) std::fill_n(over_t.get(), all_t, Accumulator{});
      for (int64_t k = 0; k < at.blocks; ++k) {
        const Vec<A>* __restrict v = values + k;
        Accumulator* __restrict acc_t = over_t.get() + k * pitch;
        Accumulator* __restrict acc_h = over_h.get() + (k * x.T + at.t) * x.W;
        const int64_t c = at.c + k * kLanes;
        const int lanes = k + 1 < at.blocks ? kLanes : at.lanes;
        const auto emit_row = [&](int64_t h, const Accumulator& total) {
          emit(at.b, x.map_t() + x.map_h() + (at.t * x.H + h) * x.C + c, total, A(1) / static_cast<A>(x.W), lanes);
        };
        int64_t r = 0;
        for (; r + kRows <= at.rows; r += kRows) reduce_rows<A, kRows>(x, at, r, v, at.blocks, acc_t, acc_h, emit_row);
        for (; r + 2 <= at.rows; r += 2) reduce_rows<A, 2>(x, at, r, v, at.blocks, acc_t, acc_h, emit_row);
        for (; r < at.rows; ++r) reduce_rows<A, 1>(x, at, r, v, at.blocks, acc_t, acc_h, emit_row);
        if (at.t == x.T - 1)
          for (int64_t i = 0; i < at.positions(x); ++i)
            emit(at.b, (at.h * x.W + i) * x.C + c, acc_t[i], A(1) / static_cast<A>(x.T), lanes);
        if (at.h + at.rows == x.H)
          for (int64_t i = 0; i < x.W; ++i)
            emit(at.b, x.map_t() + (at.t * x.W + i) * x.C + c, acc_h[i], A(1) / static_cast<A>(x.H), lanes);
      }
    });
  }
}

// Over C: unit = a run of rows of one frame.
template <class A, class Accumulator, class Fill, class Emit>
void reduce_channel(const Volume& x, int64_t begin, int64_t end, Fill&& fill, Emit&& emit) {
  const int64_t positions = unit_rows(x) * x.W, capacity = (positions + kLanes - 1) / kLanes * kLanes;
  Buffer<A> values(reduction_capacity(x, kChannel));
  std::unique_ptr<Accumulator[]> over_c(new Accumulator[capacity]);
  for (int64_t unit = begin; unit < end; ++unit) {
    Accumulator* __restrict acc = over_c.get();
    std::fill_n(acc, capacity, Accumulator{});
    for_each_tile_of_rows(x, unit, [&](const Tile& at) {
      fill(at, static_cast<Vec<A>*>(values));
      const Vec<A>* __restrict v = values;
      const int64_t n = at.positions(x);
      with_blocks(at, [&](int64_t blocks, auto&& for_blocks) {
        for (int64_t i = 0; i < n; ++i) {
          Accumulator total = acc[i];
          for_blocks([&](int64_t k, auto lanes) {
            const IVec<A> channel = iota<A>() + splat_index<A>(at.c + k * kLanes);
            if (lanes == kLanes)
              total.add(v[i * blocks + k], channel);
            else
              total.add_where(iota<A>() < splat_index<A>(lanes), v[i * blocks + k], channel);
          });
          acc[i] = total;
        }
      });
      if (at.c + at.blocks * kLanes < x.C) return;
      for (int64_t i = 0; i < n; i += kLanes)
        emit(at.b, (at.t * x.H + at.h) * x.W + i, Accumulator::across_lanes(acc + i), A(1) / static_cast<A>(x.C),
             static_cast<int>(std::min<int64_t>(kLanes, n - i)));
    });
  }
}

template <class A, class Accumulator, class Fill, class Emit>
void reduce(const Volume& x, int context, int64_t begin, int64_t end, Fill&& fill, Emit&& emit) {
  if (context == kChannel)
    reduce_channel<A, Accumulator>(x, begin, end, fill, emit);
  else
    reduce_spacetime<A, Accumulator>(x, begin, end, fill, emit);
}

// Receives the gradient of each map of a gate, summed over the axes that the map lacks, and divides it by the number of
// maps.
template <class A>
auto emit_gate(const Volume& x, int context, A* grad_gate) {
  return [packed = x.packed(context), grad_gate, share = A(1) / static_cast<A>(context)](
             int64_t clip, int64_t offset, const Sum<A>& total, A, auto lanes) {
    store(grad_gate + clip * packed + offset, total.sum * share, lanes);
  };
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
