// The two fields that packed maps span over x, on the planes of a tile: the gate field G and the unpooled field U.
//
// One map of each context lies along the planes: the T map, and the channel map. It is met as x is. What the H map and
// the W map add is made row by row, by `meet`, before.
#pragma once

#include <optional>

#include "planes.h"

namespace aia::cpu::AIA_CPU_LEVEL {

// G on a run: the map that lies along it and, from the other maps, the rest.
template <class A>
struct GateRun {
  const A *map, *rest;

  template <class Lanes>
  AIA_INLINE Vec<A> operator()(int64_t i, Lanes n) const {
    const Vec<A> g = load(map + i, n);
    return rest ? g * A(1.0 / 3) + load(rest + i) : g;
  }
};

// Planes k and k + 1 of a tile, where there are two; else the same one twice.
struct Pair {
  int64_t rows, W, run;
  int64_t second;  // 1, or 0

  Pair(const Volume& x, const Planes& at, int64_t k)
      : rows(at.rows), W(x.W), run(at.run(x)), second(k + 1 < at.channels ? 1 : 0) {}

  // The rows of the H map: row(offset from that of plane k, lanes).
  template <class Row>
  AIA_INLINE auto both(Row&& row) const {
    const int n = static_cast<int>(W);
    return from_halves(row(int64_t{0}, n), swap_halves(row(second * W, n)));
  }

  // Stores value(r) for each row, half of it to each plane. What follows a row is overwritten by the next ones, but for
  // what lies behind the plane: that may be the other, which is there already.
  template <class A, class Value>
  AIA_INLINE void for_rows(A* to, Value&& value) const {
    A* other = to + second * run;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t lanes = r * W + kLanes / 2 <= rows * W ? kLanes / 2 : W;
      store_to_each(to + r * W, other + r * W, value(r), static_cast<int>(lanes));
    }
  }
};

template <class A>
class GatePlanes {
 public:
  GatePlanes(const Volume& x, const Gate& gate, int64_t elements) : x_(x), gate_(gate) {
    if (gate.context == kSpacetime) rest_.emplace(elements);
  }

  bool given() const { return gate_.context != kNone; }
  bool along_planes() const { return gate_.context != kChannel; }

  void meet(const Planes& at) {
    clip_ = static_cast<const A*>(gate_.maps) + at.b * x_.packed(gate_.context);
    if (!rest_) return;
    const int64_t W = x_.W;
    if constexpr (kLoadsHalves<A>)
      if (W <= kLanes / 2) return meet_short_rows(at);
    for (int64_t k = 0; k < at.channels; ++k) {
      const A *h = clip_ + offset_h(x_, at, k), *w = clip_ + offset_w(x_, at, k);
      A* rows = rest_->at(k * at.run(x_));
      for_rows(1, W, (at.channels - k) * W, [&](int64_t, int64_t i, auto n) {
        const Vec<A> of_h = load(h + i, n);
        for (int64_t r = 0; r < at.rows; ++r) store(rows + r * W + i, (of_h + w[r]) * A(1.0 / 3));
      });
    }
  }

  AIA_INLINE GateRun<A> run(const Planes& at, int64_t k) {
    if (gate_.context == kChannel) return {clip_ + offset_c(x_, at), nullptr};
    if (gate_.context == kSpacetime) return {clip_ + offset_t(x_, at, k), rest_->at(k * at.run(x_))};
    return {};
  }

 private:
  // A vector holds rows of two planes.
  void meet_short_rows(const Planes& at) {
    for (int64_t k = 0; k < at.channels; k += 2) {
      const Pair pair(x_, at, k);
      const A *h = clip_ + offset_h(x_, at, k), *w = clip_ + offset_w(x_, at, k);
      const Vec<A> of_h = pair.both([&](int64_t i, int n) { return load(h + i, n); });
      pair.for_rows(rest_->at(k * at.run(x_)), [&](int64_t r) {
        return (of_h + from_halves(splat(w[r]), splat(w[r + pair.second * x_.H]))) * A(1.0 / 3);
      });
    }
  }

  const Volume& x_;
  const Gate& gate_;
  std::optional<PlaneBuffer<A>> rest_;
  const A* clip_ = nullptr;
};

// U on a run, likewise; `here` is the index along the axis that the map lacks.
template <class A>
struct UnpooledRun {
  const A *peak, *mean;
  const char* argmax;
  int index_bytes;
  A share;
  IVec<A> here;
  const A* rest;

  template <class Lanes>
  AIA_INLINE Vec<A> operator()(int64_t i, Lanes n) const {
    const IVec<A> where = load_index<A>(argmax + i * index_bytes, index_bytes, n);
    const Vec<A> u = add_where<A>(where == here, load(mean + i, n) * share, load(peak + i, n));
    return rest ? u + load(rest + i) : u;
  }
};

template <class A>
class UnpooledPlanes {
 public:
  UnpooledPlanes(const Volume& x, const Unpooled& from, int64_t elements) : x_(x), from_(from) {
    if (from.context == kSpacetime) rest_.emplace(elements);
  }

  bool given() const { return from_.context != kNone; }
  bool along_planes() const { return from_.context != kChannel; }

  void meet(const Planes& at) {
    const int64_t packed = x_.packed(from_.context);
    peak_ = static_cast<const A*>(from_.grad) + at.b * 2 * packed;
    mean_ = peak_ + packed;
    argmax_ = static_cast<const char*>(from_.argmax) + at.b * packed * from_.index_bytes;
    if (rest_) with_index(from_.index_bytes, [&](auto index) { meet_rows<decltype(index)>(at); });
  }

  AIA_INLINE UnpooledRun<A> run(const Planes& at, int64_t k) {
    const int bytes = from_.index_bytes;
    const auto on = [&](int64_t offset, int64_t length, int64_t here, const A* rest) {
      const char* argmax = argmax_ + offset * bytes;
      const A share = A(1) / static_cast<A>(length);
      return UnpooledRun<A>{peak_ + offset, mean_ + offset, argmax, bytes, share, splat_index<A>(here), rest};
    };
    if (from_.context == kChannel) return on(offset_c(x_, at), x_.C, at.c + k, nullptr);
    if (from_.context == kSpacetime) return on(offset_t(x_, at, k), x_.T, at.t, rest_->at(k * at.run(x_)));
    return UnpooledRun<A>{};
  }

 private:
  template <class I>
  void meet_rows(const Planes& at) {
    const int64_t W = x_.W;
    const A share_h = A(1) / static_cast<A>(x_.H), share_w = A(1) / static_cast<A>(W);
    const I* argmax = reinterpret_cast<const I*>(argmax_);
    if constexpr (kLoadsHalves<A>)
      if (W <= kLanes / 2) return meet_short_rows(at, argmax);
    for (int64_t k = 0; k < at.channels; ++k) {
      const int64_t of_h = offset_h(x_, at, k), of_w = offset_w(x_, at, k);
      A* rows = rest_->at(k * at.run(x_));
      for_rows(1, W, (at.channels - k) * W, [&](int64_t, int64_t i, auto n) {
        const Vec<A> peak = load(peak_ + of_h + i, n), mean = load(mean_ + of_h + i, n) * share_h;
        const IVec<A> arg = load_index<A>(argmax + of_h + i, n), column = iota<A>() + splat_index<A>(i);
        for (int64_t r = 0; r < at.rows; ++r) {
          Vec<A> u = mean + mean_[of_w + r] * share_w;
          u = add_where<A>(arg == splat_index<A>(at.h + r), u, peak);
          u = add_where<A>(column == splat_index<A>(argmax[of_w + r]), u, splat(peak_[of_w + r]));
          store(rows + r * W + i, u);
        }
      });
    }
  }

  // A vector holds rows of two planes.
  template <class I>
  void meet_short_rows(const Planes& at, const I* argmax) {
    const A share_h = A(1) / static_cast<A>(x_.H), share_w = A(1) / static_cast<A>(x_.W);
    const IVec<A> column = iota<A>() & splat_index<A>(kLanes / 2 - 1);
    for (int64_t k = 0; k < at.channels; k += 2) {
      const Pair pair(x_, at, k);
      const int64_t of_h = offset_h(x_, at, k);
      const Vec<A> peak = pair.both([&](int64_t i, int n) { return load(peak_ + of_h + i, n); });
      const Vec<A> mean = pair.both([&](int64_t i, int n) { return load(mean_ + of_h + i, n); }) * share_h;
      const IVec<A> arg = pair.both([&](int64_t i, int n) { return load_index<A>(argmax + of_h + i, n); });
      pair.for_rows(rest_->at(k * at.run(x_)), [&](int64_t r) {
        const int64_t of_w = offset_w(x_, at, k) + r, other_w = of_w + pair.second * x_.H;
        Vec<A> u = mean + from_halves(splat(mean_[of_w]), splat(mean_[other_w])) * share_w;
        u = add_where<A>(arg == splat_index<A>(at.h + r), u, peak);
        return add_where<A>(column == from_halves(splat_index<A>(argmax[of_w]), splat_index<A>(argmax[other_w])), u,
                            from_halves(splat(peak_[of_w]), splat(peak_[other_w])));
      });
    }
  }

  const Volume& x_;
  const Unpooled& from_;
  std::optional<PlaneBuffer<A>> rest_;
  const A *peak_ = nullptr, *mean_ = nullptr;
  const char* argmax_ = nullptr;
};

}  // namespace aia::cpu::AIA_CPU_LEVEL
