// What the CPU passes look like from outside: plain pointers and sizes, no torch header.
//
// A struct of function pointers, such as PoolPasses, is the table of the passes of one source. The source is compiled
// once per instruction level (base, v3 and v4; base alone outside x86). It defines the tables of that level, one for
// each Scalar that x may have. A new pass is declared in its struct, defined in the source, and entered in the table at
// the end of the source.
//
// Each pass does the units [begin, end). Units are independent, and their number does not depend on the number of
// threads, so results do not either. x, y and their gradients are stored as Volume says; packed maps have the type in
// which x accumulates (Accumulate in lane_memory.h).
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
  // [T, H, C] where channels lie side by side, else [C, H, W], [T, C, W] and [T, C, H].
  int64_t packed(int context) const {
    return context == kChannel ? T * H * W : context == kSpacetime ? map_t() + map_h() + map_w() : 0;
  }
};

// Units of the gate passes, of one map of one clip: whole slabs of the outermost axis or, where slabs are large, rows
// of a few of them, of about so many elements. A unit meets its neighbours too, so it is no thin slice.
constexpr int64_t kBoxElements = 16384, kBoxSlabs = 16;
struct UnitSize {
  int64_t slabs, rows;
};
inline UnitSize unit_size(const PackedDims& maps, int map) {
  const int64_t* dims = maps.dims[map];
  const int64_t slabs = std::min(dims[0], std::max(kBoxSlabs, kBoxElements / (dims[1] * dims[2])));
  return {slabs, std::clamp<int64_t>(kBoxElements / (slabs * dims[2]), std::min<int64_t>(dims[1], 8), dims[1])};
}
inline int64_t map_units(const PackedDims& maps, int map) {  // of one clip
  const UnitSize unit = unit_size(maps, map);
  return (maps.dims[map][0] + unit.slabs - 1) / unit.slabs * ((maps.dims[map][1] + unit.rows - 1) / unit.rows);
}
inline int64_t clip_units(const PackedDims& maps) {
  int64_t sum = 0;
  for (int i = 0; i < maps.n; ++i) sum += map_units(maps, i);
  return sum;
}
inline int64_t gate_units(const PackedDims& maps) { return maps.B * clip_units(maps); }

constexpr int kScalars = 4;

// Where channels lie side by side, lanes are channels; elsewhere the positions of a plane do, and lanes are positions.
inline bool channels_side_by_side(const Volume& x) { return x.stride_p != 1; }
inline int64_t channel_blocks(const Volume& x) { return (x.C + x.lanes - 1) / x.lanes; }

// Elements of a tile of channels: two buffers of 16 KiB of floats stay in the L1 cache. A reduction has accumulators
// three times as large besides, so its tiles are half as large.
constexpr int64_t kTileElements = 4096, kReductionElements = 2048;
inline int64_t tile_vectors(const Volume& x) { return kTileElements / x.lanes; }
inline int64_t reduction_vectors(const Volume& x) { return kReductionElements / x.lanes; }

// Rows of a plane in one tile of so many positions.
inline int64_t tile_rows(const Volume& x, int64_t positions) {
  const int64_t rows = std::clamp<int64_t>(positions / x.W, 1, x.H);
  return rows < x.H && rows > 4 ? rows / 4 * 4 : rows;  // the reductions walk four rows side by side
}

// A tile takes as many blocks of channels as it can: memory is met in order, in long pieces. A reduction over space and
// time has an accumulator for each, and takes x.blocks.
inline int64_t tile_blocks(const Volume& x) { return std::clamp<int64_t>(tile_vectors(x) / x.W, 1, channel_blocks(x)); }

// A tile of planes: rows of one plane, or whole planes of some channels, of about so many elements. Elementwise passes
// meet at least so many channels of a frame, which share the channel maps, and runs of at least so many elements.
constexpr int64_t kPlaneElements = 2048, kGroupChannels = 16, kGroupElements = 3136;
// Rows of up to so many elements, as many in every tile of a plane as in the others or one less.
inline int64_t even_rows(const Volume& x, int64_t elements) {
  const int64_t most = std::clamp<int64_t>(elements / x.W, 1, x.H), tiles = (x.H + most - 1) / most;
  return (x.H + tiles - 1) / tiles;
}
inline int64_t plane_rows(const Volume& x) { return even_rows(x, kPlaneElements); }
inline int64_t plane_channels(const Volume& x) { return std::clamp<int64_t>(kPlaneElements / (x.H * x.W), 1, x.C); }
inline int64_t group_channels(const Volume& x) {
  return std::max(kGroupChannels, kGroupElements / (x.H * x.W) / 2 * 2);  // rows of two channels may share a vector
}

// A reduction of planes over space and time meets a few frames at a time: an accumulator over T is loaded and stored
// once for all of them. The channels of a unit: runs of memory long enough for the hardware to foresee, and
// accumulators over T that stay in the L2 cache. Rows of two channels may share a vector.
constexpr int64_t kFrames = 2, kReducedUnitElements = 6272;
inline int64_t reduced_group(const Volume& x) {
  return std::max<int64_t>(2, kReducedUnitElements / (x.H * x.W) / 2 * 2);
}

// Rows of a frame in one unit of a pass that meets all its channels. Of planes: whole ones where their accumulators
// stay in the L2 cache, met in tiles of some rows and a few channels.
constexpr int64_t kRunPositions = 4096, kRunTilePositions = 1024;
constexpr int kRunChannels = 4;
inline int64_t unit_rows(const Volume& x) {
  if (channels_side_by_side(x)) return tile_rows(x, tile_vectors(x) / tile_blocks(x));
  return even_rows(x, kRunPositions);
}
inline int64_t run_rows(const Volume& x) { return std::min(unit_rows(x), even_rows(x, kRunTilePositions)); }
inline int64_t run_channels(const Volume& x) {
  return std::clamp<int64_t>(kPlaneElements / (x.H * x.W), std::min<int64_t>(kRunChannels, x.C), x.C);
}
inline int64_t row_units(const Volume& x) { return x.B * x.T * ((x.H + unit_rows(x) - 1) / unit_rows(x)); }

// Units of a reduction. Over channels: rows of every frame. Over space and time: the channels of a tile, of every clip.
inline int64_t reduction_units(const Volume& x, int context) {
  if (context == kChannel) return row_units(x);
  const int64_t channels = channels_side_by_side(x) ? x.blocks * x.lanes : reduced_group(x);
  return x.B * ((x.C + channels - 1) / channels);
}
// Units of an elementwise pass that meets maps of contexts up to `highest`: rows of every frame where channels lie side
// by side, else groups of channels of every frame or, as frames share the T maps, of every clip.
inline int64_t unit_frames(const Volume& x, int highest) { return highest == kSpacetime ? x.T : 1; }
inline int64_t elementwise_units(const Volume& x, int highest) {
  if (channels_side_by_side(x)) return row_units(x);
  return x.B * (x.T / unit_frames(x, highest)) * ((x.C + group_channels(x) - 1) / group_channels(x));
}

struct PoolPasses {
  static const PoolPasses base[kScalars], v3[kScalars], v4[kScalars];

  int lanes;
  void (*pool)(const Volume&, const void* x, const Gate&, int context,
               void* pooled,  // [B, 2, M]: maximum, mean
               void* argmax,  // [B, M], of index_bytes each; of 0, where nobody will read it, it is not written
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

// Doubles of partial results per unit: count, mean and sum of squared deviations; two sums; the weight's gradient.
constexpr int kMomentPartials = 3, kNormPartials = 2, kWeightPartials = 54;

// On n packed maps of type A, float or double: pooled and its gradient [B, 2, M], z, gate and its gradient [B, M],
// weight [n, 54], norm [n, 4], correction [n, 2], partial [B, clip_units, as above].
template <class A>
struct GatePasses {
  static const GatePasses base, v3, v4;

  void (*conv)(const PackedDims&, const A* pooled, const A* weight, A* z, double* partial, int64_t begin, int64_t end);
  void (*activate)(const PackedDims&, const A* z, const A* norm, A* gate, int64_t begin, int64_t end);
  void (*conv_activate)(const PackedDims&, const A* pooled, const A* weight, const A* norm, A* z, A* gate,
                        int64_t begin, int64_t end);
  // The gates may be known (null: not). Then the gradient of the sigmoids' arguments is stored too, in grad, which may
  // be grad_gate.
  void (*backward_reduce)(const PackedDims&, const A* grad_gate, const A* z, const A* gate, const A* norm, A* grad,
                          double* partial, int64_t begin, int64_t end);
  // grad: of the gates (of_gate), or of the sigmoids' arguments.
  void (*backward)(const PackedDims&, const A* grad, bool of_gate, const A* z, const A* norm, const A* correction,
                   const A* pooled, const A* weight, A* grad_pooled, double* partial, int64_t begin, int64_t end);
};

}  // namespace aia::cpu
