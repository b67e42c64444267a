// A pool of x * G over T, over H and over W at once, of planes that a block holds whole: G is 1 or a gate over C, x in
// planes, of 16 or 32 bits. A thread owns a strip, V neighbours in each of kRows rows below each other, and walks with
// it over T (walk.cuh).
//
// Rows come in whole strips. What it knows over T stays in registers. Of each frame it leaves what it knows of each of
// its rows and of each of its columns in shared memory; these are merged there, by a thread for each row and each
// column of the planes.
#include "strips.h"

#include "max_mean.cuh"
#include "walk.cuh"

namespace aia::cuda {
namespace {

// One plane of 56 x 56 has 196 strips, 32 planes of 7 x 7 have 224. Each thread has two lines at most.
constexpr int kStripThreads = 224, kStripLines = 2;
// Parts of a line that are loaded before the first is used.
constexpr int kStripParts = 7;

// Planes of one clip that a block owns, and how its threads stand in them.
template <class A>
struct StripPlanes {
  Volume<A> v;
  int planes, tiles;  // of a block; blocks of a clip
  int across, down;   // strips side by side in a plane, and below each other
  Divisor by_strips, by_across, by_h, by_w;

  StripPlanes(const Shape& shape, int V, int rows)
      : v(shape), across(v.W / V), down(v.H / rows), by_strips(across * down), by_across(across), by_h(v.H), by_w(v.W) {
    const int most = std::min(kStripThreads / (across * down), kStripLines * kStripThreads / (v.H + v.W));
    planes = std::min(most, v.O);
    tiles = planes > 0 ? ceil_div(v.O, planes) : 0;
  }
};

// Where the results of a clip go.
template <class A>
struct PooledMaps {
  A *maximum, *mean;
  uint8_t* argmax;

  __device__ __forceinline__ PooledMaps(A* pooled, uint8_t* argmax, int64_t clip, int packed)
      : maximum(pooled + 2 * clip * packed), mean(maximum + packed), argmax(argmax + clip * packed) {
    opaque(maximum), opaque(mean), opaque(this->argmax);
  }
  template <int V>
  __device__ __forceinline__ void store(int k, const Extreme<A>* of, A per_length) const {
    Vector<A, V> maxima, means;
    Vector<uint8_t, V> indices;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      maxima.at[j] = of[j].value;
      means.at[j] = of[j].sum * per_length;
      indices.at[j] = static_cast<uint8_t>(of[j].index);
    }
    store_vector(maximum + k, maxima);
    store_vector(mean + k, means);
    store_vector(argmax + k, indices);
  }
};

// A row or a column of a plane, as parts of it lie in shared memory.
struct StripLine {
  int first, step, count, length;  // of parts, each so many elements long
  int map, frame;                  // where its result goes, and how far the next frame is
  bool over_h;
};

template <class T, int V, int kRows, bool kGated, class A = Accumulate<T>>
class Strip {
 public:
  // gate: of the clip.
  __device__ __forceinline__ Strip(const StripPlanes<A>& at, const PooledMaps<A>& to, const A* gate, int tile)
      : at_(at), to_(to), gate_(gate), first_plane_(tile * at.planes), walk_(at.v, position()) {
    AIA_SHARED(Known, known, kStripThreads * (kRows + V) + V);
    AIA_SHARED(uint8_t, places, kStripThreads*(kRows + V) + V);
    known_ = known, places_ = places;
    opaque(gate_);
#pragma unroll
    for (int i = 0; i < kStripLines; ++i) lines_[i] = line(threadIdx.x + i * kStripThreads);
  }

  __device__ __forceinline__ void run(const T* x) {
    const Ahead<T, V, kRows, kStripThreads> ahead(x);
    ahead.begin(walk_);
    Extreme<A> over_t[kRows][V];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int j = 0; j < V; ++j) over_t[r][j] = Extreme<A>::none();
#pragma unroll 1
    for (; walk_.p.t < at_.v.T; walk_.move()) {
      Vector<T, V> taken[kRows];
      ahead.take(walk_, taken);
      if (walk_.has_vectors()) meet(taken, over_t);
      __syncthreads();
      ahead.ask(walk_);
#pragma unroll
      for (int i = 0; i < kStripLines; ++i) finish(lines_[i]);
      __syncthreads();
    }
    if (!walk_.has_vectors()) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) to_.template store<V>(walk_.of_vector(r).t_map, over_t[r], at_.v.per_t);
  }

 private:
  using Known = Vector<A, 2>;  // maximum and sum of a part of a line

  // Of threads without a strip, below the last row.
  __device__ __forceinline__ Position position() const {
    int rest = threadIdx.x;
    const int plane = at_.by_strips.divide(rest), down = at_.by_across.divide(rest);
    const bool inside = plane < at_.planes && first_plane_ + plane < at_.v.O;
    return {0, first_plane_ + plane, inside ? down * kRows : at_.v.H, rest * V, 0};
  }

  // Parts of rows come first, then, where vectors of them may begin, those of columns.
  __device__ __forceinline__ int row_parts() const {
    return (at_.planes * at_.down * kRows * at_.across + V - 1) / V * V;
  }

  __device__ __forceinline__ StripLine line(int number) const {
    const Volume<A>& v = at_.v;
    const int rows = at_.planes * v.H, frames = v.time_inside ? 1 : v.O;
    const bool over_h = number >= rows;
    int rest = over_h ? number - rows : number;
    const int plane = over_h ? at_.by_w.divide(rest) : at_.by_h.divide(rest);
    StripLine made{0, 0, 0, 0, 0, 0, over_h};
    if (plane >= at_.planes || first_plane_ + plane >= v.O) return made;
    const Position p{0, first_plane_ + plane, over_h ? 0 : rest, over_h ? rest : 0, 0};
    if (over_h)
      return {row_parts() + plane * at_.down * v.W + rest, v.W, at_.down, kRows, v.h_map(p), frames * v.W, true};
    return {(plane * at_.down * kRows + rest) * at_.across, 1, at_.across, V, v.w_map(p), frames * v.H, false};
  }

  __device__ __forceinline__ void keep(int part, const Extreme<A>& of) const {
    known_[part] = {of.value, of.sum};
    places_[part] = static_cast<uint8_t>(of.index);
  }

  // One frame of the strip.
  __device__ __forceinline__ void meet(const Vector<T, V> (&taken)[kRows], Extreme<A> (&over_t)[kRows][V]) const {
    const Position& p = walk_.p;
    const int plane = p.o - first_plane_, row = plane * at_.down * kRows + p.h;
    Extreme<A> of_columns[V];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Vector<A, V> factors;
      if constexpr (kGated) factors = load_vector<V>(gate_ + walk_.of_vector(r).channel_map);
      Extreme<A> of_row;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        A value = widen(taken[r].at[j]);
        if constexpr (kGated) value *= factors.at[j];
        value = settled(value);
        over_t[r][j].add(value, p.t);
        if (j == 0)
          of_row = Extreme<A>::of(value);
        else
          of_row.add(value, j);
        if (r == 0)
          of_columns[j] = Extreme<A>::of(value);
        else
          of_columns[j].add(value, r);
      }
      keep((row + r) * at_.across + p.w / V, of_row);
    }
    const int column = row_parts() + (row / kRows) * at_.v.W + p.w;
    Vector<Known, V> parts;
    Vector<uint8_t, V> first;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      parts.at[j] = {of_columns[j].value, of_columns[j].sum};
      first.at[j] = static_cast<uint8_t>(of_columns[j].index);
    }
    store_vector(known_ + column, parts);
    store_vector(places_ + column, first);
  }

  // Merges the next parts of a line.
  template <int kParts>
  __device__ __forceinline__ void merge(Extreme<A>& total, int& part, int step) const {
    Known next[kParts];
    int at[kParts];
#pragma unroll
    for (int i = 0; i < kParts; ++i, part += step) next[i] = known_[at[i] = part];
#pragma unroll
    for (int i = 0; i < kParts; ++i) total.merge({next[i].at[0], next[i].at[1], at[i]});
  }

  // Merges the parts of a line, of the frame that they are of.
  __device__ __forceinline__ void finish(StripLine& line) const {
    if (line.count == 0) return;
    const Known start = known_[line.first];
    Extreme<A> total{start.at[0], start.at[1], line.first};
    int part = line.first + line.step, left = line.count - 1;
#pragma unroll 1
    for (; left >= kStripParts - 1; left -= kStripParts - 1) merge<kStripParts - 1>(total, part, line.step);
#pragma unroll 1
    for (; left > 0; --left) merge<1>(total, part, line.step);
    int before = total.index - line.first;
    if (line.over_h) before = at_.by_w.divide(before);
    total.index = before * line.length + places_[total.index];
    to_.template store<1>(line.map, &total, line.over_h ? at_.v.per_h : at_.v.per_w);
    line.map += line.frame;
  }

  const StripPlanes<A>& at_;
  const PooledMaps<A>& to_;
  const A* gate_;
  int first_plane_;
  Walk<A, kRows, Across::kRows> walk_;
  StripLine lines_[kStripLines];
  Known* known_;
  uint8_t* places_;
};

template <class T, int V, int kRows, bool kGated, class A = Accumulate<T>>
__global__ void __launch_bounds__(kStripThreads, 2)
    pool_strips_kernel(StripPlanes<A> at,
                       const T* __restrict__ x,       // [B, T, C, H, W] in its order of storage
                       const A* __restrict__ gate,    // [B, T, H, W], or null
                       A* __restrict__ pooled,        // [B, 2, M]
                       uint8_t* __restrict__ argmax)  // [B, M]
{
  const int64_t clip = blockIdx.x / at.tiles;
  const PooledMaps<A> to(pooled, argmax, clip, at.v.packed(kSpacetime));
  const T* from = x + clip * at.v.size();
  opaque(from);
  Strip<T, V, kRows, kGated> strip(at, to, kGated ? gate + clip * at.v.packed(kChannel) : gate, blockIdx.x % at.tiles);
  strip.run(from);
}

// A call, and how its kernel is found.
struct StripPool {
  const Shape& shape;
  const void *x, *gate;
  void *pooled, *argmax, *stream;

  template <class T>
  int run() const {
    const int packed = Volume<Accumulate<T>>(shape).packed(kSpacetime);
    if (shape.W % 4 == 0 && packed % 4 == 0 && shape.H % 4 == 0) return with_gate<T, 4, 4>();
    if (shape.H % 7 != 0) return -1;
    if (shape.W % 2 == 0 && packed % 2 == 0) return with_gate<T, 2, 7>();
    return sizeof(T) == 4 || shape.C % 2 == 0 ? with_gate<T, 1, 7>() : -1;
  }
  template <class T, int V, int kRows>
  int with_gate() const {
    return gate ? queue<T, V, kRows, true>() : queue<T, V, kRows, false>();
  }
  template <class T, int V, int kRows, bool kGated>
  int queue() const {
    using A = Accumulate<T>;
    const StripPlanes<A> at(shape, V, kRows);
    if (at.planes == 0) return -1;
    return launch(pool_strips_kernel<T, V, kRows, kGated>, shape.B * at.tiles, kStripThreads, stream, at,
                  static_cast<const T*>(x), static_cast<const A*>(gate), static_cast<A*>(pooled),
                  static_cast<uint8_t*>(argmax));
  }
};

}  // namespace

int pool_by_strips(const Shape& shape, const void* x, Gate gate, void* pooled, void* argmax, int index_bytes,
                   void* stream) {
  const bool served = shape.order != Order::kTHWC && gate.context != kSpacetime && index_bytes == 1;
  if (!served || !are_aligned({x, gate.maps, pooled, argmax})) return -1;
  const StripPool call{shape, x, gate.maps, pooled, argmax, stream};
  switch (shape.scalar) {
    case Scalar::kFloat32: return call.run<float>();
    case Scalar::kBFloat16: return call.run<BFloat16>();
    case Scalar::kFloat16: return call.run<Float16>();
    default: return -1;
  }
}

}  // namespace aia::cuda
