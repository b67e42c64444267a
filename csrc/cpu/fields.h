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
        w(clip + x.map_t() + x.map_h() + (at.t * x.H + at.h) * x.C + at.c) {
    // The next frame's rows of the H and W maps: lines a whole set of channels apart, which nothing else foresees.
    if (at.t + 1 == x.T) return;
    const int64_t frame_h = x.W * x.C, frame_w = x.H * x.C;
    for (int64_t i = 0; i < x.W; ++i) __builtin_prefetch(h + frame_h + i * x.C);
    for (int64_t i = 0; i < at.rows; ++i) __builtin_prefetch(w + frame_w + i * x.C);
  }
};

// tile = G * values, or tile += G * values.
template <class A, bool kAdd = false>
void multiply_by_gate(const Volume& x, const Tile& at, const Gate& gate, const Vec<A>* values, Vec<A>* tile) {
  const A* clip = static_cast<const A*>(gate.maps) + at.b * x.packed(gate.context);
  const int64_t W = x.W, C = x.C, rows = at.rows;
  const auto put = [&](int64_t i, Vec<A> product) { tile[i] = kAdd ? tile[i] + product : product; };
  if (gate.context == kChannel) {
    const A* g = clip + (at.t * x.H + at.h) * W;
    for (int64_t i = 0; i < rows * W; ++i) put(i, values[i] * g[i]);
  } else {
    const SpacetimeRows<A> g(x, at, clip);
    with_lanes(at.lanes, [&](auto n) {
      for (int64_t r = 0; r < rows; ++r) {
        const Vec<A> gw = load(g.w + r * C, n);
        for (int64_t w = 0; w < W; ++w) {
          const int64_t i = r * W + w;
          put(i, (load(g.t + i * C, n) + load(g.h + w * C, n) + gw) * A(1.0 / 3) * values[i]);
        }
      }
    });
  }
}

// tile = U, or tile += U.
template <class A, bool kAdd = false>
void unpool_tile(const Volume& x, const Tile& at, const Unpooled& from, Vec<A>* tile) {
  const int64_t packed = x.packed(from.context);
  const A* grad_max = static_cast<const A*>(from.grad) + at.b * 2 * packed;
  const A* grad_mean = grad_max + packed;
  const int64_t W = x.W, C = x.C, rows = at.rows;
  const auto put = [&](int64_t i, Vec<A> u) { tile[i] = kAdd ? tile[i] + u : u; };
  with_index(from.index_bytes, [&](auto index) {
    using I = decltype(index);
    const I* argmax = static_cast<const I*>(from.argmax) + at.b * packed;
    if (from.context == kChannel) {
      const int64_t first = (at.t * x.H + at.h) * W;
      const IVec<A> channel = iota<A>() + splat_index<A>(at.c);
      const A share = A(1) / static_cast<A>(C);
      for (int64_t i = 0; i < rows * W; ++i) {
        const Vec<A> mean = splat<A>(grad_mean[first + i] * share), peak = splat<A>(grad_max[first + i]);
        put(i, add_where<A>(channel == splat_index<A>(argmax[first + i]), mean, peak));
      }
    } else {
      const SpacetimeRows<A> peak(x, at, grad_max), mean(x, at, grad_mean);
      const SpacetimeRows<I> arg(x, at, argmax);
      const A share_t = A(1) / static_cast<A>(x.T), share_h = A(1) / static_cast<A>(x.H);
      const A share_w = A(1) / static_cast<A>(W);
      const IVec<A> t = splat_index<A>(at.t);
      with_lanes(at.lanes, [&](auto n) {
        for (int64_t r = 0; r < rows; ++r) {
          const Vec<A> peak_w = load(peak.w + r * C, n), mean_w = load(mean.w + r * C, n) * share_w;
          const IVec<A> arg_w = load_index<A>(arg.w + r * C, n), h = splat_index<A>(at.h + r);
          for (int64_t w = 0; w < W; ++w) {
            const int64_t i = r * W + w;
            Vec<A> u = mean_w + load(mean.t + i * C, n) * share_t + load(mean.h + w * C, n) * share_h;
            u = add_where<A>(load_index<A>(arg.t + i * C, n) == t, u, load(peak.t + i * C, n));
            u = add_where<A>(load_index<A>(arg.h + w * C, n) == h, u, load(peak.h + w * C, n));
            put(i, add_where<A>(arg_w == splat_index<A>(w), u, peak_w));
          }
        }
      });
    }
  });
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
