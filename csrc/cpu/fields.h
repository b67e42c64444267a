// The two fields that packed maps span over x, evaluated on a tile: the gate field G and the unpooled field U.
#pragma once

#include "tile.h"

namespace aia::cpu::AIA_CPU_LEVEL {

// Pointers to the rows of the three spacetime maps that a tile meets; stored [H, W, C], [T, W, C], [T, H, C].
template <class Value>
struct SpacetimeRows {
  const Value *t, *h, *w;

  SpacetimeRows(const Volume& x, const Tile& at, const Value* clip)
      : t(clip + at.h * x.W * x.C + at.c),
        h(clip + x.map_t() + at.t * x.W * x.C + at.c),
        w(clip + x.map_t() + x.map_h() + (at.t * x.H + at.h) * x.C + at.c) {}
};

// tile *= G.
template <class A>
void multiply_by_gate(const Volume& x, const Tile& at, const Gate& gate, Vec<A>* tile) {
  const A* clip = static_cast<const A*>(gate.maps) + at.b * x.packed(gate.context);
  if (gate.context == kChannel) {
    const A* g = clip + (at.t * x.H + at.h) * x.W;
    for (int64_t i = 0; i < at.rows * x.W; ++i) tile[i] *= g[i];
  } else {
    const SpacetimeRows<A> g(x, at, clip);
    for (int64_t r = 0; r < at.rows; ++r) {
      const Vec<A> gw = load(g.w + r * x.C, at.lanes);
      for (int64_t w = 0; w < x.W; ++w) {
        const int64_t i = r * x.W + w;
        tile[i] *= (load(g.t + i * x.C, at.lanes) + load(g.h + w * x.C, at.lanes) + gw) * A(1.0 / 3);
      }
    }
  }
}

// tile = U.
template <class A>
void unpool_tile(const Volume& x, const Tile& at, const Unpooled& from, Vec<A>* tile) {
  const int64_t packed = x.packed(from.context);
  const A* grad_max = static_cast<const A*>(from.grad) + at.b * 2 * packed;
  const A* grad_mean = grad_max + packed;
  with_index(from.index, [&](auto index) {
    using I = decltype(index);
    const I* argmax = static_cast<const I*>(from.argmax) + at.b * packed;
    if (from.context == kChannel) {
      const int64_t first = (at.t * x.H + at.h) * x.W;
      const IVec<A> channel = iota<A>() + splat_index<A>(at.c);
      const A share = A(1) / static_cast<A>(x.C);
      for (int64_t i = 0; i < at.rows * x.W; ++i) {
        const Vec<A> peak = splat<A>(grad_max[first + i]);
        tile[i] = (channel == splat_index<A>(argmax[first + i]) ? peak : Vec<A>{}) + grad_mean[first + i] * share;
      }
    } else {
      const SpacetimeRows<A> peak(x, at, grad_max), mean(x, at, grad_mean);
      const SpacetimeRows<I> arg(x, at, argmax);
      const A share_t = A(1) / static_cast<A>(x.T), share_h = A(1) / static_cast<A>(x.H);
      const A share_w = A(1) / static_cast<A>(x.W);
      const int n = at.lanes;
      for (int64_t r = 0; r < at.rows; ++r) {
        const Vec<A> peak_w = load(peak.w + r * x.C, n), mean_w = load(mean.w + r * x.C, n) * share_w;
        const IVec<A> arg_w = load_index<A>(arg.w + r * x.C, n);
        for (int64_t w = 0; w < x.W; ++w) {
          const int64_t i = r * x.W + w;
          Vec<A> u = mean_w + load(mean.t + i * x.C, n) * share_t + load(mean.h + w * x.C, n) * share_h;
          u += load_index<A>(arg.t + i * x.C, n) == splat_index<A>(at.t) ? load(peak.t + i * x.C, n) : Vec<A>{};
          u += load_index<A>(arg.h + w * x.C, n) == splat_index<A>(at.h + r) ? load(peak.h + w * x.C, n) : Vec<A>{};
          u += arg_w == splat_index<A>(w) ? peak_w : Vec<A>{};
          tile[i] = u;
        }
      }
    }
  });
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
