// pool and its transposes on the CPU. See aia_kernels/ops.py for what each computes.
#include "fields.h"
#include "reduce.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

template <class T>
void pool_as(const Volume& x, const T* data, const Gate& gate, int context, Accumulate<T>* pooled, void* argmax,
             Index index, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t packed = x.packed(context);
  with_index(index, [&](auto index_value) {
    using I = decltype(index_value);
    reduce<A, SumAndMax<A>>(
        x, context, begin, end,
        [&](const Tile& at, Vec<A>* tile) {
          load_tile(x, at, data, tile);
          if (gate.context) multiply_by_gate<A>(x, at, gate, tile);
        },
        [&](const Tile& at, int64_t offset, const SumAndMax<A>& total, int64_t length, int lanes) {
          A* maximum = pooled + at.b * 2 * packed + offset;
          store(maximum, total.max, lanes);
          store(maximum + packed, total.sum * (A(1) / static_cast<A>(length)), lanes);
          store_index<A>(static_cast<I*>(argmax) + at.b * packed + offset, total.argmax, lanes);
        });
  });
}

template <class T>
void unpool_as(const Volume& x, const T* grad_y, const Gate& gate, const Unpooled& outer, const Gate& inner_gate,
               const Unpooled& inner, T* grad_x, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t capacity = tile_capacity(x);
  Buffer<A> tile(capacity), field(capacity);
  for (int64_t unit = begin; unit < end; ++unit) {
    for_each_tile(x, unit, [&](const Tile& at) {
      const int64_t n = at.rows * x.W;
      load_tile(x, at, grad_y, static_cast<Vec<A>*>(tile));
      multiply_by_gate<A>(x, at, gate, tile);
      unpool_tile<A>(x, at, outer, field);
      if (inner_gate.context) multiply_by_gate<A>(x, at, inner_gate, field);
      for (int64_t i = 0; i < n; ++i) tile[i] += field[i];
      if (inner.context) {
        unpool_tile<A>(x, at, inner, field);
        for (int64_t i = 0; i < n; ++i) tile[i] += field[i];
      }
      store_tile(x, at, static_cast<const Vec<A>*>(tile), grad_x);
    });
  }
}

template <class T>
void unpool_reduce_as(const Volume& x, const T* data, const Unpooled& from, int gate_context,
                      Accumulate<T>* grad_gate, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  Buffer<A> field(tile_capacity(x));
  reduce_to_gate<A>(x, gate_context, grad_gate, begin, end, [&](const Tile& at, Vec<A>* tile) {
    load_tile(x, at, data, tile);
    unpool_tile<A>(x, at, from, field);
    for (int64_t i = 0; i < at.rows * x.W; ++i) tile[i] *= field[i];
  });
}

}  // namespace

void pool(const Volume& x, const void* data, Gate gate, int context, void* pooled, void* argmax, Index index,
          int64_t begin, int64_t end) {
  with_scalar(x.scalar, [&](auto scalar) {
    using T = decltype(scalar);
    pool_as(x, static_cast<const T*>(data), gate, context, static_cast<Accumulate<T>*>(pooled), argmax, index, begin,
            end);
  });
}

void unpool(const Volume& x, const void* grad_y, Gate gate, Unpooled outer, Gate inner_gate, Unpooled inner,
            void* grad_x, int64_t begin, int64_t end) {
  with_scalar(x.scalar, [&](auto scalar) {
    using T = decltype(scalar);
    unpool_as(x, static_cast<const T*>(grad_y), gate, outer, inner_gate, inner, static_cast<T*>(grad_x), begin, end);
  });
}

void unpool_reduce(const Volume& x, const void* data, Unpooled from, int gate_context, void* grad_gate, int64_t begin,
                   int64_t end) {
  with_scalar(x.scalar, [&](auto scalar) {
    using T = decltype(scalar);
    unpool_reduce_as(x, static_cast<const T*>(data), from, gate_context, static_cast<Accumulate<T>*>(grad_gate),
                     begin, end);
  });
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
