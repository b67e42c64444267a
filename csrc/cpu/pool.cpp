// pool and its transposes on the CPU. See aia_kernels/schemas.py for what each computes.
#include "fields.h"
#include "plane_fields.h"
#include "plane_reduce.h"
#include "row_fields.h"
#include "row_reduce.h"
#include "untyped.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

// Whether passes are compiled for each kind of field that units have, or for all of them at once.
template <class T>
constexpr bool kOften = std::is_same_v<T, float> || std::is_same_v<T, bf16>;

// Receives pooled features.
template <class A>
struct PooledMaps {
  A* pooled;
  void* argmax;
  int index_bytes;
  int64_t packed;

  template <class Total>
  AIA_INLINE void operator()(int64_t clip, int64_t offset, const Total& total, A share, int lanes) const {
    A* maximum = pooled + clip * 2 * packed + offset;
    store(maximum, total.max, lanes);
    store(maximum + packed, total.sum * share, lanes);
    if constexpr (Total::Of::kKnown) store_index(total, clip, offset, lanes);
  }

 private:
  template <class Total>
  AIA_INLINE void store_index(const Total& total, int64_t clip, int64_t offset, int lanes) const {
    if (!index_bytes) return;
    const int64_t place = clip * packed + offset;
    if (index_bytes == 1)
      Total::Of::store(static_cast<uint8_t*>(argmax) + place, total.argmax, lanes);
    else
      store_wide<typename Total::Of>(total.argmax, place, lanes);
  }
  template <class Of>
  __attribute__((noinline)) void store_wide(typename Of::I index, int64_t place, int lanes) const {
    if (index_bytes == 2)
      Of::store(static_cast<int16_t*>(argmax) + place, index, lanes);
    else
      Of::store(static_cast<int32_t*>(argmax) + place, index, lanes);
  }
};

template <class T>
void pool(const Volume& x, const T* data, const Gate& gate, int context, Accumulate<T>* pooled, void* argmax,
          int index_bytes, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const PooledMaps<A> emit{pooled, argmax, index_bytes, x.packed(context)};
  if (channels_side_by_side(x)) {
    reduce<A, SumAndMax<A>>(
        x, context, begin, end,
        [&](const Tile& at, Vec<A>* tile) {
          load_tile(x, at, data, tile);
          if (gate.context) multiply_by_gate<A>(x, at, gate, tile, tile);
        },
        emit);
    return;
  }
  if (context == kChannel && gate.context != kSpacetime)
    return reduce_planes_to_channel<A, SumAndMax<A>>(
        x, begin, end,
        [&](const Planes& at) {
          return [&, g = GateRun<A>(x, gate, at)](int64_t k) {
            return [source = data + run_offset(x, at, k), ahead = at.ahead, g](int64_t i, auto n) {
              const Vec<A> value = load_ahead(source + i, ahead, n);
              return g.map ? value * g(i, n) : value;
            };
          };
        },
        emit);
  with_rows<A>(x.W, [&](auto kind) {
    using Kind = decltype(kind);
    // Calls to(values) with the values of x under a gate of that context.
    const auto gated = [&](auto of_gate, auto&& to) {
      const GateRows<A, Kind, of_gate> field(x, gate);
      to([&](const RowPlane<Kind>& at) {
        return [from = data + at.in_x, second = at.second(x.stride_c), at, g = field.plane(at)](int64_t r) {
          return [from, second, ahead = at.ahead_of(r, second), row = g.row(r)](int64_t i, int64_t column, auto n) {
            return row.times(load_row_ahead<Kind>(from + i, second, ahead, n), row.over_t(i, n), i, column, n);
          };
        };
      });
    };
    if (context == kChannel)
      return gated(std::integral_constant<int, kSpacetime>{},
                   [&](auto&& values) { reduce_rows_to_channel<A, Kind, SumAndMax<A>>(x, begin, end, values, emit); });
    const auto to_maps = [&](auto of_gate, auto stored) {
      using Stored = decltype(stored);
      gated(of_gate, [&](auto&& values) {
        reduce_rows_to_spacetime<A, Kind, SumAndMax<A, Stored>, Stored>(x, begin, end, values, emit);
      });
    };
    if constexpr (kOften<T>)
      if (gate.context != kSpacetime) {
        constexpr std::integral_constant<int, kAtMostChannel> of_gate;
        if (index_bytes == 1) return to_maps(of_gate, IndexBytes<1>{});
        if (!index_bytes) return to_maps(of_gate, NoIndices{});
      }
    to_maps(std::integral_constant<int, kAnyContext>{}, AnyBytes{});
  });
}

// Channel maps alone, or none of an inner gate, of inner features, or of both.
template <class T>
__attribute__((noinline, flatten)) void unpool_planes(const Volume& x, const T* grad_y, const Gate& gate,
                                                      const Unpooled& outer, const Gate& inner_gate,
                                                      const Unpooled& inner, T* grad_x, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  for (int64_t unit = begin; unit < end; ++unit) {
    for_elementwise_planes(x, unit, [&](const Planes& at) {
      const GateRun<A> g(x, gate, at), h(x, inner_gate, at);
      for (int64_t k = 0; k < at.channels; ++k) {
        const T* from = grad_y + run_offset(x, at, k);
        T* to = grad_x + run_offset(x, at, k);
        const UnpooledRun<A> u(x, outer, at, k), v(x, inner, at, k);
        for_positions(at.run(x), [=, ahead = at.ahead](int64_t i, auto lanes) {
          Vec<A> field = u(i, lanes);
          if (h.map) field *= h(i, lanes);
          if (v.peak) field += v(i, lanes);
          store_ahead(to + i, ahead, load_ahead(from + i, ahead, lanes) * g(i, lanes) + field, lanes);
        });
      }
    });
  }
}

// The contexts of a call of unpool, as constants or kAnyContext: of the outer gate and features, the inner gate and the
// inner features; and how the indices of either features lie in memory.
template <int of_outer, int of_guide, int of_inner, int outer_bytes = 0, int inner_bytes = 0>
struct UnpoolContexts {
  using Outer = IndexBytes<outer_bytes>;
  using Inner = IndexBytes<inner_bytes>;
  static constexpr int kOuter = of_outer, kGuide = of_guide, kInner = of_inner;
};

// One frame of a plane.
template <class T, class Kind, class Contexts>
struct UnpooledFrame {
  using A = Accumulate<T>;
  using OuterGate = GateRows<A, Kind, Contexts::kOuter>;
  using Guide = GateRows<A, Kind, Contexts::kGuide>;
  using Outer = UnpooledRows<A, typename Contexts::Outer, Kind, Contexts::kOuter>;
  using Inner = UnpooledRows<A, typename Contexts::Inner, Kind, Contexts::kInner>;

  struct OfT {
    Vec<A> gate, guide;
    typename Outer::OfT outer;
    typename Inner::OfT inner;
  };

  struct Row {
    typename OuterGate::Row gate;
    typename Guide::Row guide;
    typename Outer::Row outer;
    typename Inner::Row inner;
    bool has_inner;
    const T* from;
    T* to;
    int64_t second, ahead;

    template <class Lanes>
    AIA_INLINE OfT over_t(int64_t i, Lanes n) const {
      return {gate.over_t(i, n), guide.over_t(i, n), outer.over_t(i, n), inner.over_t(i, n)};
    }
    template <class Lanes>
    AIA_INLINE void store(const OfT& of_t, int64_t i, int64_t column, Lanes n) const {
      Vec<A> field = guide.times(outer(of_t.outer, i, column, n), of_t.guide, i, column, n);
      if (has_inner) field += inner(of_t.inner, i, column, n);
      const Vec<A> grad = load_row_ahead<Kind>(from + i, second, ahead, n);
      store_row_ahead<Kind>(to + i, second, ahead, grad * gate(of_t.gate, i, column, n) + field, n);
    }
  };

  const RowPlane<Kind>& at;
  typename OuterGate::Plane gate;
  typename Guide::Plane guide;
  typename Outer::Plane outer;
  typename Inner::Plane inner;
  bool has_inner;
  const T* from;
  T* to;
  int64_t second;

  AIA_INLINE Row row(int64_t r) const {
    return {gate.row(r), guide.row(r), outer.row(r), inner.row(r), has_inner, from, to, second, at.ahead_of(r, second)};
  }
};

template <class T, class Kind, class Contexts>
__attribute__((flatten)) void unpool_rows(const Volume& x, const T* grad_y, const Gate& gate, const Unpooled& outer,
                                          const Gate& inner_gate, const Unpooled& inner, T* grad_x, int64_t begin,
                                          int64_t end) {
  using Frame = UnpooledFrame<T, Kind, Contexts>;
  const typename Frame::OuterGate outer_gate(x, gate);
  const typename Frame::Guide guide(x, inner_gate);
  const typename Frame::Outer outer_field(x, outer);
  const typename Frame::Inner inner_field(x, inner);
  const auto frame = [&](const RowPlane<Kind>& at) {
    return Frame{at,
                 outer_gate.plane(at),
                 guide.plane(at),
                 outer_field.plane(at),
                 inner_field.plane(at),
                 inner_field.given(),
                 grad_y + at.in_x,
                 grad_x + at.in_x,
                 at.second(x.stride_c)};
  };
  for (int64_t unit = begin; unit < end; ++unit)
    for_row_planes<Kind>(
        x, unit, [&](const RowPlane<Kind>& at, const auto&... next) { store_rows(at, frame(at), frame(next)...); });
}

template <class T>
void unpool(const Volume& x, const T* grad_y, const Gate& gate, const Unpooled& outer, const Gate& inner_gate,
            const Unpooled& inner, T* grad_x, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  if (channels_side_by_side(x)) {
    const int64_t capacity = row_capacity(x);
    Buffer<A> tile(capacity), field(capacity);
    for (int64_t unit = begin; unit < end; ++unit) {
      for_each_tile_of_rows(x, unit, [&](const Tile& at) {
        load_tile(x, at, grad_y, static_cast<Vec<A>*>(tile));
        multiply_by_gate<A>(x, at, gate, tile, tile);
        if (inner_gate.context) {
          unpool_tile<A>(x, at, outer, field);
          multiply_by_gate<A, true>(x, at, inner_gate, field, tile);
        } else {
          unpool_tile<A, true>(x, at, outer, tile);
        }
        if (inner.context) unpool_tile<A, true>(x, at, inner, tile);
        store_tile(x, at, static_cast<const Vec<A>*>(tile), grad_x);
      });
    }
    return;
  }
  if (std::max({gate.context, outer.context, inner_gate.context, inner.context}) != kSpacetime)
    return unpool_planes(x, grad_y, gate, outer, inner_gate, inner, grad_x, begin, end);
  with_rows<A>(x.W, [&](auto kind) {
    const auto run = [&](auto contexts) {
      unpool_rows<T, decltype(kind), decltype(contexts)>(x, grad_y, gate, outer, inner_gate, inner, grad_x, begin, end);
    };
    if constexpr (kOften<T>) {
      const auto are = [&](int of_outer, int of_guide, int of_inner, int outer_bytes, int inner_bytes) {
        return outer.context == of_outer && inner_gate.context == of_guide && inner.context == of_inner &&
               outer.index_bytes == outer_bytes && (!inner_bytes || inner.index_bytes == inner_bytes);
      };
      constexpr int kC = kChannel, kST = kSpacetime;
      if (are(kST, kC, kC, 1, 1)) return run(UnpoolContexts<kST, kC, kC, 1, 1>{});
      if (are(kST, kC, kC, 1, 2)) return run(UnpoolContexts<kST, kC, kC, 1, 2>{});
      if (are(kC, kST, kST, 1, 1)) return run(UnpoolContexts<kC, kST, kST, 1, 1>{});
      if (are(kC, kST, kST, 2, 1)) return run(UnpoolContexts<kC, kST, kST, 2, 1>{});
      if (are(kST, kNone, kNone, 1, 0)) return run(UnpoolContexts<kST, kNone, kNone, 1>{});
    }
    run(UnpoolContexts<kAnyContext, kAnyContext, kAnyContext>{});
  });
}

template <class T>
void unpool_reduce(const Volume& x, const T* data, const Unpooled& from, int gate_context, Accumulate<T>* grad_gate,
                   int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const auto emit = emit_gate(x, gate_context, grad_gate);
  if (channels_side_by_side(x)) {
    Buffer<A> field(reduction_capacity(x, gate_context));
    reduce<A, Sum<A>>(
        x, gate_context, begin, end,
        [&](const Tile& at, Vec<A>* tile) {
          load_tile(x, at, data, tile);
          unpool_tile<A>(x, at, from, field);
          for (int64_t i = 0; i < at.vectors(x); ++i) tile[i] *= field[i];
        },
        emit);
    return;
  }
  if (gate_context == kChannel && from.context == kChannel)
    return reduce_planes_to_channel<A, Sum<A>>(
        x, begin, end,
        [&](const Planes& at) {
          return [&](int64_t k) {
            return [source = data + run_offset(x, at, k), ahead = at.ahead, u = UnpooledRun<A>(x, from, at, k)](
                       int64_t i, auto n) { return load_ahead(source + i, ahead, n) * u(i, n); };
          };
        },
        emit);
  with_rows<A>(x.W, [&](auto kind) {
    using Kind = decltype(kind);
    const auto unpooled = [&](auto context, auto stored, auto&& to) {
      const UnpooledRows<A, decltype(stored), Kind, context> field(x, from);
      to([&](const RowPlane<Kind>& at) {
        return [source = data + at.in_x, second = at.second(x.stride_c), at, u = field.plane(at)](int64_t r) {
          return [source, second, ahead = at.ahead_of(r, second), row = u.row(r)](int64_t i, int64_t column, auto n) {
            return load_row_ahead<Kind>(source + i, second, ahead, n) * row(row.over_t(i, n), i, column, n);
          };
        };
      });
    };
    const auto to_spacetime = [&](auto&& values) {
      reduce_rows_to_spacetime<A, Kind, Sum<A>, AnyBytes>(x, begin, end, values, emit);
    };
    const auto to_channel = [&](auto&& values) {
      reduce_rows_to_channel<A, Kind, Sum<A>>(x, begin, end, values, emit);
    };
    constexpr std::integral_constant<int, kChannel> channel;
    constexpr std::integral_constant<int, kSpacetime> spacetime;
    constexpr std::integral_constant<int, kAnyContext> any;
    if constexpr (kOften<T>) {
      if (gate_context == kChannel && from.index_bytes == 1) return unpooled(spacetime, IndexBytes<1>{}, to_channel);
      if (gate_context == kSpacetime && from.context == kChannel && from.index_bytes == 1)
        return unpooled(channel, IndexBytes<1>{}, to_spacetime);
      if (gate_context == kSpacetime && from.context == kChannel && from.index_bytes == 2)
        return unpooled(channel, IndexBytes<2>{}, to_spacetime);
    }
    if (gate_context == kSpacetime)
      unpooled(any, AnyBytes{}, to_spacetime);
    else
      unpooled(spacetime, AnyBytes{}, to_channel);
  });
}

template <class T>
constexpr PoolPasses kPasses = {kLanes, untyped<pool<T>>, untyped<unpool<T>>, untyped<unpool_reduce<T>>};

}  // namespace

}  // namespace aia::cpu::AIA_CPU_LEVEL

namespace aia::cpu {

using namespace AIA_CPU_LEVEL;

const PoolPasses PoolPasses::AIA_CPU_LEVEL[] = {kPasses<float>, kPasses<double>, kPasses<bf16>, kPasses<f16>};

}  // namespace aia::cpu
