// What the CPU passes look like from outside: plain pointers and sizes, no torch header.
//
// A struct of function pointers, such as PoolPasses, is the table of the passes of one source. The source is compiled
// once per instruction level (base, v3 and v4; base alone outside x86). It defines the tables of that level, one for
// each Scalar that x may have. A new pass is declared in its struct, defined in the source, and entered in the table at
// the end of the source.
//
// Each pass does the units [begin, end). Units are independent, and their number does not depend on the number of
// threads, so results do not either. x, y and their gradients are stored as Volume says; packed maps have the type in
// which x accumulates (Accumulate in lanes.h).
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
  int64_t lanes;       // of a vector, at the level in force: the tables of passes tell
  int64_t blocks = 1;  // of channels, a vector wide, in a unit of a reduction over space and time

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

constexpr int kScalars = 4;
// Elements of a tile: two buffers of 16 KiB of floats stay in the L1 cache. A reduction has accumulators three times as
// large besides, so its tiles are half as large.
constexpr int64_t kTileElements = 4096, kReductionElements = 2048;
inline int64_t tile_vectors(const Volume& x) { return kTileElements / x.lanes; }
inline int64_t reduction_vectors(const Volume& x) { return kReductionElements / x.lanes; }

// Rows of a plane in one tile of so many positions, and blocks of lanes along the channels of x.
inline int64_t tile_rows(const Volume& x, int64_t positions) {
  const int64_t rows = std::clamp<int64_t>(positions / x.W, 1, x.H);
  return rows < x.H && rows > 4 ? rows / 4 * 4 : rows;  // the reductions walk four rows side by side
}
inline int64_t channel_blocks(const Volume& x) { return (x.C + x.lanes - 1) / x.lanes; }

// Channels whose spacetime maps share cache lines: the elementwise passes meet them frame by frame.
constexpr int64_t kLineChannels = 16;
inline int64_t line_groups(const Volume& x) { return (x.C + kLineChannels - 1) / kLineChannels; }

// Where channels lie side by side, a tile takes as many blocks of them as it can: memory is met in order, in long
// pieces. A reduction over space and time has an accumulator for each, and takes x.blocks.
inline bool channels_side_by_side(const Volume& x) { return x.stride_c == 1 && x.C > 1; }
inline int64_t tile_blocks(const Volume& x) {
  return channels_side_by_side(x) ? std::clamp<int64_t>(tile_vectors(x) / x.W, 1, channel_blocks(x)) : 1;
}

// Whether a pass that meets maps of contexts up to `highest` runs its lanes along positions instead of channels: it
// meets no spacetime map, and the positions lie adjacent in planes of at least a vector.
inline bool lanes_along_positions(const Volume& x, int highest) {
  return highest <= kChannel && x.stride_c != 1 && x.H * x.W >= x.lanes;
}

// Rows of a frame in one unit of a pass that meets all its channels. Along positions each channel is one run:
// the hardware prefetches long runs better, and the accumulators of a run stay in the L1 cache.
constexpr int64_t kRunPositions = 1024;
inline int64_t unit_rows(const Volume& x, int highest) {
  if (lanes_along_positions(x, highest)) return std::clamp<int64_t>(kRunPositions / x.W, 1, x.H);
  return tile_rows(x, channels_side_by_side(x) ? tile_vectors(x) / tile_blocks(x) : reduction_vectors(x));
}
inline int64_t row_units(const Volume& x, int highest) {
  return x.B * x.T * ((x.H + unit_rows(x, highest) - 1) / unit_rows(x, highest));
}

// Units of a pass over x that meets maps of contexts up to `highest`. Where it reduces over channels: rows of every
// frame. Over space and time: x.blocks blocks of channels of every clip. Elementwise: rows of every frame where
// channels lie side by side, blocks of channels of every frame with lanes along positions, else groups of every clip.
inline int64_t reduction_units(const Volume& x, int context, int highest) {
  return context == kChannel ? row_units(x, highest) : x.B * ((channel_blocks(x) + x.blocks - 1) / x.blocks);
}
inline int64_t elementwise_units(const Volume& x, int highest) {
  if (channels_side_by_side(x)) return row_units(x, highest);
  return lanes_along_positions(x, highest) ? x.B * x.T * channel_blocks(x) : x.B * line_groups(x);
}

struct PoolPasses {
  static const PoolPasses base[kScalars], v3[kScalars], v4[kScalars];

  int lanes;
  void (*pool)(const Volume&, const void* x, const Gate&, int context,
               void* pooled,  // [B, 2, M]: maximum, mean
               void* argmax,  // [B, M], of index_bytes each
               int index_bytes, int64_t begin, int64_t end);
  void (*unpool)(const Volume&, const void* grad_y, const Gate&, const Unpooled&, const Gate& inner_gate,
                 const Unpooled& inner, void* grad_x, int64_t begin, int64_t end);
  void (*unpool_reduce)(const Volume&, const void* x, const Unpooled&, int gate_context,
                        void* grad_gate,  // [B, M]
                        int64_t begin, int64_t end);
};

struct RecalibratePasses {
  static const RecalibratePasses base[kScalars], v3[kScalars], v4[kScalars];

  int lanes;
  void (*recalibrate)(const Volume&, const void* x, const Gate&, void* y, int64_t begin, int64_t end);
  void (*recalibrate_reduce)(const Volume&, const void* grad_y, const void* x, int context,
                             void* grad_gate,  // [B, M]
                             int64_t begin, int64_t end);
};

// Doubles of partial results per slab: count, mean and sum of squared deviations; two sums; the weight's gradient.
constexpr int kMomentPartials = 3, kNormPartials = 2, kWeightPartials = 54;

// On n packed maps of type A, float or double: pooled and its gradient [B, 2, M], z, gate and its gradient [B, M],
// weight [n, 54], norm [n, 4], correction [n, 2], partial [slabs, as above]. A unit is a slab.
template <class A>
struct GatePasses {
  static const GatePasses base, v3, v4;

  void (*conv)(const PackedDims&, const A* pooled, const A* weight, A* z, double* partial, int64_t begin, int64_t end);
  void (*activate)(const PackedDims&, const A* z, const A* norm, A* gate, int64_t begin, int64_t end);
  void (*conv_activate)(const PackedDims&, const A* pooled, const A* weight, const A* norm, A* z, A* gate,
                        int64_t begin, int64_t end);
  void (*backward_reduce)(const PackedDims&, const A* grad_gate, const A* z, const A* norm, double* partial,
                          int64_t begin, int64_t end);
  void (*backward)(const PackedDims&, const A* grad_gate, const A* z, const A* norm, const A* correction,
                   const A* pooled, const A* weight, A* grad_pooled, double* partial, int64_t begin, int64_t end);
};

}  // namespace aia::cpu
