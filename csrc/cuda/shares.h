// How the packed maps of a gate pass are cut into items of work and shared out among the blocks of a launch. Depends on
// nothing but sizes.
//
// A launch lasts as long as its slowest block, and a block as long as the planes that it visits: those of an item, and
// where a map is cut along its first axis the one before and the one after. Those two meet a third of the weight, so
// that both together cost about half a plane, as much as it costs to begin an item. Long chunks visit few planes twice,
// short ones come out even. So the maps are cut for about the least work in which all blocks can end.
#pragma once

#include <algorithm>

#include "../common/scalar.h"
#include "split.h"

namespace aia::cuda {

// The rows of a column that a thread computes: what it reads of shared memory serves three of them. Planes of a ResNet
// have multiples of seven; doubles are short of registers.
template <class A>
constexpr int kStrip = sizeof(A) == 4 ? 7 : 3;  // odd, for Map::lay_out
// The threads that shared memory serves in a turn.
constexpr int kTurn = 16;

// And its columns: two where rows are copied in vectors, which then begin and end with them.
template <int kWide>
constexpr int kAcross = kWide > 1 ? 2 : 1;

// One map [d0, d1, d2] of each clip, cut into items of work for a block: a tile of the planes, some strips high, of
// `slabs` neighbouring chunks of a clip; a chunk has `length` planes, a strip so many rows and columns. Rows are copied
// in vectors of `wide` neighbours, which divides d2.
struct Map {
  int d0, d1, d2;
  int start;  // in a packed clip
  int length, chunks;
  int strip, across, wide;
  int strips, columns, slabs;
  int tiles_down, tiles_across;
  int pitch, slab_step;  // how far apart rows, and slabs, lie among the places of a plane in shared memory
  int first_block, blocks;
  Divisor by_strips_across, by_strips, by_vectors, by_staged_rows, by_tiles_across, by_tiles, by_groups;

  AIA_HOST_DEVICE int plane_size() const { return d1 * d2; }
  AIA_HOST_DEVICE int rows() const { return strips * strip; }
  AIA_HOST_DEVICE int tiles() const { return tiles_down * tiles_across; }
  AIA_HOST_DEVICE int groups() const { return (chunks + slabs - 1) / slabs; }

  // A tile that has neighbours is staged with a frame of them, one row, and one vector of columns. The others have a
  // frame of zeros, of which neighbouring rows, and slabs, share one side. `frame`: how many neighbours; staged rows
  // and columns of a slab; the rows from a slab to the next one; the places of all.
  AIA_HOST_DEVICE int frame_down() const { return tiles_down > 1; }
  AIA_HOST_DEVICE int frame_across() const { return tiles_across > 1 ? wide : 0; }
  AIA_HOST_DEVICE int staged_rows() const { return tiles_down > 1 ? rows() + 2 : d1; }
  AIA_HOST_DEVICE int staged_columns() const { return columns + 2 * frame_across(); }
  AIA_HOST_DEVICE int height() const { return rows() + 1 + frame_down(); }
  AIA_HOST_DEVICE int staged() const { return slabs * staged_rows() * staged_columns(); }
  AIA_HOST_DEVICE int strips_across() const { return columns / across; }
  AIA_HOST_DEVICE int places() const { return (slabs - 1) * slab_step + places_of_slab(); }
  AIA_HOST_DEVICE int places_of_slab() const { return (height() + 1 - frame_down()) * pitch + wide - frame_across(); }
  // Where an element of a slab lies, from the slab's first place on.
  AIA_HOST_DEVICE int place(int row, int column) const { return (row + 1) * pitch + column + wide; }

  // Lays rows and slabs out: side by side, or each so far apart that shared memory, which serves so many threads a
  // turn, sees the strips of neighbouring ones side by side.
  void lay_out(bool rows_apart, bool slabs_apart) {
    const int turn = kTurn * across;
    const auto reaching = [&](int residue, int step) { return ((residue - step) % turn + turn) % turn; };
    pitch = columns + wide + frame_across();
    while (rows_apart && strips > 1 && reaching(columns, strip * pitch)) pitch += wide;
    slab_step = height() * pitch;
    while (slabs_apart && reaching(strips * columns, slab_step)) slab_step += wide;
  }

  // The planes of an item that are visited: from its first on, or from the one before.
  AIA_HOST_DEVICE int first_visit() const { return chunks > 1 ? -1 : 0; }
  AIA_HOST_DEVICE int last_visit() const { return chunks > 1 ? length : length - 1; }
  // Of an item, in halves of a plane: its planes, what it takes to begin, and the planes at its ends.
  AIA_HOST_DEVICE int work() const { return 2 * length + 1 + (chunks > 1); }

  // What a launch needs of a map that is cut, so that blocks need no division.
  void prepare() {
    by_strips_across = Divisor(strips_across()), by_strips = Divisor(strips);
    by_vectors = Divisor(staged_columns() / wide), by_staged_rows = Divisor(staged_rows());
    by_tiles_across = Divisor(tiles_across), by_tiles = Divisor(tiles()), by_groups = Divisor(groups());
  }
};

struct Maps {
  int n, packed;
  int64_t batch;
  Map at[3];

  AIA_HOST_DEVICE int of_block(int block) const {
    return (n > 1 && block >= at[1].first_block) + (n > 2 && block >= at[2].first_block);
  }
  AIA_HOST_DEVICE int blocks() const { return at[n - 1].first_block + at[n - 1].blocks; }
};

// What a block has room for: strips of so many rows and columns that its threads compute, elements of a plane that they
// stage, in vectors, and their places in shared memory.
struct Capacity {
  int strip, across, wide, strips, staged, places;

  bool holds(const Map& map) const {
    return map.slabs * map.strips * map.strips_across() <= strips && map.staged() <= staged && map.places() <= places;
  }
};

// Forward a thread has a strip; backward two have one, each for a feature. A block of every device has so much shared
// memory.
template <class A, int kWide>
constexpr Capacity kForwardCapacity{kStrip<A>,
                                    kAcross<kWide>,
                                    kWide,
                                    256,
                                    kStrip<A> != 7 ? 1280
                                    : kWide == 4   ? 4096
                                                   : 1792 * kWide,
                                    kStrip<A> != 7 ? 2048 : 4160};
template <class A, int kWide>
constexpr Capacity kBackwardCapacity{
    kStrip<A>, kAcross<kWide>, kWide, 128, kStrip<A> != 7 ? 512 : 1024 * kAcross<kWide>, kStrip<A> != 7 ? 640 : 2304};

// The least length of parts that are as many as those of `most`.
inline int even(int length, int most) { return ceil_div(length, ceil_div(length, most)); }

// The neighbouring chunks that an item can have at most.
inline int most_slabs(const Map& map, Capacity capacity) {
  const int strips = capacity.strips / (map.strips * map.strips_across());
  const int staged = capacity.staged / (map.staged_rows() * map.staged_columns());
  const int places = 1 + (capacity.places - map.places_of_slab()) / map.slab_step;
  return std::max(1, std::min({map.chunks, strips, staged, places}));
}

// Lays a tile out as far apart as costs no slab; whether there is room for it.
inline bool lay_out(Map& map, Capacity capacity) {
  map.lay_out(false, false);
  if (!capacity.holds(map)) return false;
  map.chunks = map.d0;
  const int most = most_slabs(map, capacity);
  for (const bool rows_apart : {true, false}) {
    map.lay_out(rows_apart, true);
    if (capacity.holds(map) && most_slabs(map, capacity) == most) return true;
  }
  map.lay_out(false, false);
  return true;
}

inline Map tiled(const PackedDims& dims, int m, Capacity capacity) {
  constexpr int kWhole = 64, kHigh = 8;
  Map map{};
  map.d0 = static_cast<int>(dims.dims[m][0]);
  map.d1 = static_cast<int>(dims.dims[m][1]);
  map.d2 = static_cast<int>(dims.dims[m][2]);
  map.start = static_cast<int>(dims.offset(m));
  map.strip = capacity.strip, map.across = capacity.across, map.wide = capacity.wide, map.slabs = 1;
  const int strips = ceil_div(map.d1, map.strip);
  // Whole rows need no frame at their ends. Longer ones are cut for tiles of about as many rows as columns.
  const int high = std::min(strips, kHigh);
  const int wide = map.wide, whole = capacity.across * capacity.strips / high;
  const int most = std::min(whole, capacity.places / (high * map.strip + 2) - 2 * wide) / wide;
  map.columns = map.d2 <= kWhole ? map.d2 : even(map.d2 / wide, most) * wide;
  map.tiles_across = ceil_div(map.d2, map.columns);
  for (int most = std::min(strips, capacity.strips / map.strips_across());; --most) {
    map.strips = even(strips, most);
    map.tiles_down = ceil_div(strips, map.strips);
    if (lay_out(map, capacity) || most == 1) return map;
  }
}

// Into at most so many chunks.
inline void cut_into_chunks(Map& map, int chunks) {
  map.length = ceil_div(map.d0, chunks);
  map.chunks = ceil_div(map.d0, map.length);
}

inline int64_t items_of(const Map& map, int64_t batch) { return batch * map.groups() * map.tiles(); }

// A map cut so that the fewest blocks come to its end with so much work; more than there are if none can.
inline Map cut_for(const Map& whole, int64_t batch, Capacity capacity, int64_t work) {
  constexpr int kTooMany = 1 << 28;
  Map best = whole;
  best.blocks = kTooMany;
  for (int chunks = 1; chunks <= whole.d0; chunks += 1 + chunks / 16) {
    Map map = whole;
    cut_into_chunks(map, chunks);
    if (map.work() > work) continue;
    map.slabs = most_slabs(map, capacity);
    const int64_t rounds = work / map.work();
    map.blocks = static_cast<int>(std::min<int64_t>((items_of(map, batch) + rounds - 1) / rounds, kTooMany));
    if (map.blocks < best.blocks) best = map;
  }
  return best;
}

// Cuts every map into items of tiles as large as there is room for, and shares the blocks of a launch, at most so many
// and one for each map at least, out among the maps.
inline Maps cut_into_large_tiles(const PackedDims& dims, Capacity capacity, int most) {
  Maps maps{dims.n, static_cast<int>(dims.packed()), dims.B, {}};
  Map whole[3];
  int64_t work = 2;
  for (int m = 0; m < dims.n; ++m) {
    Map map = whole[m] = tiled(dims, m, capacity);
    map.chunks = map.d0;
    work += 2 * dims.B * map.d0 * map.tiles() / (int64_t{most} * most_slabs(map, capacity));
  }
  int64_t blocks = 0;
  for (;; work += (work + 31) / 32) {
    blocks = 0;
    for (int m = 0; m < dims.n; ++m) blocks += (maps.at[m] = cut_for(whole[m], dims.B, capacity, work)).blocks;
    if (blocks <= most) break;
  }
  int next = 0;
  for (int m = 0; m < dims.n; ++m) {
    // Where blocks are left over, thinner items give them something to do.
    Map& map = maps.at[m];
    const int64_t rounds = work / map.work(), items = map.blocks * most / blocks * rounds;
    map.slabs = ceil_div(map.chunks, std::max<int64_t>(map.groups(), items / (dims.B * map.tiles())));
    map.first_block = next;
    map.blocks = ceil_div(items_of(map, dims.B), rounds);
    map.prepare();
    next += map.blocks;
  }
  return maps;
}

// How long the slowest block of a launch issues, in halves of a plane for half of a block's threads: that many keep the
// four schedulers of a multiprocessor busy, and fewer do not come to an end sooner.
inline int64_t longest(const Maps& maps, int strips) {
  int64_t most = 0;
  for (int m = 0; m < maps.n; ++m) {
    const Map& map = maps.at[m];
    const int rounds = ceil_div(items_of(map, maps.batch), map.blocks);
    most = std::max(most,
                    int64_t{rounds} * map.work() * ceil_div(2 * map.slabs * map.strips * map.strips_across(), strips));
  }
  return most;
}

// The same in tiles of half the size where these end sooner by a fifth, as a scheduler then has one warp that waits
// alone: large tiles have few items, which come out less even, and which threads begin and end more often.
inline Maps cut(const PackedDims& dims, Capacity capacity, int most) {
  const int strips = capacity.strips;
  const Maps large = cut_into_large_tiles(dims, capacity, most);
  capacity.strips /= 2;
  const Maps small = cut_into_large_tiles(dims, capacity, most);
  return 5 * longest(small, strips) < 4 * longest(large, strips) ? small : large;
}

}  // namespace aia::cuda
