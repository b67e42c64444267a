// The inner gate of STinC2 (aia_kernels/schemas.py has the equations): maps over T, H and W, each averaged over C.
//
//   average_gate        reads the maps, some of them once for each block of positions
//   average_gate_back   writes the maps
//
// A map is seen as positions (a, b), the two axes that it has beside C, with C elements each.
#include <numeric>

#include "passes.h"
#include "teams.cuh"
#include "vector.cuh"

namespace aia::cuda {
namespace {

constexpr int kThreads = 512;

// The maps over T [H, W], over H [T, W] and over W [T, H] of a clip, with C in the place where the order has it.
struct GateMaps {
  int T, C, H, W;
  int64_t packed;
  struct Map {
    int64_t start, a, b, c;  // where it begins, and the strides of its axes
  } at[3];

  // Chosen without an address, which would take the maps from the kernel's parameters to local memory.
  __device__ __forceinline__ Map of(int map) const { return map == 0 ? at[0] : map == 1 ? at[1] : at[2]; }

  explicit GateMaps(const Shape& s) : T(s.T), C(s.C), H(s.H), W(s.W) {
    const int64_t lengths[3][2] = {{H, W}, {T, W}, {T, H}};
    int64_t start = 0;
    for (int m = 0; m < 3; ++m) {
      const auto [a, b] = lengths[m];
      if (s.order == Order::kTHWC)
        at[m] = {start, b * C, C, 1};
      else if (s.order == Order::kCTHW || m == 0)
        at[m] = {start, b, 1, a * b};
      else
        at[m] = {start, C * b, 1, b};
      start += a * b * C;
    }
    packed = start;
  }
};

// A box of the result that a block makes of the means at its (h, w), (t, w) and (t, h).
struct Box {
  static constexpr int kT = 16, kH = 16, kW = 64, kMeans = kH * kW + kT * kW + kT * kH;
  int t, h, w;                 // lengths
  int over_t, over_h, over_w;  // boxes along each axis

  Box(const GateMaps& maps, int64_t B) : t(std::min(maps.T, kT)), h(std::min(maps.H, kH)), w(std::min(maps.W, kW)) {
    over_t = ceil_div(maps.T, t), over_w = ceil_div(maps.W, w);
    // Low boxes for many blocks; the lower they are, the more often the means at (t, w) are made.
    constexpr int kBlocks = kMultiprocessors / 2 + 1;
    const int wanted = std::max<int>(1, static_cast<int>(kBlocks / (B * over_t * over_w)));
    h = std::min(h, std::max(1, maps.H / wanted));
    over_h = ceil_div(maps.H, h);
  }
  int blocks() const { return over_t * over_h * over_w; }
};

// A position of one of three maps with lengths [a, b], from its number among those of all three.
struct Position {
  int map, a, b;

  __device__ __forceinline__ Position(int number, int t, int h, int w) {
    map = number < h * w ? 0 : number < (h + t) * w ? 1 : 2;
    const int width = map == 2 ? h : w;
    number -= map == 0 ? 0 : map == 1 ? h * w : (h + t) * w;
    a = number / width, b = number - a * width;
  }
};

// Threads have a position together, `lanes` of them, which share its channels: side by side where channels lie side by
// side, else `positions` threads apart.
template <class A, bool kChannelsInside>
__global__ void __launch_bounds__(kThreads, 1) average_kernel(GateMaps maps, Box box, int lanes,
                                                              const A* __restrict__ gate,  // [B, M]
                                                              A* __restrict__ to) {        // [B, T, H, W]
  AIA_SHARED(A, means, Box::kMeans);
  AIA_SHARED(A, parts, kThreads);
  const int blocks = box.over_t * box.over_h * box.over_w, b = blockIdx.x / blocks;
  int rest = blockIdx.x % blocks;
  const int w0 = rest % box.over_w * box.w;
  rest /= box.over_w;
  const int h0 = rest % box.over_h * box.h, t0 = rest / box.over_h * box.t;
  const int t = min(box.t, maps.T - t0), h = min(box.h, maps.H - h0), w = min(box.w, maps.W - w0);
  const int count = h * w + t * w + t * h, positions = kThreads / lanes;
  const int lane = kChannelsInside ? threadIdx.x % lanes : threadIdx.x / positions;
  const int own = kChannelsInside ? threadIdx.x / lanes : threadIdx.x % positions;
  gate += b * maps.packed;

  for (int first = 0; first < count; first += positions) {
    A sum = 0;
    if (first + own < count) {
      const Position p(first + own, t, h, w);
      const GateMaps::Map map = maps.of(p.map);
      const int a = p.a + (p.map == 0 ? h0 : t0), side = p.b + (p.map == 2 ? h0 : w0);
      const A* const from = gate + map.start + a * map.a + side * map.b;
#pragma unroll 8
      for (int c = lane; c < maps.C; c += lanes) sum += from[c * map.c];
    }
    if constexpr (kChannelsInside) {
      sum = team_sum(sum, lanes);
      if (lane == 0 && first + own < count) means[first + own] = sum;
    } else if (lanes == 1) {
      if (first + own < count) means[first + own] = sum;
    } else {  // all positions at once
      parts[threadIdx.x] = sum;
      __syncthreads();
      if (threadIdx.x < count) {
        for (int k = 1; k < lanes; ++k) sum += parts[k * positions + threadIdx.x];
        means[threadIdx.x] = sum;
      }
    }
  }
  __syncthreads();
  const A factor = A(1) / (3 * A(maps.C));
  to += int64_t{b} * maps.T * maps.H * maps.W;
  for (int e = threadIdx.x; e < t * h * w; e += kThreads) {
    const int x = e % w, y = e / w % h, z = e / w / h;
    const A total = means[y * w + x] + means[h * w + z * w + x] + means[(h + t) * w + z * h + y];
    to[(int64_t{t0 + z} * maps.H + h0 + y) * maps.W + w0 + x] = total * factor;
  }
}

// As before; a thread writes every `lanes`-th channel of its position.
template <class A, bool kChannelsInside>
__global__ void __launch_bounds__(kThreads, 1) spread_kernel(GateMaps maps, int lanes, int blocks,
                                                             const A* __restrict__ grad,  // [B, T, H, W]
                                                             A* __restrict__ to) {        // [B, M]
  const int b = blockIdx.x / blocks, positions = kThreads / lanes, T = maps.T, H = maps.H, W = maps.W;
  const int lane = kChannelsInside ? threadIdx.x % lanes : threadIdx.x / positions;
  const int own = kChannelsInside ? threadIdx.x / lanes : threadIdx.x % positions;
  const int number = blockIdx.x % blocks * positions + own;
  if (own >= positions || number >= H * W + T * W + T * H) return;
  const Position p(number, T, H, W);
  const GateMaps::Map map = maps.of(p.map);
  const int length = p.map == 0 ? T : p.map == 1 ? H : W, step = p.map == 0 ? H * W : p.map == 1 ? W : 1;
  const int64_t frame = int64_t{b} * T + (p.map == 0 ? 0 : p.a);
  const A* const from = grad + frame * H * W + (p.map == 0 ? p.a * W + p.b : p.map == 1 ? p.b : p.b * W);
  A sum = 0;
#pragma unroll 8
  for (int k = 0; k < length; ++k) sum += from[int64_t{k} * step];
  sum *= A(1) / (3 * A(maps.C));
  A* const out = to + b * maps.packed + map.start + p.a * map.a + p.b * map.b;
#pragma unroll 4
  for (int c = lane; c < maps.C; c += lanes) out[c * map.c] = sum;
}

// Calls body with a value of the type of the maps, and whether channels lie side by side.
template <class Body>
int with_maps(const Shape& s, Body&& body) {
  const auto of = [&](auto value) {
    return s.order == Order::kTHWC ? body(value, std::true_type{}) : body(value, std::false_type{});
  };
  return s.scalar == Scalar::kFloat64 ? of(double{}) : of(float{});
}

}  // namespace

int average_gate(const Shape& s, const void* gate, void* averaged, void* stream) {
  const GateMaps maps(s);
  const Box box(maps, s.B);
  const int count = box.h * box.w + box.t * box.w + box.t * box.h;
  return with_maps(s, [&](auto value, auto inside) {
    using A = decltype(value);
    // Eight channels for a thread, or as many threads as there are for few positions.
    const int lanes = inside ? std::min(1 << bits_of(ceil_div(s.C, 8)), kWarp) : std::max(1, kThreads / count);
    return launch(average_kernel<A, inside.value>, s.B * box.blocks(), kThreads, stream, maps, box, lanes,
                  static_cast<const A*>(gate), static_cast<A*>(averaged));
  });
}

int average_gate_back(const Shape& s, const void* grad, void* spread, void* stream) {
  const GateMaps maps(s);
  return with_maps(s, [&](auto value, auto inside) {
    using A = decltype(value);
    const int lanes = inside ? std::min(1 << bits_of(s.C), kWarp) : std::min(1 << bits_of(ceil_div(s.C, 8)), 16);
    const int blocks = ceil_div(s.H * s.W + s.T * s.W + s.T * s.H, kThreads / lanes);
    return launch(spread_kernel<A, inside.value>, s.B * blocks, kThreads, stream, maps, lanes, blocks,
                  static_cast<const A*>(grad), static_cast<A*>(spread));
  });
}

}  // namespace aia::cuda
