// A walk over T: a thread owns V neighbours in memory in each of kVectors places, and meets them frame by frame. What
// it needs of the maps over [H, W, C], which meet every frame, stays in registers, and frames of x are always on their
// way. V neighbours never leave a row; with channels innermost, they are channels.
#pragma once

#include <algorithm>
#include <type_traits>

#include "volume.cuh"

namespace aia::cuda {

// An index of one byte or of two.
struct ByteOrShort {
  int index;
};

// Indices of V neighbours, compared as they are stored: a pattern holds the index that is asked for at every place of a
// word. Of an Index int or ByteOrShort, they are stored in any width, or in either of two.
template <class Index, int V>
struct StoredIndices {
  static constexpr bool kAny = sizeof(Index) == 4;
  static constexpr int kBits = 8 * sizeof(Index), kBytes = V * static_cast<int>(sizeof(Index));
  using Word = std::conditional_t<kBytes == 1, uint8_t, std::conditional_t<kBytes == 2, uint16_t, uint32_t>>;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word)), kInWord = V / kWords;

  uint32_t words[kWords];

  __device__ __forceinline__ void load(const Indices& from, uint32_t k) {
    if constexpr (kAny) {
      const bool either = std::is_same_v<Index, ByteOrShort> && from.bytes != 1;
      const auto loaded = Indices{from.data, either ? 2 : from.bytes}.template load<V>(k);
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
template <int kVectors>
constexpr int kApart = kVectors == 1 ? 0 : 256 / kVectors;

// How the vectors of a thread lie: in channels that follow one another, whose planes or whose numbers lie side by side,
// or in rows below each other.
enum class Across { kPlanes, kChannels, kRows };

// Where a thread stands: its first vector, in frame t, and how far the next frame and the next of its vectors are.
template <class A, int kVectors, Across kAcross>
struct Walk {
  static constexpr bool kInner = kAcross == Across::kChannels;

  const Volume<A>& v;
  Position p;
  Places first, frame, next;

  __device__ __forceinline__ Walk(const Volume<A>& v, const Position& p)
      : v(v), p(p), first{v.offset(p), v.t_map(p), v.h_map(p), v.w_map(p), v.channel_map(p)} {
    const int frames = v.time_inside ? 1 : v.O, planes = v.time_inside ? v.T : 1;
    frame = {v.stride_t(), 0, frames * v.W * v.I, frames * v.H * v.I, v.H * v.W};
    constexpr int kFar = kApart<kVectors>;
    if constexpr (kAcross == Across::kChannels) next = {kFar, kFar, kFar, kFar, 0};
    if constexpr (kAcross == Across::kPlanes) next = {planes * v.H * v.W, v.H * v.W, planes * v.W, planes * v.H, 0};
    if constexpr (kAcross == Across::kRows) next = {v.W, v.W, 0, 1, v.W};
    if (kAcross == Across::kPlanes && kVectors > 1) opaque(next.x), opaque(next.h_map), opaque(next.w_map);
    opaque(frame.x), opaque(frame.h_map), opaque(frame.w_map);
  }
  __device__ __forceinline__ int channel(int r) const { return p.channel() + (kInner ? r * kApart<kVectors> : r); }
  // A thread that stands below the last row has no vectors.
  __device__ __forceinline__ bool has_vectors() const { return kAcross != Across::kRows || p.h < v.H; }
  // Opaque numbers are added to in 32 bits; else the compiler keeps a pointer for each array, and adds in 64.
  __device__ __forceinline__ Places of_vector(int r) const {
    Places here{first.x + r * next.x, first.t_map + r * next.t_map, first.h_map + r * next.h_map,
                first.w_map + r * next.w_map, first.channel_map + r * next.channel_map};
    if (!kInner && r > 0) opaque(here.x), opaque(here.h_map), opaque(here.w_map);
    if (kAcross == Across::kRows && r > 0) opaque(here.channel_map);
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

// Frames of x that a thread, of so many in a block, has asked for, 128 bytes or eight frames, in its own places of
// shared memory: registers are for maps. A copy has 4 bytes at least: of single elements of 16 bits, the word in which
// one lies. So clips must be whole words, where a thread has several such vectors; alone, they are loaded when they
// are needed.
template <class T, int V, int kVectors, int kThreads>
struct Ahead {
  static constexpr bool kInWord = V * sizeof(T) == 2, kCopied = !kInWord || kVectors > 1;
  static constexpr int kCopy = kInWord ? 2 : V;  // elements
  static constexpr int kBytes = kCopy * sizeof(T), kFrames = std::min(8, 128 / (kBytes * kVectors));
  using Place = Vector<T, kCopy>;
  static constexpr int kPlaces = kCopied ? kFrames * kVectors * kThreads : 1;

  const T* x;
  Place* mine;

  // Places in shared memory, kPlaces of them, are its own where none are given.
  __device__ __forceinline__ Ahead(const T* x, Place* places) : x(x), mine(places + threadIdx.x) {}
  __device__ __forceinline__ explicit Ahead(const T* x) : x(x) {
    AIA_SHARED(Place, places, kPlaces);
    mine = places + threadIdx.x;
  }
  template <class At>
  __device__ __forceinline__ void begin(const At& walk) const {
#pragma unroll
    for (int k = 0; k < kFrames; ++k) ask(walk, k);
  }
  // The frame where the walk stands. What follows may take its places. kTensors: those that are asked for in turns,
  // each frame of all of them before the next.
  template <int kTensors = 1, class At>
  __device__ __forceinline__ void take(const At& walk, Vector<T, V> (&grads)[kVectors]) const {
    wait<kTensors>();
#pragma unroll
    for (int r = 0; r < kVectors; ++r) grads[r] = of_vector(walk, r);
  }
  // The same, vector by vector.
  template <int kTensors = 1>
  __device__ __forceinline__ void wait() const {
    if constexpr (kCopied) wait_for_copies<kTensors*(kFrames - 1)>();
  }
  template <class At>
  __device__ __forceinline__ Vector<T, V> of_vector(const At& walk, int r) const {
    if constexpr (kCopied && !kInWord) return *place(walk.p.t, r);
    const int k = walk.of_vector(r).x;
    if constexpr (kCopied)
      return {reinterpret_cast<const T*>(place(walk.p.t, r))[k % 2u]};
    else
      return load_vector<V>(x + k);
  }
  // Asks for the frame that lies so far ahead of the walk: the one that takes its places, if nothing is said.
  template <class At>
  __device__ __forceinline__ void ask(const At& walk, int frames = kFrames) const {
    if constexpr (kCopied) {
      if (walk.has_vectors() && walk.p.t + frames < walk.v.T) {
#pragma unroll
        for (int r = 0; r < kVectors; ++r) {
          const int k = walk.of_vector(r).x + frames * walk.frame.x;
          copy_async<kBytes>(place(walk.p.t + frames, r), x + (kInWord ? k & ~1 : k));
        }
      }
      end_of_copies();
    }
  }

 private:
  __device__ __forceinline__ Place* place(int t, int r) const {
    return mine + (static_cast<unsigned>(t) % kFrames * kVectors + r) * kThreads;
  }
};

}  // namespace aia::cuda
