// unpool (aia_kernels/schemas.py has the equation).
//
//   unpool  reads 1 |X|, writes 1 |X|   grad_y * G + G_inner * U + U_inner
//
// and what is left of it without U, x * G with a G over T, H and W, which is recalibrate.
//
// A thread owns V neighbours in memory of kPlanes channels and walks with them over T. What it needs of the maps over
// [H, W, C], which meet every frame, stays in registers, and frames of grad_y are always on their way. The contexts are
// parameters of the template. V neighbours never leave a row; with channels innermost, they are channels.
#include <algorithm>
#include <type_traits>

#include "elementwise.cuh"
#include "staged.h"
#include "unpool.h"
#include "walk.cuh"

namespace aia::cuda {
namespace {

// Which contexts the fields of a unit have.
template <int kGate, int kOuter, int kInnerGate, int kInner>
struct Unit {
  static constexpr int gate = kGate, outer = kOuter, inner_gate = kInnerGate, inner = kInner;
  static constexpr bool unpools = kOuter != kNone || kInner != kNone;
};
// That of recalibrate.
using GateAlone = Unit<kSpacetime, kNone, kNone, kNone>;

// The fields of a call, and how a clip is shared out: a unit of work is a thread's.
template <class A>
struct UnpoolCall {
  Volume<A> v;
  GateField<A> gate, inner_gate;
  UnpooledField<A> outer, inner;
  int units;
  Divisor by_block, by_run, by_row;  // blocks of a clip; units of so many planes, or of a position; vectors of a row

  UnpoolCall(const Shape& shape, Gate gate, Unpooled outer, Gate inner_gate, Unpooled inner, int V, int planes)
      : v(shape),
        gate(gate),
        inner_gate(inner_gate),
        outer(outer),
        inner(inner),
        units(v.T == 0 ? 0 : v.size() / v.T / V / planes),
        by_block(ceil_div(units, kElementThreads)),
        by_run(v.I > 1 ? v.I / V / planes : v.H * v.W / V),
        by_row(v.I > 1 ? v.W : v.W / V) {}

  // Of the first vector of a unit.
  template <int V, int kPlanes, bool kInner>
  __device__ __forceinline__ Position position(int unit) const {
    Position p{0, 0, 0, 0, 0};
    int outside = by_run.divide(unit);
    if constexpr (kInner) {
      constexpr int kLanes = kPlanes == 1 ? 1 : kApart<kPlanes> / V;
      p.i = unit / kLanes * kLanes * kPlanes * V + unit % kLanes * V;
      p.h = by_row.divide(outside);
      p.w = outside;
    } else {
      p.o = outside * kPlanes;
      p.h = by_row.divide(unit);
      p.w = unit * V;
    }
    return p;
  }
};

template <class T, int V, int kPlanes, bool kInner, class Unit, class ChannelIndex, class Index,
          class A = Accumulate<T>>
__global__ void __launch_bounds__(kElementThreads, 2)
    unpool_kernel(UnpoolCall<A> call,
                  const T* __restrict__ grad_y,  // [B, T, C, H, W] in its order of storage
                  T* __restrict__ grad_x) {      // as grad_y
  int unit = blockIdx.x;
  const int64_t clip = call.by_block.divide(unit);
  unit = unit * kElementThreads + threadIdx.x;
  if (unit >= call.units) return;
  Walk<A, kPlanes, kInner ? Across::kChannels : Across::kPlanes> walk(call.v,
                                                                      call.template position<V, kPlanes, kInner>(unit));
  const T* from = grad_y + clip * call.v.size();
  T* to = grad_x + clip * call.v.size();
  opaque(from), opaque(to);

  using Of = std::conditional_t<Unit::outer == kChannel, ChannelIndex, Index>;
  using OfInner = std::conditional_t<Unit::inner == kChannel, ChannelIndex, Index>;
  WalkedGate<A, V, kPlanes, Unit::gate, kInner> gate;
  WalkedGate<A, V, kPlanes, Unit::inner_gate, kInner> inner_gate;
  WalkedGradient<A, Of, V, kPlanes, Unit::outer, kInner> outer;
  WalkedGradient<A, OfInner, V, kPlanes, Unit::inner, kInner> inner;
  gate.begin(call.gate, walk, clip);
  inner_gate.begin(call.inner_gate, walk, clip);
  outer.begin(call.outer, walk, clip);
  inner.begin(call.inner, walk, clip);

  const Ahead<T, V, kPlanes, kElementThreads> ahead(from);
  ahead.begin(walk);
#pragma unroll 1
  for (; walk.p.t < call.v.T; walk.move()) {
    Vector<T, V> grads[kPlanes];
    ahead.take(walk, grads);
    ahead.ask(walk);
    gate.next(walk);
    inner_gate.next(walk);
    outer.next(walk);
    inner.next(walk);
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) {
      const Places here = walk.of_vector(r);
      const auto unpooled = outer.of_vector(walk, here, r), result = inner.of_vector(walk, here, r);
      const auto g = gate.of_vector(here, r), inside = inner_gate.of_vector(here, r);
      const Vector<A, V> values = widened(grads[r]);
      Vector<T, V> stored;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        A value = values.at[j] * g.at[j];
        if constexpr (Unit::unpools) value += inside.at[j] * unpooled.at[j] + result.at[j];
        stored.at[j] = narrow<T>(value);
      }
      store_vector(to + here.x, stored);
    }
  }
}

// Any contexts, element by element.
template <class A>
struct UnpoolOp {
  GateField<A> gate;
  UnpooledField<A> outer;
  GateField<A> inner_gate;
  UnpooledField<A> inner;

  template <int V>
  __device__ __forceinline__ void apply(const Volume<A>& v, int64_t clip, const Position& p, Vector<A, V>& grad) const {
    const auto g = spread<V>(gate, v, clip, p), inside = spread<V>(inner_gate, v, clip, p);
    const auto u = spread<V>(outer, v, clip, p), inner_u = spread<V>(inner, v, clip, p);
#pragma unroll
    for (int k = 0; k < V; ++k) grad.at[k] = grad.at[k] * g.at[k] + inside.at[k] * u.at[k] + inner_u.at[k];
  }
};

// A call of unpool, and how its kernel is found.
struct Unpooling {
  const Shape& shape;
  const void* grad_y;
  Gate gate;
  Unpooled outer;
  Gate inner_gate;
  Unpooled inner;
  void* grad_x;
  void* stream;

  template <class Of>
  bool is(Of) const {
    return gate.context == Of::gate && outer.context == Of::outer && inner_gate.context == Of::inner_gate &&
           inner.context == Of::inner;
  }
  // Bytes of the indices along an axis; 0 where no map is pooled along it.
  int index_bytes(int context) const {
    return outer.context == context ? outer.index_bytes : inner.context == context ? inner.index_bytes : 0;
  }
  bool aligned() const {
    return are_aligned(
        {grad_y, grad_x, gate.maps, outer.grad, outer.argmax, inner_gate.maps, inner.grad, inner.argmax});
  }

  template <class T, int V, int kPlanes, bool kInner, class Of, class ChannelIndex, class Index>
  int run() const {
    using A = Accumulate<T>;
    const UnpoolCall<A> call(shape, gate, outer, inner_gate, inner, V, kPlanes);
    return launch(unpool_kernel<T, V, kPlanes, kInner, Of, ChannelIndex, Index>, shape.B * call.by_block.divisor,
                  kElementThreads, stream, call, static_cast<const T*>(grad_y), static_cast<T*>(grad_x));
  }

  // In vectors of four where these keep to rows, or to channels, and meet vectors of every map; two or one elsewhere,
  // with more channels a thread. A double is moved alone.
  template <class T, class Of>
  int of_unit() const {
    const Volume<Accumulate<T>> v(shape);
    if constexpr (sizeof(T) <= 4) {
      constexpr int kPlanes = sizeof(T) == 2 ? 4 : 2;
      const bool narrow = index_bytes(kSpacetime) <= 1 && index_bytes(kChannel) <= 2;
      const bool bytes = index_bytes(kChannel) <= 1, maps = narrow && aligned();
      const int packed = v.packed(kSpacetime), length = v.I > 1 ? v.I : v.W;
      const bool fours = maps && length % 4 == 0 && packed % 4 == 0;
      if (fours && v.I % 256 == 0)
        return bytes ? run<T, 4, kPlanes, true, Of, uint8_t, uint8_t>()
                     : run<T, 4, kPlanes, true, Of, int16_t, uint8_t>();
      if (fours && v.I > 1) return run<T, 4, 1, true, Of, int, int>();
      if (fours && v.O % kPlanes == 0)
        return bytes ? run<T, 4, kPlanes, false, Of, uint8_t, uint8_t>()
                     : run<T, 4, kPlanes, false, Of, int16_t, uint8_t>();
      // Indices over C are loaded once for eight elements of a frame: telling their width there costs little.
      if (maps && v.I == 1 && length % 2 == 0 && packed % 2 == 0 && v.O % 4 == 0)
        return run<T, 2, 4, false, Of, ByteOrShort, uint8_t>();
      const bool words = sizeof(T) == 4 || are_aligned({grad_y});
      if (narrow && words && v.I == 1 && v.O % 4 == 0)
        return bytes ? run<T, 1, 4, false, Of, uint8_t, uint8_t>() : run<T, 1, 4, false, Of, int16_t, uint8_t>();
    }
    return v.I > 1 ? run<T, 1, 1, true, Of, int, int>() : run<T, 1, 1, false, Of, int, int>();
  }

  // The same without U, -1 where there are no such vectors.
  template <class T>
  int of_gate() const {
    if constexpr (sizeof(T) <= 4) {
      constexpr int kPlanes = sizeof(T) == 2 ? 4 : 2;
      const Volume<Accumulate<T>> v(shape);
      const bool maps = aligned(), words = sizeof(T) == 4 || are_aligned({grad_y});
      const int packed = v.packed(kSpacetime), length = v.I > 1 ? v.I : v.W;
      const bool fours = maps && length % 4 == 0 && packed % 4 == 0;
      if (fours && v.I % 256 == 0) return run<T, 4, kPlanes, true, GateAlone, uint8_t, uint8_t>();
      if (v.I > 1 || v.O % 4 != 0) return -1;
      if (fours) return run<T, 4, kPlanes, false, GateAlone, uint8_t, uint8_t>();
      if (maps && length % 2 == 0 && packed % 2 == 0) return run<T, 2, 4, false, GateAlone, uint8_t, uint8_t>();
      if (words) return run<T, 1, 4, false, GateAlone, uint8_t, uint8_t>();
    }
    return -1;
  }

  // Of units whose gate and gradient of a context belong together.
  int staged() const {
    if (is(Unit<3, 3, 0, 0>{}) || is(Unit<3, 3, 1, 1>{}))
      return unpool_staged(shape, grad_y, {gate, outer, inner_gate, inner, true}, grad_x, stream);
    if (is(Unit<1, 1, 3, 3>{}))
      return unpool_staged(shape, grad_y, {inner_gate, inner, gate, outer, false}, grad_x, stream);
    return -1;
  }

  template <class T>
  int any() const {
    using A = Accumulate<T>;
    if (is(Unit<1, 1, 0, 0>{})) return of_unit<T, Unit<1, 1, 0, 0>>();
    if (is(Unit<3, 3, 0, 0>{})) return of_unit<T, Unit<3, 3, 0, 0>>();
    if (is(Unit<3, 3, 1, 1>{})) return of_unit<T, Unit<3, 3, 1, 1>>();
    if (is(Unit<1, 1, 3, 3>{})) return of_unit<T, Unit<1, 1, 3, 3>>();
    if (is(Unit<1, 1, 1, 3>{})) return of_unit<T, Unit<1, 1, 1, 3>>();
    const UnpoolOp<A> op{GateField<A>(gate), UnpooledField<A>(outer), GateField<A>(inner_gate),
                         UnpooledField<A>(inner)};
    return element_by_element<T>(shape, grad_y, grad_x, op, stream);
  }
};

}  // namespace

int recalibrate_by_walk(const Shape& shape, const void* x, Gate gate, void* y, void* stream) {
  const int error = unpool_staged(shape, x, {gate, {}, {}, {}, true}, y, stream);
  if (error >= 0) return error;
  const Unpooling call{shape, x, gate, {}, {}, {}, y, stream};
  return with_scalar(shape.scalar, [&](auto type) { return call.of_gate<decltype(type)>(); });
}

int unpool(const Shape& shape, const void* grad_y, Gate gate, Unpooled outer, Gate inner_gate, Unpooled inner,
           void* grad_x, void* stream) {
  const Unpooling call{shape, grad_y, gate, outer, inner_gate, inner, grad_x, stream};
  const int error = call.staged();
  if (error >= 0) return error;
  return with_scalar(shape.scalar, [&](auto type) { return call.any<decltype(type)>(); });
}

}  // namespace aia::cuda
