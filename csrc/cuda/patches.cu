// Reductions over T, over H and over W at once, as by strips (strips.cu), of planes [T, C, H, W] that are made of
// patches of 7 x 7: those of the later stages of a ResNet, 7 x 7, 14 x 14 and 28 x 28.
//
// A lane owns a patch and walks with it over frames, and a warp owns 32 patches, whose planes lie side by side in
// memory. So a frame of a warp is one run, which is copied by 16 bytes whatever the length of a row, and a patch knows
// its rows and columns whole: a line of a plane has one part, two or four. Nothing is merged with other warps until the
// end, when those that share the frames of a plane are.
//
// A Pass says what is reduced:
//   Pass::Part              what is known of some elements (max_mean.cuh)
//   Pass::kTensors          how many tensors are read: x, or x and y
//   Pass::kMaps             how many numbers of maps over C an element meets, which lie in shared memory
//   pass.with_index(body)   calls body with a value of the type in which indices among them are stored
//   pass.load<Index, V>(k, maps)   these of V neighbours
//   pass.term(...)          what is reduced of an element: what Part::of and Part::add take
//   pass.results            where results go (spacetime_results.cuh)
#include "patches.h"

#include "spacetime_results.cuh"
#include "teams.cuh"
#include "walk.cuh"

namespace aia::cuda {
namespace {

// Rows and columns of a patch, and places of a row of its field: vectors of four.
constexpr int kPatch = 7, kRow = 8;

// Warps of a block: fewer where a warp has frames of two tensors on their way.
template <class Pass>
constexpr int kPatchWarps = Pass::kTensors == 1 ? 4 : 2;

// Shared memory that a block of any GPU may have.
constexpr int kMostShared = 99 << 10;

// What 32 patches are, with kSide of them along each side of a plane.
template <int kSide>
struct Patches {
  static constexpr int kOfPlane = kSide * kSide, kPlanes = kWarp / kOfPlane, kEdge = kPatch * kSide;
  static constexpr int kPlane = kEdge * kEdge, kElements = kPlanes * kPlane, kLines = kPlanes * kEdge;
};

// Warps of a block: so many groups of planes, each by so many warps, which share out its frames.
template <class A>
struct PatchBlocks {
  Volume<A> v;
  int groups, shares, frames, window;  // frames of a share, and those whose fields are staged together
  int tiles;                           // blocks of a clip

  // A frame's fields take so many bytes, for which there is so much room.
  PatchBlocks(const Shape& shape, int planes, int warps, int field_bytes, int room) : v(shape), shares(1) {
    // A multiprocessor runs four warps at a time. Where there are fewer than three, they share out frames, which costs
    // a part of each element for two frames or more.
    const int64_t all = shape.B * ceil_div(v.O, planes);
    const int most = field_bytes > 0 ? std::min(warps, room / field_bytes) : warps;
    while (2 * shares <= most && v.T % (2 * shares) == 0 && 4 * shares <= v.T && all * shares < 3 * kMultiprocessors)
      shares *= 2;
    groups = warps / shares;
    frames = v.T / shares;
    window = field_bytes > 0 ? ceil_div(frames, ceil_div(frames, room / (shares * field_bytes))) : 0;
    tiles = ceil_div(v.O, planes * groups);
  }
};

// An element of a sum, by its factors: a sum then takes one multiply-add.
template <class A>
struct Factors {
  A x, y;
};

template <class A>
struct ProductSum : Plus<A> {
  static __device__ __forceinline__ ProductSum none() { return {Plus<A>::none()}; }
  static __device__ __forceinline__ ProductSum of(const Factors<A>& first) { return {{first.x * first.y}}; }
  static __device__ __forceinline__ ProductSum of_known(A known, int) { return {{known}}; }
  __device__ __forceinline__ void add(const Factors<A>& next, int) {
    this->sum = fused_multiply_add(next.x, next.y, this->sum);
  }
};

// What is known over T of the elements of a patch, while frames are met. A maximum then stays in its register, and its
// index is a byte of a word. The index does not count where the maximum is NaN, which no comparison tells.
template <class Part, int kElements>
struct OverFrames {
  Part parts[kElements];

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int k = 0; k < kElements; ++k) parts[k] = Part::none();
  }
  template <class Term>
  __device__ __forceinline__ void add(int k, const Term& term, int t) {
    parts[k].add(term, t);
  }
  __device__ __forceinline__ Part at(int k) const { return parts[k]; }
};

template <class A, int kElements>
struct OverFrames<Extreme<A>, kElements> {
  A value[kElements], sum[kElements];
  uint32_t indices[(kElements + 3) / 4];

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int k = 0; k < kElements; ++k) value[k] = Extreme<A>::none().value, sum[k] = 0, indices[k / 4] = 0;
  }
  __device__ __forceinline__ void add(int k, A term, int t) {
    replace_byte_if_greater(term, value[k], indices[k / 4], k % 4, static_cast<uint32_t>(t));
    value[k] = larger_or_nan(value[k], term);
    sum[k] += term;
  }
  __device__ __forceinline__ Extreme<A> at(int k) const {
    return {value[k], sum[k], static_cast<int>(indices[k / 4] >> k % 4 * 8 & 0xff)};
  }
};

// The numbers that a row of a patch meets, in shared memory.
template <class A, int kMaps>
struct PatchRow {
  Vector<A, kRow> maps[kMaps];
};

template <class A, bool kGated>
struct PatchPool {
  using Part = Extreme<A>;
  static constexpr int kTensors = 1, kMaps = kGated ? 1 : 0;
  const A* gate;  // [T, H, W]
  PooledMaps<A> results;

  template <class Body>
  __device__ __forceinline__ void with_index(Body&& body) const {
    body(0);
  }
  template <class Index, int V>
  __device__ __forceinline__ void load(int k, Vector<A, V> (&maps)[1]) const {
    maps[0] = load_vector<V>(gate + k);
  }
  // An element of x beside its place in the map.
  __device__ __forceinline__ A element(A x, int k) const { return kGated ? x * gate[k] : x; }
  __device__ __forceinline__ A term(const PatchRow<A, 1>& row, int, int j, const A (&x)[1][kPatch]) const {
    return settled(kGated ? x[0][j] * row.maps[0].at[j] : x[0][j]);
  }
};

template <class A>
struct PatchUnpooledSum {
  using Part = ProductSum<A>;
  static constexpr int kTensors = 1, kMaps = 3;
  ClipGradients<A> maps;  // [T, H, W]
  A per_c;
  SummedMaps<A> results;

  template <class Body>
  __device__ __forceinline__ void with_index(Body&& body) const {
    if (maps.argmax.bytes == 1)
      body(uint8_t{});
    else if (maps.argmax.bytes == 2)
      body(int16_t{});
    else
      body(int32_t{});
  }
  // Their share of the mean, the maximum, and the bits of its channel, which take one comparison.
  template <class Index, int V>
  __device__ __forceinline__ void load(int k, Vector<A, V> (&to)[3]) const {
    const auto mean = load_vector<V>(maps.mean + k);
    const auto argmax = load_vector<V>(static_cast<const Index*>(maps.argmax.data) + k);
    to[1] = load_vector<V>(maps.maximum + k);
#pragma unroll
    for (int i = 0; i < V; ++i)
      to[0].at[i] = mean.at[i] * per_c, to[2].at[i] = bits_as<A>(static_cast<int>(argmax.at[i]));
  }
  __device__ __forceinline__ Factors<A> term(const PatchRow<A, 3>& row, int channel, int j,
                                             const A (&x)[1][kPatch]) const {
    A factor = row.maps[0].at[j];
    if (bits_as<int>(row.maps[2].at[j]) == channel) factor += row.maps[1].at[j];
    return {x[0][j], factor};
  }
};

template <class A>
struct PatchProductSum {
  using Part = ProductSum<A>;
  static constexpr int kTensors = 2, kMaps = 0;
  SummedMaps<A> results;

  __device__ __forceinline__ Factors<A> term(const PatchRow<A, 1>&, int, int j, const A (&x)[2][kPatch]) const {
    return {x[0][j], x[1][j]};
  }
};

// The memory of a warp in shared memory.
template <class T, int kSide, class Pass>
struct PatchMemory {
  using Known = typename Pass::Part::Known;
  using Unit = Vector<uint32_t, 4>;
  static constexpr int kElements = Patches<kSide>::kElements, kLines = kWarp * kPatch;
  static constexpr int kFrames = 8 / sizeof(T), kUnits = kElements * sizeof(T) / sizeof(Unit);

  struct OverT {
    Known known[kElements];
    uint8_t places[Pass::Part::kIndexed ? kElements : 4];
  };
  // Frames that are asked for or met; when all were met, what is known over T.
  union {
    Unit frames[kFrames][Pass::kTensors][kUnits];
    OverT over_t;
  };
  // Of the frame, over H and over W.
  Known lines[2][kLines];
  uint8_t line_places[2][Pass::Part::kIndexed ? kLines : 4];
};

// The rows of a patch, in the words of a frame.
template <class T, int kEdge>
struct PatchRows {
  static constexpr bool kInWord = sizeof(T) == 2;
  static constexpr int kWords = kInWord ? kRow / 2 : kPatch;
  int first[2], shift[2];  // of even and of odd rows

  __device__ __forceinline__ explicit PatchRows(int start) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int k = start + odd * kEdge;
      first[odd] = kInWord ? k / 2u : k;
      shift[odd] = kInWord ? k % 2u * 16 : 0;
    }
  }
  template <class A>
  __device__ __forceinline__ void load(const uint32_t* words, int r, A (&to)[kPatch]) const {
    const uint32_t* at = words + first[r % 2] + r / 2 * (kInWord ? kEdge : 2 * kEdge);
    Vector<uint32_t, kWords> found;
#pragma unroll
    for (int i = 0; i < kWords; ++i) found.at[i] = at[i];
    if constexpr (kInWord) {
      // Of a row that begins in the middle of a word, each word takes its second half from the next.
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint64_t next = i + 1 < kWords ? found.at[i + 1] : 0;
        found.at[i] = static_cast<uint32_t>((next << 32 | found.at[i]) >> shift[r % 2]);
      }
      const auto wide = widened(bits_as<Vector<T, kRow>>(found));
#pragma unroll
      for (int j = 0; j < kPatch; ++j) to[j] = wide.at[j];
    } else {
#pragma unroll
      for (int j = 0; j < kPatch; ++j) to[j] = bits_as<A>(found.at[j]);
    }
  }
};

template <class T, int kSide, class Pass, class A = Accumulate<T>>
class PatchWalk {
  using Of = Patches<kSide>;
  using Memory = PatchMemory<T, kSide, Pass>;
  using Part = typename Pass::Part;
  using Row = PatchRow<A, std::max(Pass::kMaps, 1)>;
  // What a patch meets. Vectors of four of eight patches side by side lie in different banks.
  struct Field {
    Row rows[kPatch];
    Vector<A, 4> apart;
  };
  template <class Of>
  static constexpr int kWords = sizeof(Of) / sizeof(A);
  using OverT = OverFrames<Part, kPatch * kPatch>;
  static constexpr int kTensors = Pass::kTensors, kFrames = Memory::kFrames;

 public:
  // A block has the fields of some frames, and behind them the memory of each warp.
  static constexpr int kWarps = kPatchWarps<Pass>, kRoom = kMostShared - kWarps * static_cast<int>(sizeof(Memory));
  static constexpr int kFieldBytes = Pass::kMaps > 0 ? Of::kOfPlane * static_cast<int>(sizeof(Field)) : 0;
  static constexpr int kMemoryBytes = kWarps * static_cast<int>(sizeof(Memory));
  static_assert(kRoom >= kFieldBytes);

  __device__ __forceinline__ PatchWalk(const PatchBlocks<A>& at, const Pass& pass, int tile)
      : at_(at),
        pass_(pass),
        lane_(threadIdx.x % kWarp),
        share_(threadIdx.x / kWarp % at.shares),
        group_(threadIdx.x / kWarp / at.shares),
        plane_((tile * at.groups + group_) * Of::kPlanes),
        planes_(min(Of::kPlanes, at.v.O - plane_)),
        rows_(lane_ / Of::kOfPlane * Of::kPlane + lane_ / kSide % kSide * kPatch * Of::kEdge + lane_ % kSide * kPatch) {
    AIA_DYNAMIC_SHARED(Field, fields);
    fields_ = fields;
    memories_ = reinterpret_cast<Memory*>(fields + (Pass::kMaps > 0 ? at.shares * at.window * Of::kOfPlane : 0));
    mine_ = memories_ + threadIdx.x / kWarp;
  }

  __device__ __forceinline__ void run(const T* const (&tensors)[kTensors]) {
    const int first = share_ * at_.frames;
    const T* from[kTensors];  // where the next frame to be asked for begins
#pragma unroll
    for (int i = 0; i < kTensors; ++i) from[i] = tensors[i] + (first * at_.v.O + plane_) * Of::kPlane;
#pragma unroll
    for (int k = 0; k < kFrames; ++k) ask(from, k, k < at_.frames);
    OverT over_t;
    over_t.begin();
    int over_h = at_.v.h_map({first, plane_, 0, 0, 0}), over_w = at_.v.w_map({first, plane_, 0, 0, 0});
#pragma unroll 1
    for (int k = 0, left = 0; k < at_.frames; ++k, --left) {
      if constexpr (Pass::kMaps > 0) {
        if (left == 0) {
          left = at_.window;
          stage_fields(k);
        }
      }
      wait_for_copies<kFrames - 1>();
      warp_barrier();
      meet(first + k, fields_ + ((at_.window - left) * at_.shares + share_) * Of::kOfPlane, k % kFrames, over_t);
      warp_barrier();
      ask(from, k % kFrames, k + kFrames < at_.frames);
      store_lines(over_h, over_w);
      over_h += at_.v.O * Of::kEdge, over_w += at_.v.O * Of::kEdge;
    }
    leave_over_t(over_t);
    __syncthreads();
    store_over_t(tensors[0]);
  }

 private:
  // Lanes copy a frame of the warp together, 16 bytes each.
  __device__ __forceinline__ void ask(const T* (&from)[kTensors], int frame, bool wanted) const {
    using Unit = typename Memory::Unit;
    constexpr int kUnits = Memory::kUnits;
    if (wanted) {
#pragma unroll
      for (int i = 0; i < kTensors; ++i) {
        const Unit* const units = reinterpret_cast<const Unit*>(from[i]);
        Unit* const to = mine_->frames[frame][i] + lane_;
        if (planes_ == Of::kPlanes) {
#pragma unroll
          for (int k = 0; k < kUnits; k += kWarp)
            if (k + kWarp <= kUnits || lane_ < kUnits % kWarp) copy_async<16>(to + k, units + k + lane_);
        } else {
#pragma unroll 1
          for (int k = lane_; k < planes_ * kUnits / Of::kPlanes; k += kWarp) copy_async<16>(to + k - lane_, units + k);
        }
        from[i] += at_.v.O * Of::kPlane;
      }
    }
    end_of_copies();
  }

  // Those of the next frames of each share, from its k-th on.
  __device__ __forceinline__ void stage_fields(int k) const {
    if (k > 0) __syncthreads();
    pass_.with_index([&](auto index) {
#pragma unroll 1
      for (int share = 0; share < at_.shares; ++share)
        stage_frames<decltype(index)>(share, share * at_.frames + k, min(at_.window, at_.frames - k));
    });
    __syncthreads();
  }

  // Of so many frames of a share from the first on. What lies at a place does so in every frame, so a thread has
  // places, and asks for several frames of them at once, for the last one again where there are fewer.
  template <class Index>
  __device__ __forceinline__ void stage_frames(int share, int first, int frames) const {
    constexpr int V = Of::kPlane % 2 != 0 ? 1 : kSide, kMost = kRoom / kFieldBytes, kBatch = kMost < 4 ? kMost : 4;
#pragma unroll 1
    for (int p = threadIdx.x * V; p < Of::kPlane; p += kWarps * kWarp * V) {
      int places[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int h = p / Of::kEdge, w = p % Of::kEdge + i;
        places[i] = (h / kPatch * kSide + w / kPatch) * kWords<Field> + h % kPatch * kWords<Row> + w % kPatch;
      }
#pragma unroll 1
      for (int f = 0; f < frames; f += kBatch) {
        Vector<A, V> maps[kBatch][Pass::kMaps];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          pass_.template load<Index, V>((first + min(f + i, frames - 1)) * Of::kPlane + p, maps[i]);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          Field* const of_frame = fields_ + (min(f + i, frames - 1) * at_.shares + share) * Of::kOfPlane;
          A* const words = of_frame->rows[0].maps[0].at;
#pragma unroll
          for (int j = 0; j < V; ++j)
#pragma unroll
            for (int m = 0; m < Pass::kMaps; ++m) words[places[j] + m * kRow] = maps[i][m].at[j];
        }
      }
    }
  }

  // Leaves a part of a line for the warp.
  __device__ __forceinline__ void leave(int axis, int place, const Part& part) const {
    mine_->lines[axis][place] = part.known();
    if constexpr (Part::kIndexed) mine_->line_places[axis][place] = static_cast<uint8_t>(part.index);
  }

  // One frame of the patch.
  __device__ __forceinline__ void meet(int t, const Field* of_frame, int frame, OverT& over_t) const {
    const int across = lane_ % kSide, down = lane_ / kSide % kSide, plane = lane_ / Of::kOfPlane;
    const int of_columns = ((down * Of::kPlanes + plane) * kSide + across) * kPatch;
    const int of_rows = ((across * Of::kPlanes + plane) * kSide + down) * kPatch;
    const Field& field = of_frame[lane_ % Of::kOfPlane];
    Part columns[kPatch];
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      A x[kTensors][kPatch];
#pragma unroll
      for (int i = 0; i < kTensors; ++i)
        rows_.load(reinterpret_cast<const uint32_t*>(mine_->frames[frame][i]), r, x[i]);
      Row met;
      if constexpr (Pass::kMaps > 0) met = field.rows[r];
      Part row;
#pragma unroll
      for (int j = 0; j < kPatch; ++j) {
        const auto term = pass_.term(met, plane_ + plane, j, x);
        over_t.add(r * kPatch + j, term, t);
        if (j == 0)
          row = Part::of(term);
        else
          row.add(term, j);
        if (r == 0)
          columns[j] = Part::of(term);
        else
          columns[j].add(term, r);
      }
      leave(1, of_rows + r, row);
    }
#pragma unroll
    for (int j = 0; j < kPatch; ++j) leave(0, of_columns + j, columns[j]);
  }

  // Four lines a lane at a time, of those over H and of those over W: at once, where the lanes do.
  __device__ __forceinline__ void store_lines(int over_h, int over_w) const {
    constexpr int kLines = Of::kLines, kHalf = kWarp / 2;
    constexpr bool kAtOnce = kLines <= 4 * kHalf;
    // Not known to the compiler, which would find each place anew.
    int first = lane_ % (kAtOnce ? kHalf : kWarp) * 4, lines = planes_ * Of::kEdge;
    opaque(first), opaque(over_h), opaque(over_w);
    const auto store = [&](int axis, int to, int line) {
      if (line + first >= (line + 4 * kWarp > kLines ? min(lines, kLines) : lines)) return;
      Part total[4];
#pragma unroll
      for (int i = 0; i < kSide; ++i)
        merge(total, mine_->lines[axis] + first, mine_->line_places[axis] + first, i * kLines + line, i, kPatch);
      pass_.results.template store<4>(to + line, total, at_.v.per_h);
    };
    if constexpr (kAtOnce) {
      store(lane_ / kHalf, (lane_ < kHalf ? over_h : over_w) + first, 0);
    } else {
      over_h += first, over_w += first;
      opaque(over_h), opaque(over_w);
#pragma unroll
      for (int line = 0; line < kLines; line += 4 * kWarp) store(0, over_h, line);
#pragma unroll
      for (int line = 0; line < kLines; line += 4 * kWarp) store(1, over_w, line);
    }
  }

  // Of four neighbours, part i, whose indices begin at i * length.
  static __device__ __forceinline__ void merge(Part (&total)[4], const typename Part::Known* known,
                                               const uint8_t* places, int k, int i, int length) {
    const auto of = load_vector<4>(known + k);
    Vector<uint8_t, 4> place{};
    if constexpr (Part::kIndexed) place = load_vector<4>(places + k);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Part next = Part::of_known(of.at[j], i * length + place.at[j]);
      if (i == 0)
        total[j] = next;
      else
        total[j].merge(next);
    }
  }

  __device__ __forceinline__ void leave_over_t(const OverT& over_t) const {
    const int across = lane_ % kSide, down = lane_ / kSide % kSide, plane = lane_ / Of::kOfPlane;
    const int first = plane * Of::kPlane + (down * Of::kEdge + across) * kPatch;
#pragma unroll
    for (int r = 0; r < kPatch; ++r)
#pragma unroll
      for (int j = 0; j < kPatch; ++j) {
        const int place = first + r * Of::kEdge + j;
        const Part part = over_t.at(r * kPatch + j);
        mine_->over_t.known[place] = part.known();
        if constexpr (Part::kIndexed) mine_->over_t.places[place] = static_cast<uint8_t>(part.index);
      }
  }

  // The first frame where this element of the planes is NaN.
  __device__ int first_nan(const T* x, int element) const {
    int t = 0;
    for (; t < at_.v.T - 1; ++t) {
      const A value =
          pass_.element(widen(x[t * at_.v.O * Of::kPlane + element]), t * Of::kPlane + element % Of::kPlane);
      if (value != value) break;
    }
    return t;
  }

  // Of the planes of a group, by the warps that shared their frames.
  __device__ __forceinline__ void store_over_t(const T* x) const {
    const Memory* const shares = memories_ + group_ * at_.shares;
    const int to = at_.v.t_map({0, plane_, 0, 0, 0}), elements = planes_ * Of::kPlane;
#pragma unroll 1
    for (int k = 4 * (share_ * kWarp + lane_); k < elements; k += 4 * kWarp * at_.shares) {
      Part total[4];
      merge(total, shares->over_t.known, shares->over_t.places, k, 0, 0);
#pragma unroll 1
      for (int share = 1; share < at_.shares; ++share)
        merge(total, shares[share].over_t.known, shares[share].over_t.places, k, 1, 0);
      if constexpr (Part::kIndexed) {
        bool nan = false;
#pragma unroll
        for (int j = 0; j < 4; ++j) nan |= total[j].value != total[j].value;
        if (nan) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (total[j].value != total[j].value) total[j].index = first_nan(x + plane_ * Of::kPlane, k + j);
        }
      }
      pass_.results.template store<4>(to + k, total, at_.v.per_t);
    }
  }

  const PatchBlocks<A>& at_;
  const Pass& pass_;
  const int lane_, share_, group_;
  const int plane_, planes_;  // the first of the warp, and how many
  const PatchRows<T, Of::kEdge> rows_;
  Field* fields_;
  Memory *memories_, *mine_;
};

template <class T, int kSide, bool kGated, class A = Accumulate<T>>
__global__ void __launch_bounds__(128, 2) pool_patches_kernel(PatchBlocks<A> at,
                                                              const T* __restrict__ x,       // [B, T, C, H, W]
                                                              const A* __restrict__ gate,    // [B, T, H, W], or null
                                                              A* __restrict__ pooled,        // [B, 2, M]
                                                              uint8_t* __restrict__ argmax)  // [B, M]
{
  const int64_t clip = blockIdx.x / at.tiles;
  const PatchPool<A, kGated> pass{kGated ? gate + clip * at.v.packed(kChannel) : gate,
                                  PooledMaps<A>(at.v, clip, pooled, argmax)};
  PatchWalk<T, kSide, PatchPool<A, kGated>>(at, pass, blockIdx.x % at.tiles).run({x + clip * at.v.size()});
}

template <class T, int kSide, class A = Accumulate<T>>
__global__ void __launch_bounds__(128, 2) unpool_reduce_patches_kernel(PatchBlocks<A> at,
                                                                       const T* __restrict__ x,  // [B, T, C, H, W]
                                                                       UnpooledField<A> field,
                                                                       A* __restrict__ sums)  // [B, M]
{
  const int64_t clip = blockIdx.x / at.tiles;
  const PatchUnpooledSum<A> pass{ClipGradients<A>(field, clip, at.v.packed(kChannel)), at.v.per_c,
                                 SummedMaps<A>(at.v, clip, sums)};
  PatchWalk<T, kSide, PatchUnpooledSum<A>>(at, pass, blockIdx.x % at.tiles).run({x + clip * at.v.size()});
}

template <class T, int kSide, class A = Accumulate<T>>
__global__ void __launch_bounds__(64, 4) recalibrate_reduce_patches_kernel(PatchBlocks<A> at,
                                                                           const T* __restrict__ grad_y,  // as x
                                                                           const T* __restrict__ x,  // [B, T, C, H, W]
                                                                           A* __restrict__ sums)     // [B, M]
{
  const int64_t clip = blockIdx.x / at.tiles, first = clip * at.v.size();
  const PatchProductSum<A> pass{SummedMaps<A>(at.v, clip, sums)};
  PatchWalk<T, kSide, PatchProductSum<A>>(at, pass, blockIdx.x % at.tiles).run({grad_y + first, x + first});
}

template <class T, class Body>
int with_sides(const Shape& shape, Body&& body) {
  const int64_t plane = int64_t{shape.H} * shape.W;
  // Frames and lines of them are whole vectors.
  const bool whole = shape.C * plane * sizeof(T) % 16 == 0 && shape.C * shape.H % 4 == 0;
  if (shape.H != shape.W || !whole) return -1;
  switch (shape.H) {
    case 7: return body(T{}, std::integral_constant<int, 1>{});
    case 14: return body(T{}, std::integral_constant<int, 2>{});
    case 28: return body(T{}, std::integral_constant<int, 4>{});
    default: return -1;
  }
}

template <class Body>
int in_patches(const Shape& shape, bool served, std::initializer_list<const void*> addresses, Body&& body) {
  if (!served || shape.order != Order::kTCHW || !are_aligned(addresses)) return -1;
  switch (shape.scalar) {
    case Scalar::kFloat32: return with_sides<float>(shape, body);
    case Scalar::kBFloat16: return with_sides<BFloat16>(shape, body);
    case Scalar::kFloat16: return with_sides<Float16>(shape, body);
    default: return -1;
  }
}

// Queues a kernel of a pass, whose parameters behind the first are given.
template <class T, int kSide, class Pass, class Kernel, class... Parameters>
int queue_patches(const Shape& shape, Kernel kernel, void* stream, Parameters... parameters) {
  using Walk = PatchWalk<T, kSide, Pass>;
  const PatchBlocks<float> at(shape, Patches<kSide>::kPlanes, Walk::kWarps, Walk::kFieldBytes, Walk::kRoom);
  const int bytes = Walk::kMemoryBytes + at.shares * at.window * Walk::kFieldBytes;
  return launch(kernel, shape.B * at.tiles, BlockSize(Walk::kWarps * kWarp, bytes), stream, at, parameters...);
}

}  // namespace

int pool_by_patches(const Shape& shape, const void* x, Gate gate, void* pooled, void* argmax, int index_bytes,
                    void* stream) {
  const bool served = gate.context != kSpacetime && index_bytes == 1;
  return in_patches(shape, served, {x, gate.maps, pooled, argmax}, [&](auto type, auto side) {
    using T = decltype(type);
    const auto run = [&](auto gated) {
      constexpr bool kGated = decltype(gated)::value;
      return queue_patches<T, side.value, PatchPool<float, kGated>>(
          shape, pool_patches_kernel<T, side.value, kGated>, stream, static_cast<const T*>(x),
          static_cast<const float*>(gate.maps), static_cast<float*>(pooled), static_cast<uint8_t*>(argmax));
    };
    return gate.maps ? run(std::true_type{}) : run(std::false_type{});
  });
}

int unpool_reduce_by_patches(const Shape& shape, const void* x, Unpooled unpooled, void* sums, void* stream) {
  return in_patches(shape, unpooled.context == kChannel, {x, unpooled.grad, unpooled.argmax, sums},
                    [&](auto type, auto side) {
                      using T = decltype(type);
                      return queue_patches<T, side.value, PatchUnpooledSum<float>>(
                          shape, unpool_reduce_patches_kernel<T, side.value>, stream, static_cast<const T*>(x),
                          UnpooledField<float>(unpooled), static_cast<float*>(sums));
                    });
}

int recalibrate_reduce_by_patches(const Shape& shape, const void* grad_y, const void* x, void* sums, void* stream) {
  return in_patches(shape, true, {grad_y, x, sums}, [&](auto type, auto side) {
    using T = decltype(type);
    return queue_patches<T, side.value, PatchProductSum<float>>(shape, recalibrate_reduce_patches_kernel<T, side.value>,
                                                                stream, static_cast<const T*>(grad_y),
                                                                static_cast<const T*>(x), static_cast<float*>(sums));
  });
}

}  // namespace aia::cuda
