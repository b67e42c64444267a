// unpool_reduce over C, of what is unpooled over T, H and W: the sum over the channels of x * U, of planes in TCHW and
// CTHW beside float32 maps with indices of a byte. x has 16 or 32 bits.
//
// All three maps depend on the channel, so none stays while a thread goes through the channels. But a number of the map
// over T meets all frames, one over H all rows, and one over W all columns. So a thread owns a brick, kFrames frames of
// kRows rows of V neighbours, and steps with it through the channels: each number that it loads meets all elements of
// the brick that it can. What it has asked for of x lies in shared memory, in places of its own.
//
// The threads of a block are some bricks of the same frames, times `slices` that share out the channels. Where planes
// are small, blocks share out the channels too: these form a cluster, and join their sums by its shared memory.
#include "bricks.h"

#include <algorithm>

#include "walk.cuh"

namespace aia::cuda {
namespace {

constexpr int kBrickThreads = 256, kBrickFrames = 4;
// Blocks that share out the channels, at most: every device with clusters has them of eight. The ways to share out a
// plane that are tried.
constexpr int kBrickChunks = 8, kBrickTiles = 16;

// How the work is shared out.
template <class A>
struct Bricks {
  Volume<A> v;
  int across, in_plane;  // bricks side by side; bricks of a plane
  int columns, slices;   // of a block: bricks, and channels that it meets at a time
  int threads;           // of a block
  int chunks, channels;  // blocks that share out the channels; channels of each
  int tiles, groups;     // blocks that share out a plane; groups of frames
  Divisor by_across, by_columns, by_chunks, by_tiles, by_groups;

  Bricks(const Shape& shape, int V, int rows)
      : v(shape),
        across(v.W / V),
        in_plane(v.H / rows * across),
        groups(ceil_div(v.T, kBrickFrames)),
        by_across(across),
        by_groups(groups) {}
  int blocks() const { return groups * tiles * chunks; }  // of a clip

  // Takes the way that ends first, by a count of instructions: what a thread does once is worth 300, and a step 15 for
  // each element of a brick. A multiprocessor shares its time among its blocks. Lanes that lie in several planes meet
  // as many lines of memory. may_have(chunks): whether the device has such clusters.
  template <class MayHave>
  void choose(int64_t clips, int of_brick, const MayHave& may_have) {
    int best_tiles = 1, best_chunks = 1;
    int64_t least = INT64_MAX;
    for (int of_chunks = 1; of_chunks <= kBrickChunks; of_chunks *= 2) {
      if (of_chunks > 1 && (of_chunks > v.O || !may_have(of_chunks))) break;
      for (int of_tiles = 1; of_tiles <= kBrickTiles; ++of_tiles) {
        share_out(of_tiles, of_chunks);
        if (chunks != of_chunks) continue;
        const int64_t rounds = ceil_div(clips * blocks(), kMultiprocessors), steps = ceil_div(channels, slices);
        const int64_t duration = rounds * threads * (300 + steps * 15 * of_brick) * std::max(1, 32 / columns);
        if (duration < least) least = duration, best_tiles = of_tiles, best_chunks = of_chunks;
      }
    }
    share_out(best_tiles, best_chunks);
    by_columns = Divisor(columns), by_chunks = Divisor(chunks), by_tiles = Divisor(tiles);
  }

 private:
  // With so many blocks at least for a plane, and these for the channels.
  void share_out(int of_tiles, int of_chunks) {
    columns = std::min(ceil_div(in_plane, of_tiles), kBrickThreads);
    tiles = ceil_div(in_plane, columns);
    channels = ceil_div(v.O, of_chunks);
    chunks = ceil_div(v.O, channels);
    slices = std::min(kBrickThreads / columns, channels);
    slices = ceil_div(channels, ceil_div(channels, slices));
    threads = ceil_div(columns * slices, 32) * 32;
  }
};

// What a thread has asked for of x: its bricks of the next channels.
template <class T, int V, int kRows>
struct BrickCopies {
  // A copy has 4 bytes at least: of single elements of 16 bits, the word in which one lies.
  static constexpr bool kInWord = V * sizeof(T) == 2;
  static constexpr int kCopy = kInWord ? 2 : V, kBytes = kCopy * sizeof(T), kOfBrick = kBrickFrames * kRows;
  static constexpr int kBricks = 256 / (kBytes * kOfBrick);
  using Place = Vector<T, kCopy>;
  static constexpr int kSharedBytes = kBricks * kOfBrick * kBrickThreads * static_cast<int>(sizeof(Place));

  // The elements that lie there, the first of them at k of x.
  static __device__ __forceinline__ Vector<T, V> taken(const Place* from, uint32_t k) {
    if constexpr (kInWord)
      return {reinterpret_cast<const T*>(from)[k % 2]};
    else
      return *from;
  }
};

// What a thread has to do: its brick, and the channels that it meets.
template <class A>
struct OfThread {
  int chunk, tile, column, slice;
  int64_t clip;
  Position p;  // of the brick's first element, in the first channel
  int end;     // of the channels; 0 where there is no brick

  __device__ __forceinline__ OfThread(const Bricks<A>& at, int rows, int neighbours) {
    chunk = blockIdx.x;
    tile = at.by_chunks.divide(chunk);
    int group = at.by_tiles.divide(tile);
    clip = at.by_groups.divide(group);
    column = threadIdx.x;
    slice = at.by_columns.divide(column);
    const int brick = tile * at.columns + column;
    int across = brick;
    const int down = at.by_across.divide(across);
    p = {group * kBrickFrames, chunk * at.channels + slice, down * rows, across * neighbours, 0};
    const bool works = slice < at.slices && brick < at.in_plane;
    end = works ? min(at.v.O, (chunk + 1) * at.channels) : 0;
  }
};

// Adds the elements of a frame's rows, times what is unpooled to them from the three maps, to what was found. p: of the
// first element. over_t: the map over T in each row. elements(r): those of a row.
template <int V, int kRows, class A, class Elements>
__device__ __forceinline__ void add_frame(const ClipGradients<A>& maps, const Volume<A>& v, Position p, int at_h,
                                          int at_w, const MapGradient<A, uint8_t, V, false> (&over_t)[kRows],
                                          const Elements& elements, Vector<A, V> (&found)[kRows]) {
  MapGradient<A, uint8_t, V, false> over_h;
  MapGradient<A, uint8_t, kRows, false> over_w;  // of rows that lie below each other
  opaque(at_h), opaque(at_w);
  over_h.load(maps, at_h);
  over_w.load(maps, at_w);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    Vector<A, V> factors = over_t[r].mean;
    const A mean = over_w.mean.at[r] * v.per_w;
    over_h.add_mean(factors, v.per_h);
#pragma unroll
    for (int j = 0; j < V; ++j) factors.at[j] += mean;
    over_t[r].add_maximum(factors, p.t);
    over_h.add_maximum(factors, p.h + r);
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (over_w.argmax.holds(r, over_w.argmax.pattern(p.w + j))) factors.at[j] += over_w.maximum.at[r];
    const Vector<A, V> values = widened(elements(r));
#pragma unroll
    for (int j = 0; j < V; ++j) found[r].at[j] += values.at[j] * factors.at[j];
  }
}

// Adds up what the slices of a block found, which lies side by side, each slice's of all columns as
// [frame][row][column][neighbour], and then what the blocks of a cluster did.
template <int V, int kRows, class A>
__device__ __forceinline__ void add_up(const Bricks<A>& at, const OfThread<A>& own,
                                       const Vector<A, V> (&found)[kBrickFrames][kRows], A* parts,
                                       A* __restrict__ sums) {
  const Volume<A>& v = at.v;
  const int count = kBrickFrames * kRows * V * at.columns;
  __syncthreads();
  if (own.slice < at.slices) {
    A* const mine = parts + own.slice * count + own.column * V;
#pragma unroll
    for (int i = 0; i < kBrickFrames * kRows; ++i) store_vector(mine + i * at.columns * V, found[i / kRows][i % kRows]);
  }
  __syncthreads();
  const auto store = [&](int k, A sum) {
    int of_column = k / V;
    const int row = at.by_columns.divide(of_column), t = own.p.t + row / kRows;
    int w = own.tile * at.columns + of_column;
    if (w >= at.in_plane || t >= v.T) return;
    const int h = at.by_across.divide(w) * kRows + row % kRows;
    sums[own.clip * v.packed(kChannel) + (t * v.H + h) * v.W + w * V + k % V] = sum;
  };
  for (int k = threadIdx.x; k < count; k += at.threads) {
    A sum = parts[k];
#pragma unroll 2
    for (int s = 1; s < at.slices; ++s) sum += parts[s * count + k];
    if (at.chunks == 1)
      store(k, sum);
    else
      parts[k] = sum;  // which no other thread reads before all blocks are here
  }
  if (at.chunks == 1) return;
  cluster_barrier();
  for (int k = own.chunk * at.threads + threadIdx.x; k < count; k += at.chunks * at.threads) {
    A sum = 0;
#pragma unroll 2
    for (int other = 0; other < at.chunks; ++other) sum += cluster_shared(parts, other)[k];
    store(k, sum);
  }
  cluster_barrier();
}

template <class T, int V, int kRows, class A = Accumulate<T>>
__global__ void __launch_bounds__(kBrickThreads, 2)
    unpool_reduce_bricks_kernel(Bricks<A> at,
                                const T* __restrict__ x,  // [B, T, C, H, W] in its order of storage
                                UnpooledField<A> field,
                                A* __restrict__ sums)  // [B, T, H, W]
{
  using Copies = BrickCopies<T, V, kRows>;
  AIA_DYNAMIC_SHARED(typename Copies::Place, copies);
  const Volume<A>& v = at.v;
  const OfThread<A> own(at, kRows, V);
  const Position& p = own.p;
  const T* from = x + own.clip * v.size();
  opaque(from);
  const ClipGradients<A> maps(field, own.clip, v.packed(kSpacetime));
  // The last frame stands in for those behind it, whose sums are not stored.
  const int frames = v.time_inside ? 1 : v.O, planes = v.time_inside ? v.T : 1;
  int of_x[kBrickFrames], of_h[kBrickFrames], of_w[kBrickFrames];
#pragma unroll
  for (int f = 0; f < kBrickFrames; ++f) {
    const int frame = min(f, v.T - 1 - p.t);
    of_x[f] = frame * v.stride_t(), of_h[f] = frame * frames * v.W, of_w[f] = frame * frames * v.H;
    if (f > 0) opaque(of_x[f]), opaque(of_h[f]), opaque(of_w[f]);
  }
  const Places step{planes * v.H * v.W * at.slices, v.H * v.W * at.slices, planes * v.W * at.slices,
                    planes * v.H * at.slices, 0};
  Places here{v.offset(p), v.t_map(p), v.h_map(p), v.w_map(p), 0};

  auto* const mine = copies + threadIdx.x;
  const auto place = [&](int number, int f, int r) {
    return mine + ((number % Copies::kBricks * kBrickFrames + f) * kRows + r) * kBrickThreads;
  };
  int asked = 0;
  const auto ask = [&] {
    if (p.o + asked * at.slices < own.end) {
#pragma unroll
      for (int f = 0; f < kBrickFrames; ++f)
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int k = here.x + of_x[f] + r * v.W;
          copy_async<Copies::kBytes>(place(asked, f, r), from + (Copies::kInWord ? k & ~1 : k));
        }
      here.x += step.x;
      opaque(here.x);
    }
    ++asked;
    end_of_copies();
  };
#pragma unroll 1
  for (int i = 0; i < Copies::kBricks - 1; ++i) ask();

  Vector<A, V> found[kBrickFrames][kRows] = {};
  int first = v.offset(p), number = 0;
#pragma unroll 1
  for (int c = p.o; c < own.end; c += at.slices, ++number) {
    ask();
    wait_for_copies<Copies::kBricks - 1>();
    MapGradient<A, uint8_t, V, false> over_t[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      over_t[r].load(maps, here.t_map + r * v.W);
#pragma unroll
      for (int j = 0; j < V; ++j) over_t[r].mean.at[j] *= v.per_t;
    }
#pragma unroll
    for (int f = 0; f < kBrickFrames; ++f) {
      const auto elements = [&](int r) { return Copies::taken(place(number, f, r), first + of_x[f] + r * v.W); };
      const Position of_frame{p.t + f, p.o, p.h, p.w, 0};
      add_frame(maps, v, of_frame, here.h_map + of_h[f], here.w_map + of_w[f], over_t, elements, found[f]);
    }
    here.t_map += step.t_map, here.h_map += step.h_map, here.w_map += step.w_map, first += step.x;
    opaque(here.t_map), opaque(here.h_map), opaque(here.w_map);
  }

  AIA_DYNAMIC_SHARED(A, parts);
  add_up(at, own, found, parts, sums);
}

template <class T, int V, int kRows>
int run_bricks(const Shape& shape, const void* x, Unpooled unpooled, void* sums, void* stream) {
  using A = Accumulate<T>;
  constexpr int kBytes = std::max(BrickCopies<T, V, kRows>::kSharedBytes,
                                  kBrickThreads * kBrickFrames * kRows * V * static_cast<int>(sizeof(A)));
  const auto kernel = unpool_reduce_bricks_kernel<T, V, kRows>;
  Bricks<A> at(shape, V, kRows);
  int error = 0;
  at.choose(shape.B, kBrickFrames * kRows * V, [&](int chunks) {
    const Answer together = clusters_together(kernel, chunks, kBrickThreads, kBytes);
    if (together.error) error = together.error;
    return together.value > 0;
  });
  if (error) return error;
  const int64_t blocks = shape.B * at.blocks();
  const T* const of_x = static_cast<const T*>(x);
  const UnpooledField<A> field(unpooled);
  A* const to = static_cast<A*>(sums);
  if (at.chunks == 1) return launch(kernel, blocks, BlockSize{at.threads, kBytes}, stream, at, of_x, field, to);
  return launch_clusters(kernel, blocks, at.chunks, at.threads, kBytes, stream, at, of_x, field, to);
}

template <class T>
int by_bricks(const Shape& shape, const void* x, Unpooled unpooled, void* sums, void* stream) {
  const int packed = Volume<Accumulate<T>>(shape).packed(kSpacetime);
  const bool pairs = shape.H % 2 == 0 && are_aligned({x, unpooled.grad, unpooled.argmax, sums});
  if (pairs && shape.W % 4 == 0 && packed % 4 == 0) return run_bricks<T, 4, 2>(shape, x, unpooled, sums, stream);
  if (pairs && shape.W % 2 == 0 && packed % 2 == 0) return run_bricks<T, 2, 2>(shape, x, unpooled, sums, stream);
  const int64_t size = int64_t{shape.T} * shape.C * shape.H * shape.W;
  if (sizeof(T) == 2 && (size % 2 != 0 || !are_aligned({x}))) return -1;
  return run_bricks<T, 1, 1>(shape, x, unpooled, sums, stream);
}

}  // namespace

int unpool_reduce_by_bricks(const Shape& shape, const void* x, Unpooled unpooled, void* sums, void* stream) {
  if (unpooled.context != kSpacetime || unpooled.index_bytes != 1 || shape.order == Order::kTHWC) return -1;
  if (shape.B == 0 || shape.T == 0 || shape.C == 0 || shape.H == 0 || shape.W == 0) return -1;
  switch (shape.scalar) {
    case Scalar::kFloat32: return by_bricks<float>(shape, x, unpooled, sums, stream);
    case Scalar::kBFloat16: return by_bricks<BFloat16>(shape, x, unpooled, sums, stream);
    case Scalar::kFloat16: return by_bricks<Float16>(shape, x, unpooled, sums, stream);
    default: return -1;
  }
}

}  // namespace aia::cuda
