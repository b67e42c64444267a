// recalibrate and its reduction on the CPU. See aia_kernels/ops.py for what each computes.
#include "fields.h"
#include "reduce.h"

namespace aia::cpu::AIA_CPU_LEVEL {

void recalibrate(const Volume& x, const void* data, Gate gate, void* y, int64_t begin, int64_t end) {
  with_scalar(x.scalar, [&](auto scalar) {
    using T = decltype(scalar);
    using A = Accumulate<T>;
    Buffer<A> tile(tile_capacity(x));
    for (int64_t unit = begin; unit < end; ++unit) {
      for_each_tile(x, unit, [&](const Tile& at) {
        load_tile(x, at, static_cast<const T*>(data), static_cast<Vec<A>*>(tile));
        multiply_by_gate<A>(x, at, gate, tile);
        store_tile(x, at, static_cast<const Vec<A>*>(tile), static_cast<T*>(y));
      });
    }
  });
}

void recalibrate_reduce(const Volume& x, const void* grad_y, const void* data, int context, void* grad_gate,
                        int64_t begin, int64_t end) {
  with_scalar(x.scalar, [&](auto scalar) {
    using T = decltype(scalar);
    using A = Accumulate<T>;
    Buffer<A> grad(tile_capacity(x));
    reduce_to_gate<A>(x, context, static_cast<A*>(grad_gate), begin, end, [&](const Tile& at, Vec<A>* tile) {
      load_tile(x, at, static_cast<const T*>(data), tile);
      load_tile(x, at, static_cast<const T*>(grad_y), static_cast<Vec<A>*>(grad));
      for (int64_t i = 0; i < at.rows * x.W; ++i) tile[i] *= grad[i];
    });
  });
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
