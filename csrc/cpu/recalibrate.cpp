// recalibrate and its reduction on the CPU. See aia_kernels/schemas.py for what each computes.
#include "fields.h"
#include "plane_fields.h"
#include "plane_reduce.h"
#include "untyped.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

template <class T>
void recalibrate(const Volume& x, const T* data, const Gate& gate, T* y, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  if (channels_side_by_side(x)) {
    Buffer<A> tile(row_capacity(x));
    for (int64_t unit = begin; unit < end; ++unit) {
      for_each_tile_of_rows(x, unit, [&](const Tile& at) {
        load_tile(x, at, data, static_cast<Vec<A>*>(tile));
        multiply_by_gate<A>(x, at, gate, tile, tile);
        store_tile(x, at, static_cast<const Vec<A>*>(tile), y);
      });
    }
    return;
  }
  GatePlanes<A> field(x, gate, plane_capacity(x));
  for (int64_t unit = begin; unit < end; ++unit) {
    for_elementwise_planes(x, unit, gate.context, [&](const Planes& at) {
      field.meet(at);
      for_runs(x, at, field.along_planes(), [&](int64_t k, int64_t n) {
        const T* from = data + run_offset(x, at, k);
        T* to = y + run_offset(x, at, k);
        const auto g = field.run(at, k);
        for_positions(n, [=, ahead = at.ahead](int64_t i, auto lanes) {
          store(to + i, load_ahead(from + i, ahead, lanes) * g(i, lanes), lanes);
        });
      });
    });
  }
}

template <class T>
void recalibrate_reduce(const Volume& x, const T* grad_y, const T* data, int context, Accumulate<T>* grad_gate,
                        int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const auto emit = emit_gate(x, context, grad_gate);
  if (channels_side_by_side(x)) {
    Buffer<A> grad(reduction_capacity(x, context));
    reduce<A, Sum<A>>(
        x, context, begin, end,
        [&](const Tile& at, Vec<A>* tile) {
          load_tile(x, at, data, tile);
          load_tile(x, at, grad_y, static_cast<Vec<A>*>(grad));
          for (int64_t i = 0; i < at.vectors(x); ++i) tile[i] *= grad[i];
        },
        emit);
    return;
  }
  reduce_planes<A, Sum<A>>(
      x, context, true, begin, end,
      [&](const Planes& at) {
        return [&](int64_t k) {
          const int64_t start = run_offset(x, at, k);
          return [a = grad_y + start, b = data + start, ahead = at.ahead](int64_t i, auto n) {
            return load_ahead(a + i, ahead, n) * load_ahead(b + i, ahead, n);
          };
        };
      },
      [&](int64_t offset) { __builtin_prefetch(data + offset), __builtin_prefetch(grad_y + offset); }, emit);
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
