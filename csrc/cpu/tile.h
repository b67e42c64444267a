// Tiles of x where channels lie side by side: the positions of a few rows of one frame, a vector of channels wide or a
// few times that, held as [positions][blocks][channels of a vector]. Lanes are channels.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "lane_memory.h"
#include "passes.h"

namespace aia::cpu::AIA_CPU_LEVEL {

// Where a tile lies: rows [h, h + rows) of frame t of clip b, `blocks` blocks of channels from c on, the last of them
// with `lanes` channels. `ahead` is the distance in elements to the tile that will be read next: the hardware does not
// prefetch so many short runs at a time.
struct Tile {
  int64_t b, t, c, h, rows, blocks;
  int lanes;
  int64_t ahead = 0;

  int64_t positions(const Volume& x) const { return rows * x.W; }
  int64_t vectors(const Volume& x) const { return positions(x) * blocks; }
};

// The tile of up to `blocks` blocks from channel c on.
inline Tile tile_at(const Volume& x, int64_t b, int64_t t, int64_t c, int64_t h, int64_t rows, int64_t blocks) {
  blocks = std::min(blocks, channel_blocks(x) - c / kLanes);
  const int lanes = static_cast<int>(std::min<int64_t>(kLanes, x.C - c - (blocks - 1) * kLanes));
  return {b, t, c, h, std::min(rows, x.H - h), blocks, lanes};
}

// Vectors of the largest tile of a pass.
inline int64_t row_capacity(const Volume& x) { return unit_rows(x) * x.W * tile_blocks(x); }
inline int64_t reduction_capacity(const Volume& x, int context) {
  return context == kChannel ? row_capacity(x) : tile_rows(x, reduction_vectors(x) / x.blocks) * x.W * x.blocks;
}

template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t vectors)
      : data_(static_cast<Vec<A>*>(::operator new(vectors * sizeof(Vec<A>), std::align_val_t{alignof(Vec<A>)}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{alignof(Vec<A>)}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator Vec<A>*() { return data_; }

 private:
  Vec<A>* data_;
};

inline int64_t tile_offset(const Volume& x, const Tile& at) {
  return at.b * x.stride_b + at.t * x.stride_t + at.c * x.stride_c + at.h * x.W * x.stride_p;
}

// Calls body(blocks, for_blocks) with for_blocks(each) calling each(block, lanes) for every block of a tile. One block
// and full lanes, as in most tiles, are constants: that removes loops and branches around single loads.
template <class Body>
AIA_INLINE void with_blocks(const Tile& at, Body&& body) {
  const auto run = [&](auto blocks, auto last) {
    body(blocks, [blocks, last](auto&& each) {
      for (int64_t k = 0; k + 1 < blocks; ++k) each(k, std::integral_constant<int, kLanes>{});
      each(blocks - 1, last);
    });
  };
  with_lanes(at.lanes, [&](auto last) {
    if (at.blocks == 1)
      run(std::integral_constant<int64_t, 1>{}, last);
    else
      run(at.blocks, last);
  });
}

// Calls body(v, i, w, c, lanes, row) for the vectors of a tile: the v-th one lies at position i, in column w, and its
// first channel is the c-th of the tile. row = per_row(r, c, lanes) is what the vectors of row r share; where the tile
// is one block wide it is made once.
template <class PerRow, class Body>
AIA_INLINE void for_each_vector(const Volume& x, const Tile& at, PerRow&& per_row, Body&& body) {
  const int64_t W = x.W;
  with_lanes(at.lanes, [&](auto last) {
    for (int64_t r = 0; r < at.rows; ++r) {
      if (at.blocks == 1) {
        const auto row = per_row(r, int64_t{0}, last);
        for (int64_t w = 0; w < W; ++w) body(r * W + w, r * W + w, w, int64_t{0}, last, row);
        continue;
      }
      constexpr std::integral_constant<int, kLanes> full;
      const int64_t c = (at.blocks - 1) * kLanes;
      for (int64_t w = 0, v = r * W * at.blocks; w < W; ++w, ++v) {
        for (int64_t k = 0; k < c; k += kLanes, ++v) body(v, r * W + w, w, k, full, per_row(r, k, full));
        body(v, r * W + w, w, c, last, per_row(r, c, last));
      }
    }
  });
}

template <class T, class A = Accumulate<T>>
void load_tile(const Volume& x, const Tile& at, const T* data, Vec<A>* tile) {
  const T* source = data + tile_offset(x, at);
  with_blocks(at, [&](int64_t blocks, auto&& for_blocks) {
    for (int64_t i = 0; i < at.positions(x); ++i)
      for_blocks([&](int64_t k, auto lanes) {
        const T* from = source + i * x.C + k * kLanes;
        __builtin_prefetch(from + at.ahead);
        tile[i * blocks + k] = load(from, lanes);
      });
  });
}

template <class T, class A = Accumulate<T>>
void store_tile(const Volume& x, const Tile& at, const Vec<A>* tile, T* data) {
  T* target = data + tile_offset(x, at);
  with_blocks(at, [&](int64_t blocks, auto&& for_blocks) {
    for (int64_t i = 0; i < at.positions(x); ++i)
      for_blocks([&](int64_t k, auto lanes) { store(target + i * x.C + k * kLanes, tile[i * blocks + k], lanes); });
  });
}

// The tiles of the unit-th group of `blocks` blocks of channels of a clip: rows outermost, then frames, so that what
// the frames share (the T map of the rows) stays in cache. Calls each(tile).
template <class Each>
void for_each_tile(const Volume& x, int64_t unit, int64_t blocks, int64_t positions, Each&& each) {
  const int64_t groups = (channel_blocks(x) + blocks - 1) / blocks, rows = tile_rows(x, positions);
  const int64_t b = unit / groups, c = unit % groups * blocks * kLanes;
  for (int64_t h = 0; h < x.H; h += rows)
    for (int64_t t = 0; t < x.T; ++t) {
      Tile at = tile_at(x, b, t, c, h, rows, blocks);
      const Tile next =
          t + 1 < x.T ? tile_at(x, b, t + 1, c, h, rows, blocks) : tile_at(x, b, 0, c, h + rows, rows, blocks);
      at.ahead = tile_offset(x, next) - tile_offset(x, at);
      each(at);
    }
}

// The tiles of the unit-th run of rows of a frame (unit_rows), from the first channel to the last. Calls each(tile).
template <class Each>
void for_each_tile_of_rows(const Volume& x, int64_t unit, Each&& each) {
  const int64_t rows = unit_rows(x), runs = (x.H + rows - 1) / rows, blocks = tile_blocks(x);
  const int64_t frame = unit / runs, h = unit % runs * rows;
  for (int64_t c = 0; c < x.C; c += blocks * kLanes) {
    Tile at = tile_at(x, frame / x.T, frame % x.T, c, h, rows, blocks);
    at.ahead = blocks * kLanes;
    each(at);
  }
}

// Calls body with a value of the index type.
template <class Body>
void with_index(int bytes, Body&& body) {
  switch (bytes) {
    case 1: return body(uint8_t{});
    case 2: return body(int16_t{});
    case 4: return body(int32_t{});
  }
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
