// How the packed maps of a gate pass are cut into items of work and shared out among the blocks of a launch. Depends on
// nothing but sizes.
//
// A launch lasts as long as its slowest block, and a block as long as the planes that it visits: length + 2 for an
// item, which is a chunk of so many planes with the one before and the one after. Long chunks visit few planes twice,
// short ones come out even. So the maps are cut for about the least number of visits in which all blocks can end.
#pragma once

#include <algorithm>

#include "../common/scalar.h"
#include "split.h"

namespace aia::cuda {

// One map [d0, d1, d2] of each clip, cut into items of work for a block: a tile of rows times columns of the planes,
// of `slabs` neighbouring chunks; a chunk has `length` planes of one clip.
struct Map {
  int d0, d1, d2;
  int start;  // in a packed clip
  int length, chunks;
  int rows, columns, slabs;
  int tiles_down, tiles_across;
  int64_t all_chunks, items;
  int first_block, blocks;

  AIA_HOST_DEVICE int plane_size() const { return d1 * d2; }
};

struct Maps {
  int n, packed;
  Map at[3];

  AIA_HOST_DEVICE int of_block(int block) const {
    return (n > 1 && block >= at[1].first_block) + (n > 2 && block >= at[2].first_block);
  }
  AIA_HOST_DEVICE int blocks() const { return at[n - 1].first_block + at[n - 1].blocks; }
};

// What a block has room for: positions of a plane that its threads compute, and elements of one with its frame.
struct Capacity {
  int positions, staged;

  int slabs(const Map& map) const {
    return std::min(positions / (map.rows * map.columns), staged / ((map.rows + 2) * (map.columns + 2)));
  }
};

// Forward a thread has a position; backward two have one, each for a feature.
constexpr Capacity kForwardCapacity{256, 768}, kBackwardCapacity{128, 512};

// The least length of parts that are as many as those of `most`.
inline int even(int length, int most) { return ceil_div(length, ceil_div(length, most)); }

inline Map tiled(const PackedDims& dims, int m, Capacity capacity) {
  constexpr int kColumns = 32;
  Map map{};
  map.d0 = static_cast<int>(dims.dims[m][0]);
  map.d1 = static_cast<int>(dims.dims[m][1]);
  map.d2 = static_cast<int>(dims.dims[m][2]);
  map.start = static_cast<int>(dims.offset(m));
  map.columns = even(map.d2, kColumns);
  map.rows = even(map.d1, std::min(capacity.positions / map.columns, capacity.staged / (map.columns + 2) - 2));
  map.tiles_down = ceil_div(map.d1, map.rows);
  map.tiles_across = ceil_div(map.d2, map.columns);
  return map;
}

inline void cut_into_chunks(Map& map, int64_t batch, int length) {
  map.length = even(map.d0, length);
  map.chunks = ceil_div(map.d0, map.length);
  map.all_chunks = batch * map.chunks;
}

inline void cut_into_items(Map& map, int64_t slabs) {
  map.slabs = static_cast<int>(slabs);
  map.items = (map.all_chunks + slabs - 1) / slabs * map.tiles_down * map.tiles_across;
}

// A map cut so that the fewest blocks come to its end in so many visits; more than there are if none can.
inline Map cut_for(const Map& whole, int64_t batch, Capacity capacity, int64_t visits) {
  constexpr int kLongest = 32, kShortest = 4, kTooMany = 1 << 28;
  Map best = whole;
  best.blocks = kTooMany;
  for (int length = std::min(whole.d0, kLongest);; length = ceil_div(length, 2)) {
    Map map = whole;
    cut_into_chunks(map, batch, length);
    cut_into_items(map, capacity.slabs(map));
    if (const int64_t rounds = visits / (map.length + 2))
      map.blocks = static_cast<int>(std::min<int64_t>((map.items + rounds - 1) / rounds, kTooMany));
    if (map.blocks > 0 && map.blocks < best.blocks) best = map;
    if (length <= kShortest) return best;
  }
}

// Cuts every map into items, and shares the blocks of a launch, at most so many and one for each map at least, out
// among the maps.
inline Maps cut(const PackedDims& dims, Capacity capacity, int most) {
  Maps maps{dims.n, static_cast<int>(dims.packed()), {}};
  Map whole[3];
  int64_t visits = 1;
  for (int m = 0; m < dims.n; ++m) {
    const Map& map = whole[m] = tiled(dims, m, capacity);
    visits += dims.B * map.d0 * map.tiles_down * map.tiles_across / (int64_t{most} * capacity.slabs(map));
  }
  int64_t blocks = 0;
  for (;; visits += (visits + 15) / 16) {
    blocks = 0;
    for (int m = 0; m < dims.n; ++m) blocks += (maps.at[m] = cut_for(whole[m], dims.B, capacity, visits)).blocks;
    if (blocks <= most) break;
  }
  int next = 0;
  for (int m = 0; m < dims.n; ++m) {
    // Where blocks are left over, thinner items give them something to do.
    Map& map = maps.at[m];
    const int64_t rounds = visits / (map.length + 2), items = map.blocks * most / blocks * rounds;
    cut_into_items(map, ceil_div(map.all_chunks, items / (map.tiles_down * map.tiles_across)));
    map.first_block = next;
    map.blocks = ceil_div(map.items, rounds);
    next += map.blocks;
  }
  return maps;
}

}  // namespace aia::cuda
