// Tiles of x: the positions of a few rows of one plane, sixteen channels wide, held as [positions][16 channels].
//
// Lanes are channels in every pass that meets a spacetime map. Where x is stored with its channels apart the tile is
// transposed on the way in and out, about five vector operations per sixteen elements; after that every loop runs over
// whole vectors without a remainder, be the plane 56 wide or 7.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "lanes.h"
#include "passes.h"

namespace aia::cpu::AIA_CPU_LEVEL {

// Where a tile lies: rows [h, h + rows) of frame t of clip b, channels [c, c + lanes). `ahead` is the distance in
// elements to the tile that will be read next: sixteen short runs are more than the hardware foresees.
struct Tile {
  int64_t b, t, c, h, rows;
  int lanes;
  int64_t ahead = 0;
};

inline int64_t tile_capacity(const Volume& x, int64_t positions) { return tile_rows(x, positions) * x.W; }

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

template <class T, class A = Accumulate<T>>
void load_tile(const Volume& x, const Tile& at, const T* data, Vec<A>* tile) {
  const T* source = data + tile_offset(x, at);
  const int64_t n = at.rows * x.W, stride_c = x.stride_c, stride_p = x.stride_p, ahead = at.ahead;
  if (stride_c == 1) {
    with_lanes(at.lanes, [&](auto lanes) {
      for (int64_t i = 0; i < n; ++i) {
        __builtin_prefetch(source + i * stride_p + ahead);
        tile[i] = load(source + i * stride_p, lanes);
      }
    });
  } else if (n < kLanes) {
    for (int64_t i = 0; i < n; ++i) {
      T part[kLanes] = {};
      for (int c = 0; c < at.lanes; ++c) part[c] = source[c * stride_c + i];
      tile[i] = load(part);
    }
  } else {
    // The last block overlaps the one before it, which spares a remainder loop.
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t first = std::min(i, n - kLanes);
      Vec<A> block[kLanes];
      for (int c = 0; c < kLanes; ++c) {
        const T* row = source + std::min(c, at.lanes - 1) * stride_c + first;
        __builtin_prefetch(row + ahead);
        block[c] = load(row);
      }
      transpose(block);
      for (int p = 0; p < kLanes; ++p) tile[first + p] = block[p];
    }
  }
}

template <class T, class A = Accumulate<T>>
void store_tile(const Volume& x, const Tile& at, const Vec<A>* tile, T* data) {
  T* target = data + tile_offset(x, at);
  const int64_t n = at.rows * x.W, stride_c = x.stride_c, stride_p = x.stride_p;
  with_lanes(at.lanes, [&](auto lanes) {
    if (stride_c == 1) {
      for (int64_t i = 0; i < n; ++i) store(target + i * stride_p, tile[i], lanes);
    } else if (n < kLanes) {
      for (int64_t i = 0; i < n; ++i) {
        T part[kLanes];
        store(part, tile[i]);
        for (int c = 0; c < lanes; ++c) target[c * stride_c + i] = part[c];
      }
    } else {
      // Whole planes lie in one piece: written there in order the lines are foreseen, by sixteen turns they are not.
      T packed[kLanes * kTilePositions];
      const bool whole = n == stride_c && n <= kTilePositions;
      T* rows = whole ? packed : target;
      for (int64_t i = 0; i < n; i += kLanes) {
        const int64_t first = std::min(i, n - kLanes);
        Vec<A> block[kLanes];
        for (int p = 0; p < kLanes; ++p) block[p] = tile[first + p];
        transpose(block);
        for (int c = 0; c < lanes; ++c) store(rows + c * stride_c + first, block[c]);
      }
      if (whole) __builtin_memcpy(target, packed, lanes * n * sizeof(T));
    }
  });
}

// The tiles of one block of channels of one clip: rows outermost, then frames, so that what the frames share (the T
// map of the rows) stays in cache. Calls each(tile).
template <class Each>
void for_each_tile(const Volume& x, int64_t block, int64_t positions, Each&& each) {
  const int64_t b = block / channel_blocks(x), c = block % channel_blocks(x) * kLanes, step = tile_rows(x, positions);
  const int lanes = static_cast<int>(std::min<int64_t>(kLanes, x.C - c));
  for (int64_t h = 0; h < x.H; h += step)
    for (int64_t t = 0; t < x.T; ++t) {
      Tile at{b, t, c, h, std::min(step, x.H - h), lanes};
      const Tile next{b, t + 1 < x.T ? t + 1 : 0, c, t + 1 < x.T ? h : h + step, 0, 0};
      at.ahead = tile_offset(x, next) - tile_offset(x, at);
      each(at);
    }
}

// Calls body with a value of the storage type, or of the index type, that the argument names.
template <class Body>
void with_scalar(Scalar scalar, Body&& body) {
  switch (scalar) {
    case Scalar::kFloat32: return body(float{});
    case Scalar::kFloat64: return body(double{});
    case Scalar::kBFloat16: return body(bf16{});
    case Scalar::kFloat16: return body(f16{});
  }
}
template <class Body>
void with_index(int bytes, Body&& body) {
  switch (bytes) {
    case 1: return body(uint8_t{});
    case 2: return body(int16_t{});
    case 4: return body(int32_t{});
  }
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
