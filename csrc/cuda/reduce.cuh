// Reductions of a field over an activation x [B, T, C, H, W] to the packed maps of a context. x is read once, in
// vectors of V elements; partial results meet in a fixed order, so equal inputs give equal bits.
//
// The operation Op says what is reduced and where it goes:
//   Op::Partial             what is known of a run of elements: starting_at(first index), add(value, index), merge
//   op.field                the field that multiplies x
//   op.load(v, b, k)        the partial result stored for element k of the maps, and
//   op.store(v, b, k, partial, done, per_length)   its inverse; done: the axis, of that reciprocal length, is complete
#pragma once

#include <algorithm>

#include "volume.cuh"

namespace aia::cuda {

constexpr int kThreads = 256;

template <int V, class T>
__device__ __forceinline__ Vector<T, V> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, V>*>(from);
}

// The product of x and a field at neighbours in memory, the first of which is at p.
template <class T, int V, class Field, class A = Accumulate<T>>
__device__ __forceinline__ Vector<A, V> multiply(const Vector<T, V>& x, const Field& field, const Volume<A>& v,
                                                 int64_t clip, const Position& p) {
  Vector<A, V> values = spread<V>(field, v, clip, p);
#pragma unroll
  for (int k = 0; k < V; ++k) values.at[k] *= widen(x.at[k]);
  return values;
}

// Over C. The threads of a block form `slices` of the channels times columns of neighbouring positions of one frame.
// Vectors lie along the channels when those are innermost, otherwise along the positions.
template <class T, int V, bool kInner, class Op>
__global__ void __launch_bounds__(kThreads, 1)
    reduce_over_channels(Volume<Accumulate<T>> v, const T* __restrict__ x, Op op, int slices) {
  using Partial = typename Op::Partial;
  constexpr int kWide = kInner ? 1 : V;
  AIA_SHARED(Partial, partials, kThreads * kWide);

  const int columns = kThreads / slices, positions = v.H * v.W;
  const int slice = kInner ? threadIdx.x % slices : threadIdx.x / columns;
  const int column = kInner ? threadIdx.x / slices : threadIdx.x % columns;
  const int blocks = (positions + columns * kWide - 1) / (columns * kWide);
  const int frame = blockIdx.x / blocks, t = frame % v.T, start = blockIdx.x % blocks * columns * kWide;
  const int64_t clip = frame / v.T;
  const int mine = start + column * kWide;

  x += clip * v.size();
  Partial partial[kWide];
#pragma unroll
  for (int k = 0; k < kWide; ++k) partial[k] = Partial::starting_at(kInner ? slice * V : slice);
  if (mine < positions) {
    constexpr int kStep = kInner ? V : 1;
#pragma unroll 4
    for (int c = slice * kStep; c < v.channels(); c += slices * kStep) {
      const Position p{t, kInner ? 0 : c, mine / v.W, mine % v.W, kInner ? c : 0};
      const auto values = multiply(load_vector<V>(x + v.offset(p)), op.field, v, clip, p);
#pragma unroll
      for (int k = 0; k < V; ++k) partial[kInner ? 0 : k].add(values.at[k], kInner ? c + k : c);
    }
  }
#pragma unroll
  for (int k = 0; k < kWide; ++k) partials[(slice * columns + column) * kWide + k] = partial[k];
  __syncthreads();

  for (int j = threadIdx.x; j < columns * kWide && start + j < positions; j += kThreads) {
    Partial total = partials[j];
    for (int s = 1; s < slices; ++s) total.merge(partials[s * columns * kWide + j]);
    op.store(v, clip, t * positions + start + j, total, true, v.per_c);
  }
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

// Over T, H and W at once. A block owns a group of channels of one clip. It takes them tile by tile, and a tile frame
// by frame: each thread keeps the partial results over T of its own elements in registers, and leaves the elements in
// shared memory, where other threads reduce them over H and over W. Where a tile is only a part of a plane, the
// results over H and W wait in their maps for the next tile.
template <class T, int V, class Op>
__global__ void __launch_bounds__(kTileThreads, 1)
    reduce_over_spacetime(Volume<Accumulate<T>> v, const T* __restrict__ x, Op op, Tile tile) {
  using A = Accumulate<T>;
  using Partial = typename Op::Partial;
  constexpr int kVectors = kElements<T> / V;
  AIA_SHARED(A, staged, 2 * kTileSize<T>);

  const int groups = (v.O + tile.o - 1) / tile.o * ((v.I + tile.i - 1) / tile.i);
  const int64_t clip = blockIdx.x / groups;
  const int group = blockIdx.x % groups;
  const Position origin{0, v.I == 1 ? group * tile.o : 0, 0, 0, v.I == 1 ? 0 : group * tile.i};
  const int no = min(tile.o, v.O - origin.o), ni = min(tile.i, v.I - origin.i);
  x += clip * v.size();

  A* stage = staged;
  for (int h0 = 0; h0 < v.H; h0 += tile.h) {
    for (int w0 = 0; w0 < v.W; w0 += tile.w) {
      const int nh = min(tile.h, v.H - h0), nw = min(tile.w, v.W - w0);
      const int size = no * nh * nw * ni;

      int offset[kVectors];  // in the first frame
      Partial over_t[kElements<T>];
      Vector<T, V> next[kVectors];
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        int e = (k * kTileThreads + threadIdx.x) * V;
        if (e >= size) continue;
        Position p = origin;
        p.i += e % ni, e /= ni;
        p.w = w0 + e % nw, e /= nw;
        p.h = h0 + e % nh;
        p.o += e / nh;
        offset[k] = v.offset(p);
        next[k] = load_vector<V>(x + offset[k]);
      }
#pragma unroll
      for (int k = 0; k < kElements<T>; ++k) over_t[k] = Partial::starting_at(0);

      for (int t = 0; t < v.T; ++t) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
          const int e = (k * kTileThreads + threadIdx.x) * V;
          if (e >= size) continue;
          const int here = offset[k] + t * v.stride_t();
          const auto values = multiply(next[k], op.field, v, clip, v.position(here));
          if (t + 1 < v.T) next[k] = load_vector<V>(x + here + v.stride_t());
#pragma unroll
          for (int j = 0; j < V; ++j) over_t[k * V + j].add(values.at[j], t);
          *reinterpret_cast<Vector<A, V>*>(stage + e) = values;
        }
        __syncthreads();

        const int columns = no * nw * ni, rows = no * nh * ni;
        for (int j = threadIdx.x; j < columns + rows; j += kTileThreads) {
          Position p = origin;
          p.t = t;
          const bool over_h = j < columns;
          const int line = over_h ? j : j - columns, across = (over_h ? nw : nh) * ni;
          const int o = line / across, rest = line % across;
          p.o += o, p.i += rest % ni;
          p.h = over_h ? h0 : h0 + rest / ni;
          p.w = over_h ? w0 + rest / ni : w0;
          const A* start = stage + (over_h ? o * nh * nw * ni + rest : line / ni * nw * ni + rest % ni);
          const int seen = over_h ? h0 : w0, count = over_h ? nh : nw;
          const int k = over_h ? v.h_map(p) : v.w_map(p);
          Partial partial = reduce_line<Partial>(start, count, over_h ? nw * ni : ni, seen);
          if (seen > 0) {
            Partial before = op.load(v, clip, k);
            before.merge(partial);
            partial = before;
          }
          op.store(v, clip, k, partial, seen + count == (over_h ? v.H : v.W), over_h ? v.per_h : v.per_w);
        }
        // The other half next: one barrier a frame keeps writers and readers of a half apart.
        stage = stage == staged ? staged + kTileSize<T> : staged;
      }

#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        if ((k * kTileThreads + threadIdx.x) * V >= size) continue;
        Position p = v.position(offset[k]);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          op.store(v, clip, v.t_map(p), over_t[k * V + j], true, v.per_t);
          v.advance(p);
        }
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

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

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

// Queues the reduction that the context asks for.
template <class T, class Op>
int reduce(const Shape& shape, const void* x, int context, const Op& op, void* stream) {
  constexpr int kWide = 16 / sizeof(T);
  const Volume<Accumulate<T>> v(shape);
  const T* from = static_cast<const T*>(x);
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  if (context == kSpacetime) {
    const auto run = [&](auto kernel, const Tile& tile) {
      const int groups = ceil_div(v.O, tile.o) * ceil_div(v.I, tile.i);
      return launch(kernel, shape.B * groups, kTileThreads, stream, v, from, op, tile);
    };
    const Tiling wide = spacetime_tiling<T>(v, shape.B, kWide);
    return aligned && wide.vectors ? run(reduce_over_spacetime<T, kWide, Op>, wide.tile)
                                   : run(reduce_over_spacetime<T, 1, Op>, spacetime_tiling<T>(v, shape.B, 1).tile);
  }
  const auto run = [&](auto kernel, int slices, int positions) {
    const int64_t blocks = shape.B * v.T * ceil_div(v.H * v.W, kThreads / slices * positions);
    return launch(kernel, blocks, kThreads, stream, v, from, op, slices);
  };
  if (v.I > 1) {
    const bool vectors = aligned && v.I % kWide == 0;
    int slices = 4;
    while (slices < 32 && slices * 4 * (vectors ? kWide : 1) < v.I) slices *= 2;
    return vectors ? run(reduce_over_channels<T, kWide, true, Op>, slices, 1)
                   : run(reduce_over_channels<T, 1, true, Op>, slices, 1);
  }
  constexpr int kSlices = 8;
  return aligned && v.H * v.W % kWide == 0 ? run(reduce_over_channels<T, kWide, false, Op>, kSlices, kWide)
                                           : run(reduce_over_channels<T, 1, false, Op>, kSlices, 1);
}

}  // namespace aia::cuda
