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
    // The next frame's rows of the H and W maps: lines C elements apart, which the hardware does not prefetch.
    if (at.t + 1 == x.T || at.blocks > 1) return;
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
    with_blocks(at, [&](int64_t blocks, auto&& for_blocks) {
      for (int64_t i = 0; i < rows * W; ++i)
        for_blocks([&](int64_t k, auto) { put(i * blocks + k, values[i * blocks + k] * g[i]); });
    });
  } else {
    const SpacetimeRows<A> g(x, at, clip);
    for_each_vector(
        x, at, [&](int64_t r, int64_t c, auto n) { return load(g.w + r * C + c, n); },
        [&](int64_t v, int64_t i, int64_t w, int64_t c, auto n, Vec<A> gw) {
          put(v, (load(g.t + i * C + c, n) + load(g.h + w * C + c, n) + gw) * A(1.0 / 3) * values[v]);
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
      with_blocks(at, [&](int64_t blocks, auto&& for_blocks) {
        for (int64_t i = 0; i < rows * W; ++i) {
          const Vec<A> mean = splat<A>(grad_mean[first + i] * share), peak = splat<A>(grad_max[first + i]);
          const IVec<A> where = splat_index<A>(argmax[first + i]) - channel;
          for_blocks([&](int64_t k, auto) {
            put(i * blocks + k, add_where<A>(where == splat_index<A>(k * kLanes), mean, peak));
          });
        }
      });
    } else {
      const SpacetimeRows<A> peak(x, at, grad_max), mean(x, at, grad_mean);
      const SpacetimeRows<I> arg(x, at, argmax);
      const A share_t = A(1) / static_cast<A>(x.T), share_h = A(1) / static_cast<A>(x.H);
      const A share_w = A(1) / static_cast<A>(W);
      const IVec<A> t = splat_index<A>(at.t);
      struct Row {
        Vec<A> peak, mean;
        IVec<A> arg, h;
      };
      for_each_vector(
          x, at,
          [&](int64_t r, int64_t c, auto n) {
            const int64_t of_w = r * C + c;
            return Row{load(peak.w + of_w, n), load(mean.w + of_w, n) * share_w, load_index<A>(arg.w + of_w, n),
                       splat_index<A>(at.h + r)};
          },
          [&](int64_t v, int64_t i, int64_t w, int64_t c, auto n, const Row& row) {
            const int64_t of_t = i * C + c, of_h = w * C + c;
            Vec<A> u = row.mean + load(mean.t + of_t, n) * share_t + load(mean.h + of_h, n) * share_h;
            u = add_where<A>(load_index<A>(arg.t + of_t, n) == t, u, load(peak.t + of_t, n));
            u = add_where<A>(load_index<A>(arg.h + of_h, n) == row.h, u, load(peak.h + of_h, n));
            put(v, add_where<A>(row.arg == splat_index<A>(w), u, row.peak));
          });
    }
  });
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
