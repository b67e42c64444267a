// pool and its transposes on the CPU. See aia_kernels/schemas.py for what each computes.
#include "fields.h"
#include "plane_fields.h"
#include "plane_reduce.h"
#include "untyped.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

template <class T>
void pool(const Volume& x, const T* data, const Gate& gate, int context, Accumulate<T>* pooled, void* argmax,
          int index_bytes, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t packed = x.packed(context);
  const auto emit = [&](int64_t clip, int64_t offset, const SumAndMax<A>& total, A share, int lanes) {
    A* maximum = pooled + clip * 2 * packed + offset;
    store(maximum, total.max, lanes);
    store(maximum + packed, total.sum * share, lanes);
    // Here and not around the whole: the reductions, which are large, are then compiled for one index type.
    with_index(index_bytes, [&](auto index) {
      store_index<A>(static_cast<decltype(index)*>(argmax) + clip * packed + offset, total.argmax, lanes);
    });
  };
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
  GatePlanes<A> field(x, gate, reduced_capacity(x, context));
  reduce_planes<A, SumAndMax<A>>(
      x, context, field.along_planes(), begin, end,
      [&](const Planes& at) {
        field.meet(at);
        return [&](int64_t k) {
          return [source = data + run_offset(x, at, k), ahead = at.ahead, g = field.run(at, k)](int64_t i, auto n) {
            const Vec<A> value = load_ahead(source + i, ahead, n);
            return g.map ? value * g(i, n) : value;
          };
        };
      },
      [&](int64_t offset) { __builtin_prefetch(data + offset); }, emit);
}

// kInner: there is an inner gate, or inner features, or both.
template <class T, bool kInner>
void unpool_planes(const Volume& x, const T* grad_y, const Gate& gate, const Unpooled& outer, const Gate& inner_gate,
                   const Unpooled& inner, T* grad_x, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t capacity = plane_capacity(x);
  GatePlanes<A> outer_gate(x, gate, capacity), guide(x, inner_gate, capacity);
  UnpooledPlanes<A> outer_field(x, outer, capacity), inner_field(x, inner, capacity);
  const bool joined = outer_gate.along_planes() && guide.along_planes() && inner_field.along_planes();
  const int highest = std::max({gate.context, outer.context, inner_gate.context, inner.context});
  for (int64_t unit = begin; unit < end; ++unit) {
    for_elementwise_planes(x, unit, highest, [&](const Planes& at) {
      outer_gate.meet(at), guide.meet(at), outer_field.meet(at), inner_field.meet(at);
      for_runs(x, at, joined, [&](int64_t k, int64_t n) {
        const T* from = grad_y + run_offset(x, at, k);
        T* to = grad_x + run_offset(x, at, k);
        const auto g = outer_gate.run(at, k), h = guide.run(at, k);
        const auto u = outer_field.run(at, k), v = inner_field.run(at, k);
        for_positions(n, [=, ahead = at.ahead](int64_t i, auto lanes) {
          Vec<A> field = u(i, lanes);
          if (kInner && h.map) field *= h(i, lanes);
          if (kInner && v.peak) field += v(i, lanes);
          store(to + i, load_ahead(from + i, ahead, lanes) * g(i, lanes) + field, lanes);
        });
      });
    });
  }
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
  if (inner.context || inner_gate.context)
    unpool_planes<T, true>(x, grad_y, gate, outer, inner_gate, inner, grad_x, begin, end);
  else
    unpool_planes<T, false>(x, grad_y, gate, outer, inner_gate, inner, grad_x, begin, end);
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
  UnpooledPlanes<A> field(x, from, reduced_capacity(x, gate_context));
  reduce_planes<A, Sum<A>>(
      x, gate_context, field.along_planes(), begin, end,
      [&](const Planes& at) {
        field.meet(at);
        return [&](int64_t k) {
          return [source = data + run_offset(x, at, k), ahead = at.ahead, u = field.run(at, k)](int64_t i, auto n) {
            return load_ahead(source + i, ahead, n) * u(i, n);
          };
        };
      },
      [&](int64_t offset) { __builtin_prefetch(data + offset); }, emit);
}

template <class T>
constexpr PoolPasses kPasses = {kLanes, untyped<pool<T>>, untyped<unpool<T>>, untyped<unpool_reduce<T>>};

}  // namespace

}  // namespace aia::cpu::AIA_CPU_LEVEL

namespace aia::cpu {

using namespace AIA_CPU_LEVEL;

const PoolPasses PoolPasses::AIA_CPU_LEVEL[] = {kPasses<float>, kPasses<double>, kPasses<bf16>, kPasses<f16>};

}  // namespace aia::cpu
