// recalibrate and its reduction on the CPU. See aia_kernels/schemas.py for what each computes.
#include "fields.h"
#include "reduce.h"
#include "untyped.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

template <class T>
void recalibrate(const Volume& x, const T* data, const Gate& gate, T* y, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  if (lanes_along_positions(x, gate.context)) {
    for (int64_t unit = begin; unit < end; ++unit) {
      for_channels_of_unit(x, unit, [&](const Tile& at, int64_t, int64_t row) {
        const A* g = map_row<A>(x, at, gate.maps, x.packed(kChannel));
        for_positions(x.H * x.W,
                      [&](int64_t i, auto n) { store(y + row + i, load(data + row + i, n) * load(g + i, n), n); });
      });
    }
    return;
  }
  Buffer<A> tile(elementwise_capacity(x));
  for (int64_t unit = begin; unit < end; ++unit) {
    for_each_elementwise_tile(x, unit, [&](const Tile& at) {
      load_tile(x, at, data, static_cast<Vec<A>*>(tile));
      multiply_by_gate<A>(x, at, gate, tile, tile);
      store_tile(x, at, static_cast<const Vec<A>*>(tile), y);
    });
  }
}

template <class T>
void recalibrate_reduce(const Volume& x, const T* grad_y, const T* data, int context, Accumulate<T>* grad_gate,
                        int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  if (lanes_along_positions(x, context)) {
    reduce_channel_rows<A, Sum<A>>(
        x, begin, end,
        [&](const Tile& at) {
          const int64_t start = tile_offset(x, at);
          return [a = grad_y + start, b = data + start, stride = x.stride_c](int64_t c, int64_t i, auto n) {
            return load_channel(a, stride, c, i, n) * load_channel(b, stride, c, i, n);
          };
        },
        emit_gate(x, context, grad_gate));
    return;
  }
  Buffer<A> grad(reduction_capacity(x, context));
  reduce<A, Sum<A>>(
      x, context, begin, end,
      [&](const Tile& at, Vec<A>* tile) {
        load_tile(x, at, data, tile);
        load_tile(x, at, grad_y, static_cast<Vec<A>*>(grad));
        for (int64_t i = 0; i < at.vectors(x); ++i) tile[i] *= grad[i];
      },
      emit_gate(x, context, grad_gate));
}

template <class T>
constexpr RecalibratePasses kPasses = {kLanes, untyped<recalibrate<T>>, untyped<recalibrate_reduce<T>>};

}  // namespace

}  // namespace aia::cpu::AIA_CPU_LEVEL

namespace aia::cpu {

using namespace AIA_CPU_LEVEL;

const RecalibratePasses RecalibratePasses::AIA_CPU_LEVEL[] = {kPasses<float>, kPasses<double>, kPasses<bf16>,
                                                              kPasses<f16>};

}  // namespace aia::cpu
