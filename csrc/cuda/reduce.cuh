// Reductions of a field over an activation x [B, T, C, H, W] to the packed maps of a context. x is read once, in
// vectors of V elements; partial results meet in a fixed order, so equal inputs give equal bits.
//
// A Source says what is read: load<V>(offset) from memory, and widen(loaded), the V values that it stands for.
// The operation Op says what is reduced and where it goes:
//   Op::Partial             what is known of a run of elements: starting_at(first index), add(value, index), merge
//   op.field                the field that multiplies the values, or One
//   op.load(v, b, k)        the partial result stored for element k of the maps, and
//   op.store<V>(v, b, k, partials, done, per_length)   its inverse for V elements from k on; done: the axis, of that
//                           reciprocal length, is complete
//   op.aligned()            whether all maps begin at aligned addresses
#pragma once

#include "volume.cuh"

namespace aia::cuda {

constexpr int kThreads = 256;
constexpr int kBatch = 4;  // vectors that a thread asks for before it uses the first: fields have branches between them

// x itself.
template <class T>
struct Plain {
  using Scalar = T;
  const T* x;  // [B, T, C, H, W] in its order of storage

  template <int V>
  __device__ __forceinline__ Vector<T, V> load(int64_t offset) const {
    return load_vector<V>(x + offset);
  }
  template <int V>
  static __device__ __forceinline__ Vector<Accumulate<T>, V> widen(const Vector<T, V>& loaded) {
    return widened(loaded);
  }
  bool aligned() const { return are_aligned({x}); }
};

// The product of two activations.
template <class T>
struct Product {
  using Scalar = T;
  const T *a, *b;  // [B, T, C, H, W] in one order of storage

  template <int V>
  struct Pair {
    Vector<T, V> a, b;
  };
  template <int V>
  __device__ __forceinline__ Pair<V> load(int64_t offset) const {
    return {load_vector<V>(a + offset), load_vector<V>(b + offset)};
  }
  template <int V>
  static __device__ __forceinline__ Vector<Accumulate<T>, V> widen(const Pair<V>& loaded) {
    Vector<Accumulate<T>, V> values = widened(loaded.a);
    const auto others = widened(loaded.b);
#pragma unroll
    for (int k = 0; k < V; ++k) values.at[k] *= others.at[k];
    return values;
  }
  bool aligned() const { return are_aligned({a, b}); }
};

// The field that is 1 everywhere.
template <class A>
struct One {
  bool aligned() const { return true; }
};

template <class Source, int V>
using Loaded = decltype(std::declval<Source>().template load<V>(0));

// The field that meets a vector of x while its thread steps through the channels.
// multiply(values, c): V neighbours in memory, c channels behind those at p.
template <int V, class A, class Field>
struct ChannelSteps {
  const Volume<A>& v;
  const Field& field;
  int64_t clip;
  Position p;

  __device__ __forceinline__ ChannelSteps(const Volume<A>& v, const Field& field, int64_t clip, const Position& p)
      : v(v), field(field), clip(clip), p(p) {}
  __device__ __forceinline__ void multiply(Vector<A, V>& values, int c) const {
    if (Field::kAbsent == 1 && field.context == kNone) return;  // a factor of 1
    Position here = p;
    if (v.I > 1)
      here.i += c;
    else
      here.o += c;
    for_groups<V>(v, here, [&](int first) {
      const auto factors = spread<kGroupOf<V, A>>(field, v, clip, here);
#pragma unroll
      for (int k = 0; k < kGroupOf<V, A>; ++k) values.at[first + k] *= factors.at[k];
    });
  }
};

template <int V, class A>
struct ChannelSteps<V, A, One<A>> {
  __device__ __forceinline__ ChannelSteps(const Volume<A>&, const One<A>&, int64_t, const Position&) {}
  __device__ __forceinline__ void multiply(Vector<A, V>&, int) const {}
};

// Multiplies neighbours in memory, the first of which is at p, by a field.
template <int V, class A, class Field>
__device__ __forceinline__ void multiply(Vector<A, V>& values, const Field& field, const Volume<A>& v, int64_t clip,
                                         const Position& p) {
  ChannelSteps<V, A, Field>(v, field, clip, p).multiply(values, 0);
}

// The sum over the axes of a context, divided by the number of its maps: the gradient of a gate.
template <class A>
struct Sum {
  A sum;

  static __device__ __forceinline__ Sum starting_at(int) { return {0}; }
  __device__ __forceinline__ void add(A value, int) { sum += value; }
  __device__ __forceinline__ void merge(const Sum& other) { sum += other.sum; }
};

template <class A, class Field>
struct SumOp {
  using Partial = Sum<A>;

  Field field;
  int context;
  A* grad_gate;  // [B, M]
  A share;

  SumOp(const Field& field, int context, void* grad_gate)
      : field(field), context(context), grad_gate(static_cast<A*>(grad_gate)), share(A(1) / context) {}
  bool aligned() const { return field.aligned() && are_aligned({grad_gate}); }

  __device__ __forceinline__ Partial load(const Volume<A>& v, int64_t clip, int k) const {
    return {grad_gate[clip * v.packed(context) + k]};
  }
  template <int V>
  __device__ __forceinline__ void store(const Volume<A>& v, int64_t clip, int k, const Partial* partials, bool done,
                                        A) const {
    Vector<A, V> sums;
#pragma unroll
    for (int j = 0; j < V; ++j) sums.at[j] = done ? partials[j].sum * share : partials[j].sum;
    store_vector(grad_gate + clip * v.packed(context) + k, sums);
  }
};

// Leaves the partial results of `slices` runs of channels, for each of `count` neighbouring positions from `start` on,
// to the maps: partials[slice][position].
template <class Op, class A>
__device__ __forceinline__ void join_slices(const Volume<A>& v, const Op& op, const typename Op::Partial* partials,
                                            int slices, int count, int64_t clip, int start, int end) {
  __syncthreads();
  for (int j = threadIdx.x; j < count && start + j < end; j += kThreads) {
    typename Op::Partial total = partials[j];
    for (int s = 1; s < slices; ++s) total.merge(partials[s * count + j]);
    op.template store<1>(v, clip, start + j, &total, true, v.per_c);
  }
}

// Over C. The threads of a block form `slices` of the channels times columns of neighbouring positions of one frame.
// Vectors lie along the channels when those are innermost, otherwise along the positions.
template <class Source, int V, bool kInner, class Op, class A = Accumulate<typename Source::Scalar>>
__global__ void __launch_bounds__(kThreads, 1) reduce_over_channels(Volume<A> v, Source source, Op op, int slices) {
  using Partial = typename Op::Partial;
  constexpr int kWide = kInner ? 1 : V;
  AIA_SHARED(Partial, partials, kThreads * kWide);

  const int columns = kThreads / slices, positions = v.H * v.W;
  const int slice = kInner ? threadIdx.x % slices : threadIdx.x / columns;
  const int column = kInner ? threadIdx.x / slices : threadIdx.x % columns;
  const int blocks = (positions + columns * kWide - 1) / (columns * kWide);
  const int frame = blockIdx.x / blocks, t = frame % v.T, start = blockIdx.x % blocks * columns * kWide;
  const int64_t clip = frame / v.T, base = clip * v.size();
  const int mine = start + column * kWide;

  Partial partial[kWide];
#pragma unroll
  for (int k = 0; k < kWide; ++k) partial[k] = Partial::starting_at(kInner ? slice * V : slice);
  if (mine < positions) {
    const int step = slices * (kInner ? V : 1), channels = v.channels();
    const Position first{t, 0, mine / v.W, mine % v.W, 0};
    const ChannelSteps<V, A, decltype(op.field)> field(v, op.field, clip, first);
    const int64_t at_first = base + v.offset(first);
    const int stride = kInner ? 1 : v.plane_size() * (v.time_inside ? v.T : 1);
    const auto load = [&](int c) { return source.template load<V>(at_first + c * stride); };
    const auto add = [&](int c, const Loaded<Source, V>& loaded) {
      auto values = Source::widen(loaded);
      field.multiply(values, c);
#pragma unroll
      for (int k = 0; k < V; ++k) partial[kInner ? 0 : k].add(values.at[k], kInner ? c + k : c);
    };
    int c = slice * (kInner ? V : 1);
    for (; c + (kBatch - 1) * step < channels; c += kBatch * step) {
      Loaded<Source, V> loaded[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) loaded[i] = load(c + i * step);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) add(c + i * step, loaded[i]);
    }
    for (; c < channels; c += step) add(c, load(c));
  }
#pragma unroll
  for (int k = 0; k < kWide; ++k) partials[(slice * columns + column) * kWide + k] = partial[k];
  const int first = t * positions;
  join_slices(v, op, partials, slices, columns * kWide, clip, first + start, first + positions);
}

// Over C, where planes are small and no multiple of V: a frame [C, H, W] is then one run of vectors. As many threads as
// whole planes have elements step through it together, so each element of a thread's vector keeps its position.
template <class Source, int V, class Op, class A = Accumulate<typename Source::Scalar>>
__global__ void __launch_bounds__(kThreads, 1) reduce_over_channels_of_run(Volume<A> v, Source source, Op op) {
  using Partial = typename Op::Partial;
  AIA_SHARED(Partial, partials, kThreads * V);

  const int positions = v.H * v.W, planes = kThreads / positions, threads = planes * positions;
  const int64_t clip = blockIdx.x / v.T, first = clip * v.size();
  const int t = blockIdx.x % v.T, frame = v.O * positions, thread = threadIdx.x;
  if (thread < threads) {
    const Position p = v.position(t * frame + thread * V);
    const ChannelSteps<V, A, decltype(op.field)> field(v, op.field, clip, p);
    Partial partial[V];
    int ahead[V];  // channels between the first element of a vector and this one
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const int c = (thread * V + k) / positions;
      partial[k] = Partial::starting_at(c);
      ahead[k] = c - p.o;
    }
    const int step = threads * V;
    const auto load = [&](int e) { return source.template load<V>(first + t * frame + e); };
    int c = 0;  // channels from the first vector to the next
    const auto add = [&](const Loaded<Source, V>& loaded) {
      auto values = Source::widen(loaded);
      field.multiply(values, c);
#pragma unroll
      for (int k = 0; k < V; ++k) partial[k].add(values.at[k], p.o + c + ahead[k]);
      c += planes * V;
    };
    int e = thread * V;
    for (; e + (kBatch - 1) * step < frame; e += kBatch * step) {
      Loaded<Source, V> loaded[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) loaded[i] = load(e + i * step);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) add(loaded[i]);
    }
    for (; e < frame; e += step) add(load(e));
#pragma unroll
    for (int k = 0; k < V; ++k) partials[thread * V + k] = partial[k];
  }
  join_slices(v, op, partials, planes * V, positions, clip, t * positions, (t + 1) * positions);
}

// The part of a clip that a block stages at a time: all of these lengths, of one frame after the other.
struct Tile {
  int o, h, w, i;
};

constexpr int kTileThreads = 512;
// Elements of x per thread and frame, and per tile.
template <class T>
constexpr int kElements = sizeof(T) == 2 ? 8 : 4;
template <class T>
constexpr int kTileSize = kTileThreads * kElements<T>;

// A run of `count` elements of a staged tile, `stride` apart, the first of which has this index along its axis.
template <class Partial, class A>
__device__ Partial reduce_line(const A* line, int count, int stride, int first) {
  constexpr int kWide = 16 / sizeof(A);
  Partial partial = Partial::starting_at(first);
  if (stride == 1 && count % kWide == 0) {  // a row of a tile of whole rows: aligned, and wide reads spread the banks
    for (int c = 0; c < count; c += kWide) {
      const auto vector = load_vector<kWide>(line + c);
#pragma unroll
      for (int k = 0; k < kWide; ++k) partial.add(vector.at[k], first + c + k);
    }
  } else {
#pragma unroll 4
    for (int c = 0; c < count; ++c) partial.add(line[c * stride], first + c);
  }
  return partial;
}

// Reduces one staged frame of a tile over H and over W. `n` has the lengths of the tile, `origin` its first element in
// x. Where tiles before it have a part of the same lines, their results are merged with its own.
template <class Op, class A>
__device__ __forceinline__ void reduce_lines(const Volume<A>& v, const Op& op, const A* stage, int64_t clip,
                                             const Position& origin, const Tile& n) {
  using Partial = typename Op::Partial;
  const int columns = n.o * n.w * n.i, rows = n.o * n.h * n.i;
  for (int j = threadIdx.x; j < columns + rows; j += kTileThreads) {
    Position p = origin;
    const bool over_h = j < columns;
    const int line = over_h ? j : j - columns, across = (over_h ? n.w : n.h) * n.i;
    const int o = line / across, rest = line % across;
    p.o += o, p.i += rest % n.i;
    p.h = over_h ? origin.h : origin.h + rest / n.i;
    p.w = over_h ? origin.w + rest / n.i : origin.w;
    const A* start = stage + (over_h ? o * n.h * n.w * n.i + rest : line / n.i * n.w * n.i + rest % n.i);
    const int seen = over_h ? origin.h : origin.w, count = over_h ? n.h : n.w;
    const int k = over_h ? v.h_map(p) : v.w_map(p);
    Partial partial = reduce_line<Partial>(start, count, over_h ? n.w * n.i : n.i, seen);
    if (seen > 0) {
      Partial before = op.load(v, clip, k);
      before.merge(partial);
      partial = before;
    }
    op.template store<1>(v, clip, k, &partial, seen + count == (over_h ? v.H : v.W), over_h ? v.per_h : v.per_w);
  }
}

// Stores the results over T of V neighbours in memory, the first of which is at p.
template <int V, class Op, class A>
__device__ __forceinline__ void store_over_t(const Volume<A>& v, const Op& op, const typename Op::Partial* over_t,
                                             int64_t clip, Position p) {
  for_groups<V>(v, p, [&](int first) {
    if constexpr (V > 1) {
      if (!v.runs_t) {
        Position q = p;
#pragma unroll
        for (int j = 0; j < kGroupOf<V, A>; ++j, v.template advance<1>(q))
          op.template store<1>(v, clip, v.t_map(q), over_t + first + j, true, v.per_t);
        return;
      }
    }
    op.template store<kGroupOf<V, A>>(v, clip, v.t_map(p), over_t + first, true, v.per_t);
  });
}

// Over T, H and W at once. A block owns a group of channels of one clip. It takes them tile by tile, and a tile frame
// by frame: each thread keeps the partial results over T of its own elements in registers, and leaves the elements in
// shared memory, where other threads reduce them over H and over W. Where a tile is only a part of a plane, the
// results over H and W wait in their maps for the next tile.
template <class Source, int V, class Op, class A = Accumulate<typename Source::Scalar>>
__global__ void __launch_bounds__(kTileThreads, 1) reduce_over_spacetime(Volume<A> v, Source source, Op op, Tile tile) {
  using Partial = typename Op::Partial;
  constexpr int kSize = kTileSize<typename Source::Scalar>, kPerThread = kElements<typename Source::Scalar>;
  constexpr int kVectors = kPerThread / V;
  // Frames asked for ahead: 32 KiB in flight for a block, next to which a multiprocessor has no room for a second.
  constexpr int kBytes = kVectors * static_cast<int>(sizeof(Loaded<Source, V>)), kAhead = V > 1 ? 64 / kBytes : 1;
  AIA_SHARED(A, staged, 2 * kSize);

  const int groups = (v.O + tile.o - 1) / tile.o * ((v.I + tile.i - 1) / tile.i);
  const int64_t clip = blockIdx.x / groups, first = clip * v.size();
  const int group = blockIdx.x % groups;

  A* stage = staged;
  for (int h = 0; h < v.H; h += tile.h) {
    for (int w = 0; w < v.W; w += tile.w) {
      Position origin{0, v.I == 1 ? group * tile.o : 0, h, w, v.I == 1 ? 0 : group * tile.i};
      const Tile n{min(tile.o, v.O - origin.o), min(tile.h, v.H - h), min(tile.w, v.W - w),
                   min(tile.i, v.I - origin.i)};
      const int size = n.o * n.h * n.w * n.i;

      int offset[kVectors];  // in the first frame
      Partial over_t[kPerThread];
      Loaded<Source, V> next[kAhead][kVectors];
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        int e = (k * kTileThreads + threadIdx.x) * V;
        if (e >= size) continue;
        Position p = origin;
        p.i += e % n.i, e /= n.i;
        p.w += e % n.w, e /= n.w;
        p.h += e % n.h;
        p.o += e / n.h;
        offset[k] = v.offset(p);
#pragma unroll
        for (int t = 0; t < kAhead; ++t)
          if (t < v.T) next[t][k] = source.template load<V>(first + offset[k] + t * v.stride_t());
      }
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) over_t[k] = Partial::starting_at(0);

      for (int t = 0; t < v.T; ++t) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
          const int e = (k * kTileThreads + threadIdx.x) * V;
          if (e >= size) continue;
          const int here = offset[k] + t * v.stride_t();
          auto values = Source::widen(next[0][k]);
#pragma unroll
          for (int i = 1; i < kAhead; ++i) next[i - 1][k] = next[i][k];
          if (t + kAhead < v.T) next[kAhead - 1][k] = source.template load<V>(first + here + kAhead * v.stride_t());
          multiply(values, op.field, v, clip, v.position(here));
#pragma unroll
          for (int j = 0; j < V; ++j) over_t[k * V + j].add(values.at[j], t);
          store_vector(stage + e, values);
        }
        __syncthreads();

        origin.t = t;
        reduce_lines(v, op, stage, clip, origin, n);
        // The other half next: one barrier a frame keeps writers and readers of a half apart.
        stage = stage == staged ? staged + kSize : staged;
      }

#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        if ((k * kTileThreads + threadIdx.x) * V >= size) continue;
        store_over_t<V>(v, op, over_t + k * V, clip, v.position(offset[k]));
      }
    }
  }
}

// The tiling of a volume, and whether vectors of V elements never leave a run of memory that is contiguous and aligned
// within it.
struct Tiling {
  Tile tile;
  bool vectors;
};

template <class T>
Tiling spacetime_tiling(const Volume<Accumulate<T>>& v, int64_t clips, int V) {
  constexpr int kSize = kTileSize<T>;
  constexpr int kRun = 16, kRows = 8;   // channels side by side, and rows of them, in a tile that is part of a plane
  constexpr int64_t kBlocks = 2 * 132;  // enough to fill the largest GPUs
  const int plane = v.H * v.W;
  Tile tile{1, v.H, v.W, std::min(v.I, kRun)};
  if (static_cast<int64_t>(plane) * tile.i > kSize) {
    const int positions = kSize / tile.i, rows = v.I > 1 ? kRows : positions / v.W;
    tile.h = std::clamp(v.W % V == 0 ? rows : rows / V * V, 1, v.H);
    tile.w = std::min(v.W, positions / tile.h);
  } else if (v.I == 1) {
    tile.o = std::clamp(std::min(kSize / plane, ceil_div(v.O * clips, kBlocks)), 1, v.O);
    while (tile.o < v.O && tile.o * plane % V != 0 && (tile.o + 1) * plane <= kSize) ++tile.o;
  }
  const bool one_run = v.I == 1 && !v.time_inside && tile.h == v.H && tile.w == v.W;
  const int unit = v.I > 1 ? tile.i : one_run ? tile.o * plane : tile.w < v.W ? tile.w : tile.h * v.W;
  const int whole = v.I > 1 ? v.I : one_run ? v.O * plane : tile.w < v.W ? v.W : plane;
  return {tile, unit % V == 0 && whole % V == 0};
}

// Over C, of planes of neighbouring positions, in vectors of kWide elements at most; -1 where these do not fit. Vectors
// of four may fit where longer ones do not: then a frame has several blocks, where as a run it has one.
constexpr int kSlices = 8;
template <int kWide, class Source, class Op>
int reduce_over_planes(const Shape& shape, const Source& source, const Op& op, void* stream) {
  using T = typename Source::Scalar;
  constexpr int kFew = std::min(kWide, 4);
  const Volume<Accumulate<T>> v = Volume<Accumulate<T>>(shape).with_vectors(op.aligned());
  const int positions = v.H * v.W;
  const auto run = [&](auto kernel, int V) {
    const int64_t blocks = shape.B * v.T * ceil_div(positions, kThreads / kSlices * V);
    return launch(kernel, blocks, kThreads, stream, v, source, op, kSlices);
  };
  if (positions % kWide == 0) return run(reduce_over_channels<Source, kWide, false, Op>, kWide);
  if (positions % kFew == 0) return run(reduce_over_channels<Source, kFew, false, Op>, kFew);
  if (!v.time_inside && positions <= kThreads && v.O * positions % kWide == 0)
    return launch(reduce_over_channels_of_run<Source, kWide, Op>, shape.B * v.T, kThreads, stream, v, source, op);
  return -1;
}

// Queues the reduction that the context asks for.
template <class Source, class Op>
int reduce(const Shape& shape, const Source& source, int context, const Op& op, void* stream) {
  using T = typename Source::Scalar;
  constexpr int kWide = 16 / sizeof(T);
  const Volume<Accumulate<T>> v(shape), wide = v.with_vectors(op.aligned());
  const bool aligned = source.aligned();
  if (context == kSpacetime) {
    const auto run = [&](auto kernel, const auto& volume, const Tile& tile) {
      const int groups = ceil_div(v.O, tile.o) * ceil_div(v.I, tile.i);
      return launch(kernel, shape.B * groups, kTileThreads, stream, volume, source, op, tile);
    };
    const Tiling tiling = spacetime_tiling<T>(v, shape.B, kWide);
    return aligned && tiling.vectors
               ? run(reduce_over_spacetime<Source, kWide, Op>, wide, tiling.tile)
               : run(reduce_over_spacetime<Source, 1, Op>, v, spacetime_tiling<T>(v, shape.B, 1).tile);
  }
  const auto run = [&](auto kernel, const auto& volume, int slices, int positions) {
    const int64_t blocks = shape.B * v.T * ceil_div(v.H * v.W, kThreads / slices * positions);
    return launch(kernel, blocks, kThreads, stream, volume, source, op, slices);
  };
  if (v.I > 1) {
    const bool vectors = aligned && v.I % kWide == 0;
    int slices = 4;
    while (slices < 32 && slices * 4 * (vectors ? kWide : 1) < v.I) slices *= 2;
    return vectors ? run(reduce_over_channels<Source, kWide, true, Op>, wide, slices, 1)
                   : run(reduce_over_channels<Source, 1, true, Op>, v, slices, 1);
  }
  const int error = aligned ? reduce_over_planes<kWide>(shape, source, op, stream) : -1;
  return error >= 0 ? error : run(reduce_over_channels<Source, 1, false, Op>, v, kSlices, 1);
}

}  // namespace aia::cuda
