// Reductions over T, over H and over W at once, of planes that a block holds whole: pool of x * G, where G is 1 or a
// gate over C; the sum of x * U, where U is unpooled over C; and the sum of x * y, for y like x. x lies in planes and
// has 16 or 32 bits. A thread owns a strip, V neighbours in each of kRows rows below each other, and walks with it over
// T (walk.cuh).
//
// Rows come in whole strips. What a thread knows over T stays in registers. Of each frame it leaves what it knows of
// each of its rows and of each of its columns in shared memory; these are merged there, by a thread for each row and
// each column of the planes.
//
// A Pass says what is reduced:
//   Pass::Part                what is known of some elements: none(), of(value), add(value, index), merge; and in
//   shared
//                             memory known(), of type Known, beside an index where it has one (kIndexed)
//   Pass::kTensors            how many tensors are read: x, or x and y
//   pass.values(walk, r, x)   of the vector in row r of the frame, which loaded x [kTensors]
//   pass.results              where results go (spacetime_results.cuh)
#include "strips.h"

#include "patches.h"
#include "spacetime_results.cuh"
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

// pool, of one clip.
template <class A, bool kGated>
struct PoolPass {
  using Part = Extreme<A>;
  static constexpr int kTensors = 1;
  const A* gate;  // [T, H, W]
  PooledMaps<A> results;

  __device__ __forceinline__ PoolPass(const Volume<A>& v, int64_t clip, const A* gate, A* pooled, uint8_t* argmax)
      : gate(kGated ? gate + clip * v.packed(kChannel) : gate), results(v, clip, pooled, argmax) {
    opaque(this->gate);
  }
  template <int V, class T, class At>
  __device__ __forceinline__ Vector<A, V> values(const At& walk, int r, const Vector<T, V> (&x)[1]) const {
    Vector<A, V> factors, found = widened(x[0]);
    if constexpr (kGated) factors = load_vector<V>(gate + walk.of_vector(r).channel_map);
#pragma unroll
    for (int j = 0; j < V; ++j) found.at[j] = settled(kGated ? found.at[j] * factors.at[j] : found.at[j]);
    return found;
  }
};

// unpool_reduce, of one clip: the sum over an axis, divided by the number of maps.
template <class A>
struct UnpooledSumPass {
  using Part = Plus<A>;
  static constexpr int kTensors = 1;
  ClipGradients<A> maps;  // [T, H, W]
  SummedMaps<A> results;

  __device__ __forceinline__ UnpooledSumPass(const Volume<A>& v, int64_t clip, const UnpooledField<A>& field, A* sums)
      : maps(field, clip, v.packed(kChannel)), results(v, clip, sums) {}
  template <int V, class T, class At>
  __device__ __forceinline__ Vector<A, V> values(const At& walk, int r, const Vector<T, V> (&x)[1]) const {
    MapGradient<A, int, V, false> gradient;
    gradient.load(maps, walk.of_vector(r).channel_map);
    Vector<A, V> found{};
    gradient.add_mean(found, walk.v.per_c);
    gradient.add_maximum(found, walk.p.channel());
    const Vector<A, V> values = widened(x[0]);
#pragma unroll
    for (int j = 0; j < V; ++j) found.at[j] *= values.at[j];
    return found;
  }
};

// recalibrate_reduce, of one clip: as above.
template <class A>
struct ProductSumPass {
  using Part = Plus<A>;
  static constexpr int kTensors = 2;
  SummedMaps<A> results;

  __device__ __forceinline__ ProductSumPass(const Volume<A>& v, int64_t clip, A* sums) : results(v, clip, sums) {}
  template <int V, class T, class At>
  __device__ __forceinline__ Vector<A, V> values(const At&, int, const Vector<T, V> (&x)[2]) const {
    Vector<A, V> found = widened(x[0]);
    const Vector<A, V> others = widened(x[1]);
#pragma unroll
    for (int j = 0; j < V; ++j) found.at[j] *= others.at[j];
    return found;
  }
};

// A row or a column of a plane, as parts of it lie in shared memory.
struct StripLine {
  int first, step, count, length;  // of parts, each so many elements long
  int map, frame;                  // where its result goes, and how far the next frame is
  bool over_h;
};

template <class T, int V, int kRows, class Pass, class A = Accumulate<T>>
class Strip {
  static constexpr int kTensors = Pass::kTensors;
  using Copies = Ahead<T, V, kRows, kStripThreads>;

 public:
  __device__ __forceinline__ Strip(const StripPlanes<A>& at, const Pass& pass, int tile)
      : at_(at), pass_(pass), first_plane_(tile * at.planes), walk_(at.v, position()) {
    constexpr int kMost = kStripThreads * (kRows + V) + V;
    AIA_SHARED(Known, known, kMost);
    AIA_SHARED(uint8_t, places, Part::kIndexed ? kMost : 1);
    known_ = known, places_ = places;
#pragma unroll
    for (int i = 0; i < kStripLines; ++i) lines_[i] = line(threadIdx.x + i * kStripThreads);
  }

  // What the threads of a block have asked for of all tensors lies in dynamic shared memory.
  static constexpr int kSharedBytes = kTensors * Copies::kPlaces * static_cast<int>(sizeof(typename Copies::Place));

  __device__ __forceinline__ void run(const T* const (&tensors)[kTensors]) {
    AIA_DYNAMIC_SHARED(typename Copies::Place, copies);
    // A constructor each: an array of them would lie in memory.
    const Copies first(tensors[0], copies), last(tensors[kTensors - 1], copies + (kTensors - 1) * Copies::kPlaces);
#pragma unroll
    for (int k = 0; k < Copies::kFrames; ++k) {
      first.ask(walk_, k);
      if constexpr (kTensors > 1) last.ask(walk_, k);
    }
    Part over_t[kRows][V];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int j = 0; j < V; ++j) over_t[r][j] = Part::none();
#pragma unroll 1
    for (; walk_.p.t < at_.v.T; walk_.move()) {
      Vector<T, V> taken[kTensors][kRows];
      first.template take<kTensors>(walk_, taken[0]);
      if constexpr (kTensors > 1) last.template take<kTensors>(walk_, taken[1]);
      if (walk_.has_vectors()) meet(taken, over_t);
      __syncthreads();
      first.ask(walk_);
      if constexpr (kTensors > 1) last.ask(walk_);
#pragma unroll
      for (int i = 0; i < kStripLines; ++i) finish(lines_[i]);
      __syncthreads();
    }
    if (!walk_.has_vectors()) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) pass_.results.template store<V>(walk_.of_vector(r).t_map, over_t[r], at_.v.per_t);
  }

 private:
  using Part = typename Pass::Part;
  using Known = typename Part::Known;

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

  template <int N>
  __device__ __forceinline__ void keep(int first, const Part* of) const {
    Vector<Known, N> known;
    Vector<uint8_t, N> places;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      known.at[j] = of[j].known();
      if constexpr (Part::kIndexed) places.at[j] = static_cast<uint8_t>(of[j].index);
    }
    store_vector(known_ + first, known);
    if constexpr (Part::kIndexed) store_vector(places_ + first, places);
  }

  // One frame of the strip.
  __device__ __forceinline__ void meet(const Vector<T, V> (&taken)[kTensors][kRows], Part (&over_t)[kRows][V]) const {
    const Position& p = walk_.p;
    const int plane = p.o - first_plane_, row = plane * at_.down * kRows + p.h;
    Part of_columns[V];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Vector<T, V> x[kTensors];
#pragma unroll
      for (int i = 0; i < kTensors; ++i) x[i] = taken[i][r];
      const Vector<A, V> values = pass_.template values<V>(walk_, r, x);
      Part of_row;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A value = values.at[j];
        over_t[r][j].add(value, p.t);
        if (j == 0)
          of_row = Part::of(value);
        else
          of_row.add(value, j);
        if (r == 0)
          of_columns[j] = Part::of(value);
        else
          of_columns[j].add(value, r);
      }
      keep<1>((row + r) * at_.across + p.w / V, &of_row);
    }
    keep<V>(row_parts() + (row / kRows) * at_.v.W + p.w, of_columns);
  }

  // Merges the next parts of a line.
  template <int kParts>
  __device__ __forceinline__ void merge(Part& total, int& part, int step) const {
    Known next[kParts];
    int at[kParts];
#pragma unroll
    for (int i = 0; i < kParts; ++i, part += step) next[i] = known_[at[i] = part];
#pragma unroll
    for (int i = 0; i < kParts; ++i) total.merge(Part::of_known(next[i], at[i]));
  }

  // Merges the parts of a line, of the frame that they are of.
  __device__ __forceinline__ void finish(StripLine& line) const {
    if (line.count == 0) return;
    Part total = Part::of_known(known_[line.first], line.first);
    int part = line.first + line.step, left = line.count - 1;
#pragma unroll 1
    for (; left >= kStripParts - 1; left -= kStripParts - 1) merge<kStripParts - 1>(total, part, line.step);
#pragma unroll 1
    for (; left > 0; --left) merge<1>(total, part, line.step);
    if constexpr (Part::kIndexed) {
      int before = total.index - line.first;
      if (line.over_h) before = at_.by_w.divide(before);
      total.index = before * line.length + places_[total.index];
    }
    pass_.results.template store<1>(line.map, &total, line.over_h ? at_.v.per_h : at_.v.per_w);
    line.map += line.frame;
  }

  const StripPlanes<A>& at_;
  const Pass& pass_;
  int first_plane_;
  Walk<A, kRows, Across::kRows> walk_;
  StripLine lines_[kStripLines];
  Known* known_;
  uint8_t* places_;
};

// The part of a kernel that all passes share: `pass` of the clip. y is null where the pass reads x alone.
template <class T, int V, int kRows, class Pass, class A>
__device__ __forceinline__ void walk_in_strips(const StripPlanes<A>& at, const T* x, const T* y, int64_t clip,
                                               const Pass& pass) {
  const T* from[Pass::kTensors];
  from[0] = x + clip * at.v.size();
  opaque(from[0]);
  if constexpr (Pass::kTensors > 1) {
    from[1] = y + clip * at.v.size();
    opaque(from[1]);
  }
  Strip<T, V, kRows, Pass>(at, pass, blockIdx.x % at.tiles).run(from);
}

template <class T, int V, int kRows, bool kGated, class A = Accumulate<T>>
__global__ void __launch_bounds__(kStripThreads, 2)
    pool_strips_kernel(StripPlanes<A> at,
                       const T* __restrict__ x,       // [B, T, C, H, W] in its order of storage
                       const A* __restrict__ gate,    // [B, T, H, W], or null
                       A* __restrict__ pooled,        // [B, 2, M]
                       uint8_t* __restrict__ argmax)  // [B, M]
{
  const int64_t clip = blockIdx.x / at.tiles;
  walk_in_strips<T, V, kRows>(at, x, nullptr, clip, PoolPass<A, kGated>(at.v, clip, gate, pooled, argmax));
}

template <class T, int V, int kRows, class A = Accumulate<T>>
__global__ void __launch_bounds__(kStripThreads, 2)
    unpool_reduce_strips_kernel(StripPlanes<A> at,
                                const T* __restrict__ x,  // [B, T, C, H, W] in its order of storage
                                UnpooledField<A> field,
                                A* __restrict__ sums)  // [B, M]
{
  const int64_t clip = blockIdx.x / at.tiles;
  walk_in_strips<T, V, kRows>(at, x, nullptr, clip, UnpooledSumPass<A>(at.v, clip, field, sums));
}

template <class T, int V, int kRows, class A = Accumulate<T>>
__global__ void __launch_bounds__(kStripThreads, 2)
    recalibrate_reduce_strips_kernel(StripPlanes<A> at,
                                     const T* __restrict__ grad_y,  // as x
                                     const T* __restrict__ x,       // [B, T, C, H, W] in its order of storage
                                     A* __restrict__ sums)          // [B, M]
{
  const int64_t clip = blockIdx.x / at.tiles;
  walk_in_strips<T, V, kRows>(at, grad_y, x, clip, ProductSumPass<A>(at.v, clip, sums));
}

// Threads of a block and its bytes of dynamic shared memory.
template <class T, int V, int kRows, class Pass>
BlockSize strip_block() {
  return {kStripThreads, Strip<T, V, kRows, Pass>::kSharedBytes};
}

// Calls body(type, V, rows) for the strips in which x can be met beside float32 maps at aligned addresses; else -1.
template <class T, class Body>
int with_strips(const Shape& shape, Body&& body) {
  using std::integral_constant;
  const int packed = Volume<Accumulate<T>>(shape).packed(kSpacetime);
  const auto four = integral_constant<int, 4>{};
  const auto seven = integral_constant<int, 7>{};
  if (shape.W % 4 == 0 && packed % 4 == 0 && shape.H % 4 == 0) return body(T{}, four, four);
  if (shape.H % 7 != 0) return -1;
  if (shape.W % 2 == 0 && packed % 2 == 0) return body(T{}, integral_constant<int, 2>{}, seven);
  return sizeof(T) == 4 || shape.C % 2 == 0 ? body(T{}, integral_constant<int, 1>{}, seven) : -1;
}

template <class Body>
int in_strips(const Shape& shape, bool served, std::initializer_list<const void*> addresses, Body&& body) {
  if (!served || shape.order == Order::kTHWC || !are_aligned(addresses)) return -1;
  switch (shape.scalar) {
    case Scalar::kFloat32: return with_strips<float>(shape, body);
    case Scalar::kBFloat16: return with_strips<BFloat16>(shape, body);
    case Scalar::kFloat16: return with_strips<Float16>(shape, body);
    default: return -1;
  }
}

}  // namespace

int pool_by_strips(const Shape& shape, const void* x, Gate gate, void* pooled, void* argmax, int index_bytes,
                   void* stream) {
  const int error = pool_by_patches(shape, x, gate, pooled, argmax, index_bytes, stream);
  if (error >= 0) return error;
  const bool served = gate.context != kSpacetime && index_bytes == 1;
  return in_strips(shape, served, {x, gate.maps, pooled, argmax}, [&](auto type, auto V, auto rows) {
    using T = decltype(type);
    const StripPlanes<float> at(shape, V.value, rows.value);
    const auto run = [&](auto kernel) {
      if (at.planes == 0) return -1;
      const BlockSize size = strip_block<T, V.value, rows.value, PoolPass<float, false>>();
      return launch(kernel, shape.B * at.tiles, size, stream, at, static_cast<const T*>(x),
                    static_cast<const float*>(gate.maps), static_cast<float*>(pooled), static_cast<uint8_t*>(argmax));
    };
    return gate.maps ? run(pool_strips_kernel<T, V.value, rows.value, true>)
                     : run(pool_strips_kernel<T, V.value, rows.value, false>);
  });
}

int unpool_reduce_by_strips(const Shape& shape, const void* x, Unpooled unpooled, void* sums, void* stream) {
  const int error = unpool_reduce_by_patches(shape, x, unpooled, sums, stream);
  if (error >= 0) return error;
  const bool served = unpooled.context == kChannel;
  return in_strips(shape, served, {x, unpooled.grad, unpooled.argmax, sums}, [&](auto type, auto V, auto rows) {
    using T = decltype(type);
    const StripPlanes<float> at(shape, V.value, rows.value);
    if (at.planes == 0) return -1;
    const BlockSize size = strip_block<T, V.value, rows.value, UnpooledSumPass<float>>();
    return launch(unpool_reduce_strips_kernel<T, V.value, rows.value>, shape.B * at.tiles, size, stream, at,
                  static_cast<const T*>(x), UnpooledField<float>(unpooled), static_cast<float*>(sums));
  });
}

int recalibrate_reduce_by_strips(const Shape& shape, const void* grad_y, const void* x, void* sums, void* stream) {
  const int error = recalibrate_reduce_by_patches(shape, grad_y, x, sums, stream);
  if (error >= 0) return error;
  return in_strips(shape, true, {grad_y, x, sums}, [&](auto type, auto V, auto rows) {
    using T = decltype(type);
    const StripPlanes<float> at(shape, V.value, rows.value);
    if (at.planes == 0) return -1;
    const BlockSize size = strip_block<T, V.value, rows.value, ProductSumPass<float>>();
    return launch(recalibrate_reduce_strips_kernel<T, V.value, rows.value>, shape.B * at.tiles, size, stream, at,
                  static_cast<const T*>(grad_y), static_cast<const T*>(x), static_cast<float*>(sums));
  });
}

}  // namespace aia::cuda
