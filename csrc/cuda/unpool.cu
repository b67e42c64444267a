// unpool (aia_kernels/schemas.py has the equation).
//
//   unpool  reads 1 |X|, writes 1 |X|   grad_y * G + G_inner * U + U_inner
//
// A thread owns V neighbours in memory of kPlanes channels and walks with them over T. What it needs of the maps over
// [H, W, C], which meet every frame, stays in registers, and frames of grad_y are always on their way. The contexts are
// parameters of the template. V neighbours never leave a row; with channels innermost, they are channels.
#include <algorithm>
#include <type_traits>

#include "elementwise.cuh"

namespace aia::cuda {
namespace {

// Which contexts the fields of a unit have.
template <int kGate, int kOuter, int kInnerGate, int kInner>
struct Unit {
  static constexpr int gate = kGate, outer = kOuter, inner_gate = kInnerGate, inner = kInner;
};

// Indices of V neighbours, compared as they are stored: a pattern holds the index that is asked for at every place of a
// word. Of an Index int, they are stored in any width.
template <class Index, int V>
struct StoredIndices {
  static constexpr bool kAny = sizeof(Index) == 4;
  static constexpr int kBits = 8 * sizeof(Index), kBytes = V * static_cast<int>(sizeof(Index));
  using Word = std::conditional_t<kBytes == 1, uint8_t, std::conditional_t<kBytes == 2, uint16_t, uint32_t>>;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word)), kInWord = V / kWords;

  uint32_t words[kWords];

  __device__ __forceinline__ void load(const Indices& from, uint32_t k) {
    if constexpr (kAny) {
      const auto loaded = from.template load<V>(k);
#pragma unroll
      for (int j = 0; j < kWords; ++j) words[j] = static_cast<uint32_t>(loaded.at[j]);
    } else {
      const auto loaded = load_vector<kWords>(reinterpret_cast<const Word*>(static_cast<const Index*>(from.data) + k));
#pragma unroll
      for (int j = 0; j < kWords; ++j) words[j] = loaded.at[j];
    }
  }
  static __device__ __forceinline__ uint32_t pattern(int index) {
    return static_cast<uint32_t>(index) * (kBits == 8 ? 0x01010101u : kBits == 16 ? 0x00010001u : 1u);
  }
  __device__ __forceinline__ bool holds(int j, uint32_t pattern) const {
    constexpr uint32_t kMask = kBits == 32 ? ~0u : (1u << kBits % 32) - 1;
    return ((words[j / kInWord] ^ pattern) & kMask << j % kInWord * kBits) == 0;
  }
};

// Packed gradients of one clip.
template <class A>
struct ClipGradients {
  const A *maximum, *mean;
  Indices argmax;

  ClipGradients() = default;
  __device__ __forceinline__ ClipGradients(const UnpooledField<A>& field, int64_t clip, int packed)
      : maximum(field.grad + 2 * clip * packed),
        mean(maximum + packed),
        argmax{static_cast<uint8_t*>(field.argmax.data) + clip * packed * field.argmax.bytes, field.argmax.bytes} {
    opaque(maximum), opaque(mean), opaque(argmax.data);
  }
};

// The gradients of a map at V neighbours of x. Along says that these follow one another along the pooled axis: they
// then share one element of the map.
template <class A, class Index, int V, bool kAlong>
struct MapGradient {
  static constexpr int kWide = kAlong ? 1 : V;

  Vector<A, kWide> maximum, mean;
  StoredIndices<Index, kWide> argmax;

  __device__ __forceinline__ void load(const ClipGradients<A>& from, int k) {
    maximum = load_vector<kWide>(from.maximum + k);
    mean = load_vector<kWide>(from.mean + k);
    argmax.load(from.argmax, k);
  }
  // sums + the gradient of the mean, over the length of the axis.
  __device__ __forceinline__ void add_mean(Vector<A, V>& sums, A per_length) const {
    const A shared = mean.at[0] * per_length;
#pragma unroll
    for (int j = 0; j < V; ++j)
      sums.at[j] = kAlong ? sums.at[j] + shared : mean.at[kAlong ? 0 : j] * per_length + sums.at[j];
  }
  // The first of the V elements has this index along the axis.
  __device__ __forceinline__ void add_maximum(Vector<A, V>& sums, int index) const {
    const int chosen = static_cast<int>(argmax.words[0]) - index;
    const uint32_t pattern = argmax.pattern(index);
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (kAlong ? chosen == j : argmax.holds(j, pattern)) sums.at[j] += maximum.at[kAlong ? 0 : j];
  }
};

// Elements of x and of the maps.
struct Places {
  int x, t_map, h_map, w_map, channel_map;

  __device__ __forceinline__ void move(const Places& by) {
    x += by.x, h_map += by.h_map, w_map += by.w_map, channel_map += by.channel_map;
  }
};

// With channels innermost, vectors of a thread lie so many channels apart: lanes side by side then fill lines.
template <int kPlanes>
constexpr int kApart = kPlanes == 1 ? 0 : 256 / kPlanes;

// Where a thread stands: its first vector, in frame t, and how far the next frame and the next of its vectors are.
template <class A, int kPlanes, bool kInner>
struct Walk {
  const Volume<A>& v;
  Position p;
  Places first, frame, plane;

  __device__ __forceinline__ Walk(const Volume<A>& v, const Position& p)
      : v(v), p(p), first{v.offset(p), v.t_map(p), v.h_map(p), v.w_map(p), v.channel_map(p)} {
    const int frames = v.time_inside ? 1 : v.O, planes = v.time_inside ? v.T : 1;
    frame = {v.stride_t(), 0, frames * v.W * v.I, frames * v.H * v.I, v.H * v.W};
    constexpr int kFar = kApart<kPlanes>;
    plane = kInner ? Places{kFar, kFar, kFar, kFar, 0}
                   : Places{planes * v.H * v.W, v.H * v.W, planes * v.W, planes * v.H, 0};
    if (!kInner && kPlanes > 1) opaque(plane.x), opaque(plane.h_map), opaque(plane.w_map);
    opaque(frame.x), opaque(frame.h_map), opaque(frame.w_map);
  }
  __device__ __forceinline__ int channel(int r) const { return p.channel() + (kInner ? r * kApart<kPlanes> : r); }
  // Opaque numbers are added to in 32 bits; else the compiler keeps a pointer for each array, and adds in 64.
  __device__ __forceinline__ Places of_vector(int r) const {
    Places here{first.x + r * plane.x, first.t_map + r * plane.t_map, first.h_map + r * plane.h_map,
                first.w_map + r * plane.w_map, first.channel_map};
    if (!kInner && r > 0) opaque(here.x), opaque(here.h_map), opaque(here.w_map);
    return here;
  }
  __device__ __forceinline__ void move() {
    ++p.t;
    first.move(frame);
    opaque(first.x), opaque(first.h_map), opaque(first.w_map), opaque(first.channel_map);
  }
};

// A gate at the vectors of a thread.
template <class A, int V, int kPlanes, int kContext, bool kInner>
struct WalkedGate {
  const A* maps;
  Vector<A, V> kept[kPlanes];  // of the map over T, or of the frame

  template <class At>
  __device__ __forceinline__ void begin(const GateField<A>& field, const At& walk, int64_t clip) {
    if constexpr (kContext == kNone) return;
    maps = field.maps + clip * walk.v.packed(kContext);
    opaque(maps);
    if constexpr (kContext == kSpacetime) {
#pragma unroll
      for (int r = 0; r < kPlanes; ++r) {
        kept[r] = load_vector<V>(maps + walk.of_vector(r).t_map);
#pragma unroll
        for (int j = 0; j < V; ++j) kept[r].at[j] *= A(1) / 3;
      }
    }
  }
  // What all vectors of a frame share.
  template <class At>
  __device__ __forceinline__ void next(const At& walk) {
    if constexpr (kContext == kChannel) {
      const auto found = load_vector<kInner ? 1 : V>(maps + walk.first.channel_map);
#pragma unroll
      for (int j = 0; j < V; ++j) kept[0].at[j] = found.at[kInner ? 0 : j];
    }
  }
  __device__ __forceinline__ Vector<A, V> of_vector(const Places& here, int r) const {
    if constexpr (kContext == kChannel) return kept[0];
    Vector<A, V> values;
    if constexpr (kContext == kNone) {
#pragma unroll
      for (int j = 0; j < V; ++j) values.at[j] = 1;
    } else {
      const auto h = load_vector<V>(maps + here.h_map);
      const auto w = load_vector<kInner ? V : 1>(maps + here.w_map);
#pragma unroll
      for (int j = 0; j < V; ++j) values.at[j] = (h.at[j] + w.at[kInner ? j : 0]) * (A(1) / 3) + kept[r].at[j];
    }
    return values;
  }
};

// Unpooled gradients at the vectors of a thread.
template <class A, class Index, int V, int kPlanes, int kContext, bool kInner>
struct WalkedGradient {
  ClipGradients<A> maps;
  MapGradient<A, Index, V, kContext == kChannel && kInner> kept[kPlanes];  // of the map over T, or of the frame

  template <class At>
  __device__ __forceinline__ void begin(const UnpooledField<A>& field, const At& walk, int64_t clip) {
    if constexpr (kContext == kNone) return;
    maps = ClipGradients<A>(field, clip, walk.v.packed(kContext));
    if constexpr (kContext == kSpacetime) {
#pragma unroll
      for (int r = 0; r < kPlanes; ++r) {
        kept[r].load(maps, walk.of_vector(r).t_map);
#pragma unroll
        for (int j = 0; j < V; ++j) kept[r].mean.at[j] *= walk.v.per_t;
      }
    }
  }
  // What all vectors of a frame share.
  template <class At>
  __device__ __forceinline__ void next(const At& walk) {
    if constexpr (kContext == kChannel) kept[0].load(maps, walk.first.channel_map);
  }
  template <class At>
  __device__ __forceinline__ Vector<A, V> of_vector(const At& walk, const Places& here, int r) const {
    Vector<A, V> sums{};
    if constexpr (kContext == kChannel) {
      kept[0].add_mean(sums, walk.v.per_c);
      kept[0].add_maximum(sums, walk.channel(r));
    } else if constexpr (kContext == kSpacetime) {
      MapGradient<A, Index, V, false> of_h;
      MapGradient<A, Index, V, !kInner> of_w;
      of_h.load(maps, here.h_map);
      of_w.load(maps, here.w_map);
#pragma unroll
      for (int j = 0; j < V; ++j) sums.at[j] = kept[r].mean.at[j];
      of_h.add_mean(sums, walk.v.per_h);
      of_w.add_mean(sums, walk.v.per_w);
      kept[r].add_maximum(sums, walk.p.t);
      of_h.add_maximum(sums, walk.p.h);
      of_w.add_maximum(sums, walk.p.w);
    }
    return sums;
  }
};

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

// Frames of grad_y that a thread has asked for, 128 bytes or eight frames, in its own places of shared memory:
// registers are for maps. A copy has 4 bytes at least: of single elements of 16 bits, the word in which one lies. So
// clips must be whole words, as they are with an even number of channels; else elements are loaded when they are
// needed.
template <class T, int V, int kPlanes>
struct Ahead {
  static constexpr bool kInWord = V * sizeof(T) == 2, kCopied = !kInWord || kPlanes % 2 == 0;
  static constexpr int kCopy = kInWord ? 2 : V;  // elements
  static constexpr int kBytes = kCopy * sizeof(T), kFrames = std::min(8, 128 / (kBytes * kPlanes));
  using Place = Vector<T, kCopy>;

  const T* x;
  Place* mine;

  __device__ __forceinline__ explicit Ahead(const T* x) : x(x) {
    AIA_SHARED(Place, places, kCopied ? kFrames * kPlanes * kElementThreads : 1);
    mine = places + threadIdx.x;
  }
  template <class At>
  __device__ __forceinline__ void begin(const At& walk) const {
#pragma unroll
    for (int k = 0; k < kFrames; ++k) ask(walk, k);
  }
  // The frame where the walk stands; asks for the one that takes its places.
  template <class At>
  __device__ __forceinline__ void take(const At& walk, Vector<T, V> (&grads)[kPlanes]) const {
    if constexpr (kCopied) wait_for_copies<kFrames - 1>();
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) {
      const int k = walk.of_vector(r).x;
      if constexpr (!kCopied)
        grads[r] = load_vector<V>(x + k);
      else if constexpr (kInWord)
        grads[r].at[0] = reinterpret_cast<const T*>(place(walk.p.t, r))[k % 2u];
      else
        grads[r] = *place(walk.p.t, r);
    }
    ask(walk, kFrames);
  }

 private:
  // For the frame that lies so far ahead.
  template <class At>
  __device__ __forceinline__ void ask(const At& walk, int frames) const {
    if constexpr (kCopied) {
      if (walk.p.t + frames < walk.v.T) {
#pragma unroll
        for (int r = 0; r < kPlanes; ++r) {
          const int k = walk.of_vector(r).x + frames * walk.frame.x;
          copy_async<kBytes>(place(walk.p.t + frames, r), x + (kInWord ? k & ~1 : k));
        }
      }
      end_of_copies();
    }
  }
  __device__ __forceinline__ Place* place(int t, int r) const {
    return mine + (static_cast<unsigned>(t) % kFrames * kPlanes + r) * kElementThreads;
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
  Walk<A, kPlanes, kInner> walk(call.v, call.template position<V, kPlanes, kInner>(unit));
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

  const Ahead<T, V, kPlanes> ahead(from);
  ahead.begin(walk);
#pragma unroll 1
  for (; walk.p.t < call.v.T; walk.move()) {
    Vector<T, V> grads[kPlanes];
    ahead.take(walk, grads);
    gate.next(walk);
    inner_gate.next(walk);
    outer.next(walk);
    inner.next(walk);
#pragma unroll
    for (int r = 0; r < kPlanes; ++r) {
      const Places here = walk.of_vector(r);
      const auto unpooled = outer.of_vector(walk, here, r), result = inner.of_vector(walk, here, r);
      const auto g = gate.of_vector(here, r), inside = inner_gate.of_vector(here, r);
      Vector<T, V> stored;
#pragma unroll
      for (int j = 0; j < V; ++j)
        stored.at[j] = narrow<T>(widen(grads[r].at[j]) * g.at[j] + (inside.at[j] * unpooled.at[j] + result.at[j]));
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
      if (maps && v.I == 1 && !bytes && length % 2 == 0 && packed % 2 == 0 && v.O % 4 == 0)
        return run<T, 2, 4, false, Of, int16_t, uint8_t>();
      const bool words = sizeof(T) == 4 || are_aligned({grad_y});
      if (narrow && words && v.I == 1 && !bytes && v.O % 4 == 0) return run<T, 1, 4, false, Of, int16_t, uint8_t>();
    }
    return v.I > 1 ? run<T, 1, 1, true, Of, int, int>() : run<T, 1, 1, false, Of, int, int>();
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

int unpool(const Shape& shape, const void* grad_y, Gate gate, Unpooled outer, Gate inner_gate, Unpooled inner,
           void* grad_x, void* stream) {
  const Unpooling call{shape, grad_y, gate, outer, inner_gate, inner, grad_x, stream};
  return with_scalar(shape.scalar, [&](auto type) { return call.any<decltype(type)>(); });
}

}  // namespace aia::cuda
