// unpool and recalibrate of planes in TCHW with rows of odd length, as those of 7x7: x goes by vectors of four all the
// same, which leave rows and planes.
//
// Such a vector meets numbers of the maps over H and W one by one. So a block, which walks over T as unpool's threads
// do, brings those of its planes into shared memory a frame ahead, with all that is known of a row or of a column side
// by side, and an element takes one load for its row and one for its column. What an element meets lies at places that
// do not change from frame to frame.
#include "staged.h"

#include <algorithm>

#include "walk.cuh"

namespace aia::cuda {
namespace {

// What the field over T, H and W is: all of unpool without an inner gate, the outer one of two, the inner one, or the
// gate of recalibrate.
template <bool kUnpooled, bool kBesideC, bool kMeetsX>
struct Part {
  static constexpr bool kUnpools = kUnpooled, kOverC = kBesideC, kOuter = kMeetsX;
};
using Alone = Part<true, false, true>;
using Outer = Part<true, true, true>;
using Inner = Part<true, true, false>;
using GateOfX = Part<false, false, true>;

constexpr int kStagedThreads = 192, kStagedPlanes = 4;
// Places in shared memory for a thread's first, second, ... planes, of rows or of columns: of so many numbers at most.
// Behind eight of them one place is left free, so that threads that write four each do not meet in the banks.
constexpr int kPlaces = 127, kMostNumbers = 112;
AIA_HOST_DEVICE constexpr int place_of(int number) { return number + number / 8; }

// How a clip is shared out. A group is the planes of some threads: kStagedPlanes vectors each, one in each run of
// kApart planes, which are whole vectors.
struct Groups {
  static constexpr int kApart = 4, kChannels = kApart * kStagedPlanes;

  Volume<float> v;
  int across;          // threads of a group
  int groups = 0;      // of a block; 0 where none fits
  int of_clip, tiles;  // groups and blocks of a clip
  int threads = 0;     // of a block
  Divisor by_tiles, by_across, by_plane, by_row, by_rows, by_columns;

  explicit Groups(const Shape& shape)
      : v(shape), across(v.H * v.W), of_clip(v.O / kChannels), by_plane(v.H * v.W), by_row(v.W) {
    // Takes the number that ends first: a multiprocessor shares its time among its blocks.
    int64_t least = INT64_MAX;
    for (int n = 1; n <= of_clip && n * kApart * std::max(v.H, v.W) <= kMostNumbers; ++n) {
      const int needed = std::max({n * across, n * kApart * (v.H + v.W), v.H * v.W + 3});
      if (needed > kStagedThreads) break;
      const int64_t rounds = ceil_div(shape.B * ceil_div(of_clip, n), kMultiprocessors);
      // A warp that only helps to bring numbers has an eighth to do.
      const int warps = ceil_div(needed, 32), duration = warps + 7 * ceil_div(n * across, 32);
      if (rounds * duration < least) least = rounds * duration, groups = n, threads = 32 * warps;
    }
    if (groups == 0) return;
    tiles = ceil_div(of_clip, groups);
    by_tiles = Divisor(tiles), by_across = Divisor(across);
    by_rows = Divisor(kApart * v.W), by_columns = Divisor(kApart * v.H);
  }
};

// Where a thread stands, as walk.cuh has it: a vector in each of its planes. x alone moves with the frames.
struct StagedWalk {
  static constexpr int kApart = Groups::kApart;

  const Volume<float>& v;
  Position p{};
  Places first{}, frame{};
  int next, in_plane = 0;  // from plane to plane; the first element of the first vector
  bool there;

  __device__ __forceinline__ StagedWalk(const Groups& at, int group, int vector, bool there)
      : v(at.v), next(kApart * at.v.H * at.v.W), there(there) {
    p.o = group * Groups::kChannels;
    first.x = p.o * v.H * v.W + 4 * vector;
    p.w = 4 * vector;
    p.o += at.by_plane.divide(p.w);
    in_plane = p.w;
    p.h = at.by_row.divide(p.w);
    frame.x = v.stride_t();
    opaque(next), opaque(frame.x);
  }
  __device__ __forceinline__ bool has_vectors() const { return there; }
  __device__ __forceinline__ Places of_vector(int r) const {
    Places here{first.x + r * next, 0, 0, 0, 0};
    if (r > 0) opaque(here.x);
    return here;
  }
  __device__ __forceinline__ void move() {
    ++p.t, first.x += frame.x;
    opaque(first.x);
  }
};

// What is known of a row, of a column or of an element of a frame: gate, maximum, mean and index; of recalibrate the
// gate. An index of a byte fills its word, so that any byte of it can be compared.
template <bool kUnpools>
using Known = Vector<uint32_t, kUnpools ? 4 : 1>;

// The maps of a clip, of one context.
template <bool kUnpools>
struct ClipMaps {
  const float* gates;
  ClipGradients<float> gradients;

  __device__ __forceinline__ ClipMaps(const GateField<float>& gate, const UnpooledField<float>& field, int64_t clip,
                                      int packed)
      : gates(gate.maps + clip * packed) {
    opaque(gates);
    if constexpr (kUnpools) gradients = ClipGradients<float>(field, clip, packed);
  }
};

// What a thread brings into shared memory of each frame: four numbers of the map over H or of that over W.
template <bool kUnpools>
struct Brought {
  bool wanted;
  int k, step;  // in the map, and from frame to frame
  int place;
  Vector<float, 4> gate{};
  MapGradient<float, uint8_t, 4, false> gradient{};

  __device__ __forceinline__ Brought(const Groups& at, int first_group, int groups) {
    constexpr int kApart = Groups::kApart, kChannels = Groups::kChannels;
    const Volume<float>& v = at.v;
    int number = threadIdx.x;
    const bool of_rows = number < groups * kApart * v.W;
    if (!of_rows) number -= groups * kApart * v.W;
    const int length = of_rows ? v.W : v.H;
    wanted = of_rows || number < groups * kApart * v.H;
    number *= 4;
    step = v.O * length;
    k = v.O * v.H * v.W + (of_rows ? 0 : v.O * v.T * v.W) + first_group * kChannels * length + number;
    opaque(step);
    const int run = (of_rows ? at.by_rows : at.by_columns).divide(number), group = run / kStagedPlanes;
    place = (of_rows ? 0 : kStagedPlanes * kPlaces) + run % kStagedPlanes * kPlaces +
            place_of(group * kApart * length + number);
  }
  // Those of the next frame.
  __device__ __forceinline__ void load(const ClipMaps<kUnpools>& maps, bool is_there) {
    if (wanted && is_there) {
      gate = load_vector<4>(maps.gates + k);
      if constexpr (kUnpools) gradient.load(maps.gradients, k);
    }
    k += step;
    opaque(k);
  }
  __device__ __forceinline__ void store(Known<kUnpools>* buffer) const {
    if (!wanted) return;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      Known<kUnpools> known;
      known.at[0] = bits_as<uint32_t>(gate.at[j]);
      if constexpr (kUnpools) {
        known.at[1] = bits_as<uint32_t>(gradient.maximum.at[j]);
        known.at[2] = bits_as<uint32_t>(gradient.mean.at[j]);
        known.at[3] = byte_everywhere(gradient.argmax.words[0], j);
      }
      buffer[place + j] = known;
    }
  }
};

// The field over C at the vectors of a thread. A block brings its numbers into shared memory a frame ahead, a thread
// one element of the plane, and behind the last those that a vector meets in the next plane, where a channel's index is
// one less.
struct OverChannels {
  ClipMaps<true> maps;
  Vector<float, 4> gate{}, mean{}, maximum{};
  int chosen[4]{};  // of the channel of the thread's first element
  int places[4];
  int cell;  // the one that is brought
  Known<true> brought{};

  __device__ __forceinline__ OverChannels(const GateField<float>& gate, const UnpooledField<float>& field, int64_t clip,
                                          const StagedWalk& walk)
      : maps(gate, field, clip, walk.v.packed(kChannel)), cell(threadIdx.x) {
    if (cell >= walk.v.H * walk.v.W) cell -= walk.v.H * walk.v.W;
#pragma unroll
    for (int j = 0; j < 4; ++j) places[j] = place_of(walk.in_plane + j);
  }
  // Those of the next frame.
  __device__ __forceinline__ void load(const Volume<float>& v, bool is_there) {
    const int plane = v.H * v.W, mine = static_cast<int>(threadIdx.x);
    if (is_there && mine < plane + 3) {
      MapGradient<float, ByteOrShort, 1, false> gradient;
      gradient.load(maps.gradients, cell);
      brought = {bits_as<uint32_t>(maps.gates[cell]), bits_as<uint32_t>(gradient.maximum.at[0]),
                 bits_as<uint32_t>(gradient.mean.at[0]), gradient.argmax.words[0] - (mine >= plane)};
    }
    cell += plane;
    opaque(cell);
  }
  __device__ __forceinline__ void store(Known<true>* buffer) const { buffer[place_of(threadIdx.x)] = brought; }
  // The numbers of a frame.
  __device__ __forceinline__ void take(const StagedWalk& walk, const Known<true>* buffer) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Known<true> known = buffer[places[j]];
      gate.at[j] = bits_as<float>(known.at[0]);
      maximum.at[j] = bits_as<float>(known.at[1]);
      mean.at[j] = bits_as<float>(known.at[2]) * walk.v.per_c;
      chosen[j] = static_cast<int>(known.at[3]) - walk.p.o;
    }
  }
  __device__ __forceinline__ bool holds(int r, int j) const { return chosen[j] == r * StagedWalk::kApart; }
};

// None.
struct NoChannels {
  template <class... Any>
  __device__ __forceinline__ explicit NoChannels(const Any&...) {}
  template <class... Any>
  __device__ __forceinline__ void load(const Any&...) const {}
  template <class... Any>
  __device__ __forceinline__ void store(const Any&...) const {}
  template <class... Any>
  __device__ __forceinline__ void take(const Any&...) const {}
};

// The field over T, H and W at the vectors of a thread: what is kept of the map over T, and where the others' numbers
// lie.
template <bool kUnpools>
struct OverSpacetime {
  static constexpr int kSize = static_cast<int>(sizeof(Known<kUnpools>));
  Vector<float, 4> gate[kStagedPlanes];
  MapGradient<float, uint8_t, 4, false> gradient[kStagedPlanes];
  int over_h[4], over_w[4];   // in bytes
  int rows = 0, columns = 0;  // a byte for each element

  __device__ __forceinline__ OverSpacetime(const ClipMaps<kUnpools>& maps, const StagedWalk& walk, int group) {
    const Volume<float>& v = walk.v;
#pragma unroll
    for (int r = 0; r < kStagedPlanes; ++r) {
      const int k = walk.of_vector(r).x;  // as in frame 0
      gate[r] = load_vector<4>(maps.gates + k);
      if constexpr (kUnpools) gradient[r].load(maps.gradients, k);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        gate[r].at[j] *= 1.0f / 3;
        if constexpr (kUnpools) gradient[r].mean.at[j] *= v.per_t;
      }
    }
    constexpr int kChannels = StagedWalk::kApart;
    int h = walk.p.h, w = walk.p.w, channel = group * kChannels + walk.p.o % kChannels;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      over_h[j] = kSize * place_of(channel * v.W + w);
      over_w[j] = kSize * (kStagedPlanes * kPlaces + place_of(channel * v.H + h));
      rows |= h << 8 * j, columns |= w << 8 * j;
      if (++w == v.W) w = 0, ++h;
      if (h == v.H) h = 0, ++channel;
    }
    opaque(rows), opaque(columns);
  }
  // The gate, and what is unpooled, at an element of a vector, in this frame's buffer.
  __device__ __forceinline__ void of_element(const StagedWalk& walk, const unsigned char* buffer, int r, int j,
                                             float& of_gate, float& unpooled) const {
    const auto known = [&](int at) { return reinterpret_cast<const Known<kUnpools>*>(buffer + at)[r * kPlaces]; };
    const Known<kUnpools> h = known(over_h[j]), w = known(over_w[j]);
    of_gate = (bits_as<float>(h.at[0]) + bits_as<float>(w.at[0])) * (1.0f / 3) + gate[r].at[j];
    if constexpr (kUnpools) {
      const uint32_t mine = 0xffu << 8 * j, row = static_cast<uint32_t>(rows), column = static_cast<uint32_t>(columns);
      unpooled = bits_as<float>(h.at[2]) * walk.v.per_h + gradient[r].mean.at[j];
      unpooled += bits_as<float>(w.at[2]) * walk.v.per_w;
      if (gradient[r].argmax.holds(j, gradient[r].argmax.pattern(walk.p.t))) unpooled += gradient[r].maximum.at[j];
      if (((h.at[3] ^ row) & mine) == 0) unpooled += bits_as<float>(h.at[1]);
      if (((w.at[3] ^ column) & mine) == 0) unpooled += bits_as<float>(w.at[1]);
    }
  }
};

// A call, as a kernel takes it.
struct StagedCall {
  Groups at;
  GateField<float> gate, of_channels;
  UnpooledField<float> unpooled, unpooled_channels;
};

// What lies in shared memory before x: the numbers of two frames.
template <class Field>
struct Buffers {
  static constexpr int kNumbers = 2 * kStagedPlanes * kPlaces, kCells = Field::kOverC ? place_of(kStagedThreads) : 0;
  static constexpr int kBytes = 2 * (kNumbers * static_cast<int>(sizeof(Known<Field::kUnpools>)) + kCells * 16);
};

// Element j of the r-th vector: value, with the gate field and the unpooled one of the spacetime maps.
template <class Field, class OverC>
__device__ __forceinline__ float staged_element(const OverC& over_c, int r, int j, float value, float gate,
                                                float unpooled) {
  if constexpr (Field::kOverC && Field::kOuter) {
    float result = over_c.gate.at[j] * unpooled + over_c.mean.at[j];
    if (over_c.holds(r, j)) result += over_c.maximum.at[j];
    return value * gate + result;
  } else if constexpr (Field::kOverC) {
    const float inner = over_c.holds(r, j) ? over_c.mean.at[j] + over_c.maximum.at[j] : over_c.mean.at[j];
    return value * over_c.gate.at[j] + (gate * inner + unpooled);
  } else {
    return Field::kUnpools ? value * gate + unpooled : value * gate;
  }
}

template <class T, class Field>
__global__ void __launch_bounds__(kStagedThreads, 2)
    staged_kernel(StagedCall call,
                  const T* __restrict__ grad_y,  // [B, T, C, H, W] in its order of storage
                  T* __restrict__ grad_x) {      // as grad_y
  using Frames = Ahead<T, 4, kStagedPlanes, kStagedThreads>;
  using In = Buffers<Field>;
  constexpr bool kUnpools = Field::kUnpools;
  AIA_DYNAMIC_SHARED(unsigned char, shared);
  auto* const known = reinterpret_cast<Known<kUnpools>*>(shared);
  auto* const cells = reinterpret_cast<Known<true>*>(shared + 2 * In::kNumbers * sizeof(Known<kUnpools>));
  const Groups& at = call.at;
  const Volume<float>& v = at.v;

  int tile = blockIdx.x;
  const int64_t clip = at.by_tiles.divide(tile);
  const int first = tile * at.groups, groups = min(at.groups, at.of_clip - first);
  int vector = threadIdx.x;
  const int group = at.by_across.divide(vector);
  // A thread without vectors stands where the first does, and helps to bring numbers.
  const bool there = group < groups;
  int first_of_warp = threadIdx.x / 32 * 32;
  const bool warp_has_vectors = at.by_across.divide(first_of_warp) < groups;
  StagedWalk walk(at, there ? first + group : first, there ? vector : 0, there);
  const T* from = grad_y + clip * v.size();
  T* to = grad_x + clip * v.size();
  opaque(from), opaque(to);
  const ClipMaps<kUnpools> maps(call.gate, call.unpooled, clip, v.packed(kSpacetime));
  Brought<kUnpools> brought(at, first, groups);
  brought.load(maps, true);
  std::conditional_t<Field::kOverC, OverChannels, NoChannels> over_c(call.of_channels, call.unpooled_channels, clip,
                                                                     walk);
  over_c.load(v, true);
  const Frames ahead(from, reinterpret_cast<typename Frames::Place*>(shared + In::kBytes));
  ahead.begin(walk);
  const OverSpacetime<kUnpools> field(maps, walk, there ? group : 0);
  const auto bring = [&](int t) {
    brought.store(known + t % 2u * In::kNumbers);
    brought.load(maps, t + 1 < v.T);
    over_c.store(cells + t % 2u * In::kCells);
    over_c.load(v, t + 1 < v.T);
  };
  bring(0);
#pragma unroll 1
  for (; walk.p.t < v.T; walk.move()) {
    // This frame's numbers are here, and all threads have met those whose places the next ones take.
    __syncthreads();
    bring(walk.p.t + 1);
    issue_in_order();
    ahead.wait();
    if (warp_has_vectors) {
      const unsigned char* const buffer = shared + walk.p.t % 2u * (In::kNumbers * sizeof(Known<kUnpools>));
      over_c.take(walk, cells + walk.p.t % 2u * In::kCells);
#pragma unroll
      for (int r = 0; r < kStagedPlanes; ++r) {
        issue_in_order();
        const Vector<float, 4> values = widened(ahead.of_vector(walk, r));
        Vector<T, 4> stored;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float gate, result = 0;
          field.of_element(walk, buffer, r, j, gate, result);
          stored.at[j] = narrow<T>(staged_element<Field>(over_c, r, j, values.at[j], gate, result));
        }
        if (there) store_vector(to + walk.of_vector(r).x, stored);
      }
    }
    ahead.ask(walk);
  }
}

template <class T, class Field>
int run_staged(const Shape& shape, const void* grad_y, const StagedFields& of, void* grad_x, void* stream) {
  const StagedCall call{Groups(shape), GateField<float>(of.gate), GateField<float>(of.channel_gate),
                        UnpooledField<float>(of.unpooled), UnpooledField<float>(of.channel_unpooled)};
  if (call.at.groups == 0) return -1;
  using Frames = Ahead<T, 4, kStagedPlanes, kStagedThreads>;
  const int bytes = Buffers<Field>::kBytes + Frames::kPlaces * static_cast<int>(sizeof(typename Frames::Place));
  return launch(staged_kernel<T, Field>, shape.B * call.at.tiles, BlockSize{call.at.threads, bytes}, stream, call,
                static_cast<const T*>(grad_y), static_cast<T*>(grad_x));
}

template <class T>
int of_fields(const Shape& shape, const void* grad_y, const StagedFields& of, void* grad_x, void* stream) {
  if constexpr (sizeof(T) <= 4) {
    if (of.unpooled.context == kNone) return run_staged<T, GateOfX>(shape, grad_y, of, grad_x, stream);
    if (of.channel_gate.context == kNone) return run_staged<T, Alone>(shape, grad_y, of, grad_x, stream);
    return of.outer ? run_staged<T, Outer>(shape, grad_y, of, grad_x, stream)
                    : run_staged<T, Inner>(shape, grad_y, of, grad_x, stream);
  }
  return -1;
}

}  // namespace

int unpool_staged(const Shape& shape, const void* grad_y, const StagedFields& of, void* grad_x, void* stream) {
  // Of rows of even length unpool's own pairs take fewer turns of L1. Four neighbours should lie in two planes at most.
  if (shape.order != Order::kTCHW || shape.W % 2 == 0 || shape.H * shape.W < 3) return -1;
  if (shape.B == 0 || shape.T == 0 || shape.C == 0 || shape.C % Groups::kChannels != 0) return -1;
  if (of.unpooled.index_bytes > 1 || of.channel_unpooled.index_bytes > 2) return -1;
  const bool aligned = are_aligned({grad_y, grad_x, of.gate.maps, of.unpooled.grad, of.unpooled.argmax,
                                    of.channel_gate.maps, of.channel_unpooled.grad, of.channel_unpooled.argmax});
  if (!aligned) return -1;
  return with_scalar(shape.scalar,
                     [&](auto type) { return of_fields<decltype(type)>(shape, grad_y, of, grad_x, stream); });
}

}  // namespace aia::cuda
