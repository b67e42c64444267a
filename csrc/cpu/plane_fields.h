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

  const Volume& x_;
  const Unpooled& from_;
  std::optional<PlaneBuffer<A>> rest_;
  const A *peak_ = nullptr, *mean_ = nullptr;
  const char* argmax_ = nullptr;
};

}  // namespace aia::cpu::AIA_CPU_LEVEL
