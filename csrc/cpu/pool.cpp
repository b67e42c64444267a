// pool and its transposes on the CPU. See aia_kernels/schemas.py for what each computes.
#include "fields.h"
#include "reduce.h"
#include "untyped.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

template <class T>
void pool(const Volume& x, const T* data, const Gate& gate, int context, Accumulate<T>* pooled, void* argmax,
          int index_bytes, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t packed = x.packed(context);
  const auto emit = [&](int64_t clip, int64_t offset, const SumAndMax<A>& total, int64_t length, int lanes) {
    A* maximum = pooled + clip * 2 * packed + offset;
    store(maximum, total.max, lanes);
    store(maximum + packed, total.sum * (A(1) / static_cast<A>(length)), lanes);
    // Here and not around the whole: the reductions, which are large, are then compiled for one index type.
    with_index(index_bytes, [&](auto index) {
      store_index<A>(static_cast<decltype(index)*>(argmax) + clip * packed + offset, total.argmax, lanes);
    });
  };
  if (context == kChannel && lanes_along_positions(x, gate.context)) {
    reduce_channel_rows<A, SumAndMax<A>>(
        x, begin, end,
        [&](const Tile& at) {
          const A* g = gate.context ? map_row<A>(x, at, gate.maps, packed) : nullptr;
          return [source = data + tile_offset(x, at), stride = x.stride_c, g](int64_t c, int64_t i, auto n) {
            const Vec<A> value = load_channel(source, stride, c, i, n);
            return g ? value * load(g + i, n) : value;
          };
        },
        emit);
  } else {
    reduce<A, SumAndMax<A>>(
        x, context, begin, end,
        [&](const Tile& at, Vec<A>* tile) {
          load_tile(x, at, data, tile);
          if (gate.context) multiply_by_gate<A>(x, at, gate, tile, tile);
        },
        emit);
  }
}

template <class T>
void unpool(const Volume& x, const T* grad_y, const Gate& gate, const Unpooled& outer, const Gate& inner_gate,
            const Unpooled& inner, T* grad_x, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  if (lanes_along_positions(x, std::max({outer.context, inner_gate.context, inner.context}))) {
    with_index(outer.index_bytes, [&](auto index) {
      using Field = ChannelUnpooled<A, decltype(index)>;  // both contexts pool over C: one index type serves them
      for (int64_t unit = begin; unit < end; ++unit) {
        for_channels_of_unit(x, unit, [&](const Tile& at, int64_t c, int64_t row) {
          const Field u(x, at, outer), v(x, at, inner.context ? inner : outer);
          const A* g = map_row<A>(x, at, gate.maps, x.packed(kChannel));
          const A* h = inner_gate.context ? map_row<A>(x, at, inner_gate.maps, x.packed(kChannel)) : nullptr;
          for_positions(x.H * x.W, [&](int64_t i, auto n) {
            Vec<A> field = u(c, i, n);
            if (h) field *= load(h + i, n);
            if (inner.context) field += v(c, i, n);
            store(grad_x + row + i, load(grad_y + row + i, n) * load(g + i, n) + field, n);
          });
        });
      }
    });
    return;
  }
  const int64_t capacity = elementwise_capacity(x);
  Buffer<A> tile(capacity), field(capacity);
  for (int64_t unit = begin; unit < end; ++unit) {
    for_each_elementwise_tile(x, unit, [&](const Tile& at) {
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
}

template <class T>
void unpool_reduce(const Volume& x, const T* data, const Unpooled& from, int gate_context, Accumulate<T>* grad_gate,
                   int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  if (gate_context == kChannel && lanes_along_positions(x, from.context)) {
    with_index(from.index_bytes, [&](auto index) {
      reduce_channel_rows<A, Sum<A>>(
          x, begin, end,
          [&](const Tile& at) {
            return [source = data + tile_offset(x, at), stride = x.stride_c,
                    u = ChannelUnpooled<A, decltype(index)>(x, at, from)](int64_t c, int64_t i, auto n) {
              return load_channel(source, stride, c, i, n) * u(c, i, n);
            };
          },
          emit_gate(x, gate_context, grad_gate));
    });
    return;
  }
  Buffer<A> field(reduction_capacity(x, gate_context));
  reduce<A, Sum<A>>(
      x, gate_context, begin, end,
      [&](const Tile& at, Vec<A>* tile) {
        load_tile(x, at, data, tile);
        unpool_tile<A>(x, at, from, field);
        for (int64_t i = 0; i < at.vectors(x); ++i) tile[i] *= field[i];
      },
      emit_gate(x, gate_context, grad_gate));
}

template <class T>
constexpr PoolPasses kPasses = {kLanes, untyped<pool<T>>, untyped<unpool<T>>, untyped<unpool_reduce<T>>};

}  // namespace

}  // namespace aia::cpu::AIA_CPU_LEVEL

namespace aia::cpu {

using namespace AIA_CPU_LEVEL;

const PoolPasses PoolPasses::AIA_CPU_LEVEL[] = {kPasses<float>, kPasses<double>, kPasses<bf16>, kPasses<f16>};

}  // namespace aia::cpu
