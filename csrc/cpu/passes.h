// What the CPU passes look like from outside: plain pointers and sizes, no torch header, one set of functions per
// instruction level. Each function does the units [begin, end) of its pass; units are independent and their number
// does not depend on the number of threads, so results do not either.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/packed.h"

namespace aia::cpu {

// x [B, T, C, H, W], stored so that the positions (h, w) of a plane are evenly spaced. Strides in elements.
struct Volume {
  int64_t B, T, C, H, W;
  int64_t stride_b, stride_t, stride_c, stride_p;
  Scalar scalar;

  int64_t map_t() const { return H * W * C; }
  int64_t map_h() const { return T * W * C; }
  int64_t map_w() const { return T * H * C; }
  // M, the elements per clip of the packed maps of a context. Spacetime maps are stored [H, W, C], [T, W, C] and
  // [T, H, C] whatever the order of x: their lanes are channels.
  int64_t packed(int context) const {
    return context == kChannel ? T * H * W : context == kSpacetime ? map_t() + map_h() + map_w() : 0;
  }
};

// Units of the passes that walk a map slab by slab: one slab of the outermost axis of one map of one clip.
inline int64_t slabs(const PackedDims& maps) {
  int64_t sum = 0;
  for (int i = 0; i < maps.n; ++i) sum += maps.B * maps.dims[i][0];
  return sum;
}

constexpr int kLanes = 16;
// Positions of a tile: two buffers of 16 KiB of float lanes stay in the L1 cache. A reduction keeps three times as much
// again in accumulators, so its tiles are half as large.
constexpr int64_t kTilePositions = 256, kReductionPositions = 128;

// Rows of a plane in one tile of x, and blocks of lanes along its channels.
inline int64_t tile_rows(const Volume& x, int64_t positions) {
  const int64_t rows = std::clamp<int64_t>(positions / x.W, 1, x.H);
  return rows < x.H && rows > 4 ? rows / 4 * 4 : rows;  // the reductions walk four rows side by side
}
inline int64_t channel_blocks(const Volume& x) { return (x.C + kLanes - 1) / kLanes; }

// Whether a pass that meets maps of contexts up to `highest` runs its lanes along positions instead of channels: it
// meets no spacetime map, and the positions lie adjacent in planes of at least a vector.
inline bool lanes_along_positions(const Volume& x, int highest) {
  return highest <= kChannel && x.stride_c != 1 && x.H * x.W >= kLanes;
}

// Rows of a frame in one unit of a reduction over channels. Along positions each channel is one run, the longer the
// better foreseen by the hardware; the accumulators of a run stay in the L1 cache.
constexpr int64_t kRunPositions = 1024;
inline int64_t unit_rows(const Volume& x, int highest) {
  return lanes_along_positions(x, highest) ? std::clamp<int64_t>(kRunPositions / x.W, 1, x.H)
                                           : tile_rows(x, kReductionPositions);
}

// Units of a pass over x that meets maps of contexts up to `highest`: runs of rows of every frame where it reduces over
// channels, blocks of channels of every clip where it reduces over space and time. An elementwise pass has the latter
// too, or, with lanes along positions, blocks of channels of every frame, which lie in one piece.
inline int64_t block_units(const Volume& x) { return x.B * channel_blocks(x); }
inline int64_t reduction_units(const Volume& x, int context, int highest) {
  const int64_t rows = unit_rows(x, highest);
  return context == kChannel ? x.B * x.T * ((x.H + rows - 1) / rows) : block_units(x);
}
inline int64_t elementwise_units(const Volume& x, int highest) {
  return block_units(x) * (lanes_along_positions(x, highest) ? x.T : 1);
}

#define AIA_DECLARE_CPU_PASSES(level)                                                                               \
  namespace level {                                                                                                 \
  void pool(const Volume&, const void* x, Gate, int context, void* pooled, void* argmax, int index_bytes, int64_t,  \
            int64_t);                                                                                               \
  void unpool(const Volume&, const void* grad_y, Gate, Unpooled, Gate inner_gate, Unpooled inner, void* grad_x,     \
              int64_t, int64_t);                                                                                    \
  void unpool_reduce(const Volume&, const void* x, Unpooled, int gate_context, void* grad_gate, int64_t, int64_t);  \
  void recalibrate(const Volume&, const void* x, Gate, void* y, int64_t, int64_t);                                  \
  void recalibrate_reduce(const Volume&, const void* grad_y, const void* x, int context, void* grad_gate, int64_t,  \
                          int64_t);                                                                                 \
  template <class A>                                                                                                \
  struct GatePasses {                                                                                               \
    static void conv(const PackedDims&, const A* pooled, const A* weight, A* z, double* partial, int64_t, int64_t); \
    static void activate(const PackedDims&, const A* z, const A* norm, A* gate, int64_t, int64_t);                  \
    static void backward_reduce(const PackedDims&, const A* grad_gate, const A* z, const A* norm, double* partial,  \
                                int64_t, int64_t);                                                                  \
    static void backward(const PackedDims&, const A* grad_gate, const A* z, const A* norm, const A* correction,     \
                         const A* pooled, const A* weight, A* grad_pooled, double* partial, int64_t, int64_t);      \
  };                                                                                                                \
  }

AIA_DECLARE_CPU_PASSES(base)
#ifdef AIA_CPU_X86
AIA_DECLARE_CPU_PASSES(v3)
AIA_DECLARE_CPU_PASSES(v4)
#endif

// Doubles of partial results per slab: count, mean and sum of squared deviations; two sums; the weight's gradient.
constexpr int kMomentPartials = 3, kNormPartials = 2, kWeightPartials = 54;

}  // namespace aia::cpu
