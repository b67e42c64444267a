// recalibrate and its reduction on the CPU. See aia_kernels/schemas.py for what each computes.
#include "fields.h"
#include "plane_fields.h"
#include "plane_reduce.h"
#include "row_fields.h"
#include "row_reduce.h"
#include "untyped.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

// One frame of a plane.
template <class T, class Kind>
struct RecalibratedFrame {
  using A = Accumulate<T>;
  using Gates = GateRows<A, Kind, kSpacetime>;

  struct Row {
    typename Gates::Row gate;
    const T* from;
    T* to;
    int64_t second, ahead;

    template <class Lanes>
    AIA_INLINE Vec<A> over_t(int64_t i, Lanes n) const {
      return gate.over_t(i, n);
    }
    template <class Lanes>
    AIA_INLINE void store(Vec<A> of_t, int64_t i, int64_t column, Lanes n) const {
      const Vec<A> value = load_row_ahead<Kind>(from + i, second, ahead, n);
      store_row_ahead<Kind>(to + i, second, ahead, value * gate(of_t, i, column, n), n);
    }
  };

  const RowPlane<Kind>& at;
  typename Gates::Plane gate;
  const T* from;
  T* to;
  int64_t second;

  AIA_INLINE Row row(int64_t r) const { return {gate.row(r), from, to, second, at.ahead_of(r, second)}; }
};

template <class T>
__attribute__((flatten)) void recalibrate_rows(const Volume& x, const T* data, const Gate& gate, T* y, int64_t begin,
                                               int64_t end) {
  with_rows<Accumulate<T>>(x.W, [&](auto kind) {
    using Kind = decltype(kind);
    using Frame = RecalibratedFrame<T, Kind>;
    const typename Frame::Gates field(x, gate);
    const auto frame = [&](const RowPlane<Kind>& at) {
      return Frame{at, field.plane(at), data + at.in_x, y + at.in_x, at.second(x.stride_c)};
    };
    for (int64_t unit = begin; unit < end; ++unit)
      for_row_planes<Kind>(
          x, unit, [&](const RowPlane<Kind>& at, const auto&... next) { store_rows(at, frame(at), frame(next)...); });
  });
}

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
  if (gate.context == kSpacetime) return recalibrate_rows(x, data, gate, y, begin, end);
  for (int64_t unit = begin; unit < end; ++unit) {
    for_elementwise_planes(x, unit, [&](const Planes& at) {
      const GateRun<A> g(x, gate, at);
      for (int64_t k = 0; k < at.channels; ++k) {
        const T* from = data + run_offset(x, at, k);
        T* to = y + run_offset(x, at, k);
        for_positions(at.run(x), [=, ahead = at.ahead](int64_t i, auto lanes) {
          store_ahead(to + i, ahead, load_ahead(from + i, ahead, lanes) * g(i, lanes), lanes);
        });
      }
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
  if (context == kChannel)
    return reduce_planes_to_channel<A, Sum<A>>(
        x, begin, end,
        [&](const Planes& at) {
          return [&](int64_t k) {
            const int64_t start = run_offset(x, at, k);
            return [a = grad_y + start, b = data + start, ahead = at.ahead](int64_t i, auto n) {
              return load_ahead(a + i, ahead, n) * load_ahead(b + i, ahead, n);
            };
          };
        },
        emit);
  with_rows<A>(x.W, [&](auto kind) {
    using Kind = decltype(kind);
    reduce_rows_to_spacetime<A, Kind, Sum<A>, AnyBytes>(
        x, begin, end,
        [&](const RowPlane<Kind>& at) {
          const int64_t offset = at.in_x;
          return [a = grad_y + offset, b = data + offset, second = at.second(x.stride_c), at](int64_t r) {
            return [a, b, second, ahead = at.ahead_of(r, second)](int64_t i, int64_t, auto n) {
              return load_row_ahead<Kind>(a + i, second, ahead, n) * load_row_ahead<Kind>(b + i, second, ahead, n);
            };
          };
        },
        emit);
  });
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
