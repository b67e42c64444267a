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

constexpr int kGateThreads = 256;

// How a strip, what a thread computes of a plane, lies there. Of rows of any length it is some rows of a column, or of
// two where rows are copied in vectors, of two or of four. Of rows of 14 or 7 it is whole rows: it has no neighbours at
// its sides and its numbers follow each other in memory, so a plane is one long row that is copied as such.
using Form = int;
constexpr Form kOnes = 1, kTwos = 2, kFours = 4, kRowsOf7 = 7, kRowsOf14 = 14;
template <Form kForm>
constexpr bool kWholeRows = kForm >= kRowsOf7;
// The numbers of a strip of whole rows.
constexpr int kLongStrip = 14;

// The rows of a strip: what it reads of shared memory serves three of them. Planes of a ResNet have multiples of seven;
// doubles are short of registers.
template <class A, Form kForm>
constexpr int kStrip = kWholeRows<kForm> ? kLongStrip / kForm
                       : sizeof(A) == 4  ? 7
                                         : 3;  // odd, for Map::lay_out
// And its columns: two where rows are copied in vectors, which then begin and end with them.
template <Form kForm>
constexpr int kAcross = kWholeRows<kForm> ? kForm
                        : kForm == kOnes  ? 1
                                          : 2;
// The widest vectors that are copied. Planes of whole rows are copied by single elements where no vector divides them,
// as those of an odd number of rows of seven.
template <Form kForm>
constexpr int kWide = kWholeRows<kForm> ? 4 : kForm;
// The threads that shared memory serves in a turn, and its banks.
constexpr int kTurn = 16, kBanks = 32;

// One map [d0, d1, d2] of each clip, cut into items of work for a block: a tile of the planes, some strips high, of
// `slabs` neighbouring chunks of a clip; a chunk has `length` planes, a strip so many rows and columns. Rows are copied
// in vectors of `wide` neighbours, which divides d2. Where strips are whole rows, planes are one row each: d1 is 1.
struct Map {
  int d0, d1, d2;
  int start;  // in a packed clip
  int length, chunks;
  int strip, across, wide;
  int strips, columns, slabs;
  int tiles_down, tiles_across;
  // Among the places of a plane in shared memory: how far apart rows and slabs lie, where the first element does, and
  // the places of a slab.
  int pitch, slab_step, first_place, slab_places;
  int beside;    // columns of a frame at each side of a tile
  int together;  // slabs of whole rows that threads stage in a turn, 0 where one takes several
  int first_block, blocks;
  Divisor by_strips_across, by_strips, by_vectors, by_staged_rows, by_tiles_across, by_tiles, by_groups;

  AIA_HOST_DEVICE int plane_size() const { return d1 * d2; }
  AIA_HOST_DEVICE int rows() const { return strips * strip; }
  AIA_HOST_DEVICE int tiles() const { return tiles_down * tiles_across; }
  AIA_HOST_DEVICE int groups() const { return (chunks + slabs - 1) / slabs; }

  // A tile that has neighbours is staged with a frame of them, one row, and one vector of columns; of whole rows as
  // many as begin with a strip and with a vector. The others have a frame of zeros, of which neighbouring rows, and
  // slabs, share one side. `frame`: how many neighbours; staged rows and columns of a slab; the places of all.
  AIA_HOST_DEVICE int frame_down() const { return tiles_down > 1; }
  AIA_HOST_DEVICE int frame_across() const { return tiles_across > 1 ? beside : 0; }
  AIA_HOST_DEVICE int staged_rows() const { return tiles_down > 1 ? rows() + 2 : d1; }
  AIA_HOST_DEVICE int staged_columns() const { return tiles_across > 1 ? columns + 2 * beside : d2; }
  AIA_HOST_DEVICE int staged() const { return slabs * staged_rows() * staged_columns(); }
  AIA_HOST_DEVICE int strips_across() const { return columns / across; }
  AIA_HOST_DEVICE int places() const { return (slabs - 1) * slab_step + slab_places; }
  // Where an element of a slab lies, from the slab's first place on.
  AIA_HOST_DEVICE int place(int row, int column) const { return first_place + row * pitch + column; }

  // Lays rows and slabs out: side by side, or each so far apart that shared memory, which serves so many threads a
  // turn, sees the strips of neighbouring ones side by side.
  void lay_out(bool rows_apart, bool slabs_apart) {
    const auto apart = [&](int& step, int unit, int wanted, int turn) {
      while ((wanted - step * unit) % turn) step += wide;
    };
    const int turn = kTurn * across;
    pitch = columns + wide + frame_across();
    if (rows_apart && strips > 1) apart(pitch, strip, columns, turn);
    const int height = rows() + 1 + frame_down();
    slab_step = height * pitch;
    if (slabs_apart) apart(slab_step, 1, strips * columns, turn);
    first_place = pitch + wide;
    slab_places = (height + 1 - frame_down()) * pitch + wide - frame_across();
  }
  // The same for rows of this length whose strips are whole ones. Strips side by side meet in no bank, as they begin at
  // each second one.
  void lay_out_whole_rows(int row, bool slabs_apart) {
    constexpr int kZeros = 16;  // a strip, up to a vector
    const int frame = tiles_across > 1 ? beside : kZeros;
    pitch = 0, first_place = frame, slab_places = columns + 2 * frame;
    slab_step = columns + (tiles_across > 1 ? 2 * frame : columns - d2 >= row ? 0 : kZeros);
    while (slabs_apart && (columns - slab_step) % kBanks) slab_step += wide;
  }

  // The planes of an item that are visited: from its first on, or from the one before.
  AIA_HOST_DEVICE int first_visit() const { return chunks > 1 ? -1 : 0; }
  AIA_HOST_DEVICE int last_visit() const { return chunks > 1 ? length : length - 1; }
  // Of an item, in halves of a plane: its planes, what it takes to begin, and the planes at its ends.
  AIA_HOST_DEVICE int work() const { return 2 * length + 1 + (chunks > 1); }

  // What a launch needs of a map that is cut, so that blocks need no division.
  void prepare() {
    together = kGateThreads / (staged_columns() / wide);
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
// stage, in vectors, and their places in shared memory. `whole_row`: the length of whole rows, or 0.
struct Capacity {
  int whole_row, strip, across, wide, strips, staged, places;

  // In which threads can stage a vector each.
  int staging_turns(const Map& map) const { return ceil_div(staged, kGateThreads * map.wide); }
  // The slabs that can be staged. Of whole rows threads stage a slab or more in a turn, or in several turns one.
  int staged_slabs(const Map& map) const {
    if (!whole_row) return staged / (map.staged_rows() * map.staged_columns());
    const int turns = staging_turns(map);
    const int vectors = map.staged_columns() / map.wide, together = kGateThreads / vectors;
    return together > 0 ? turns * together : vectors <= turns * kGateThreads;
  }
  bool holds(const Map& map) const {
    return map.slabs * map.strips * map.strips_across() <= strips && map.slabs <= staged_slabs(map) &&
           map.places() <= places;
  }
};

// Forward a thread has a strip; backward two have one, each for a feature. A block of every device has so much shared
// memory.
template <class A, Form kForm>
constexpr Capacity capacity_of(int strips, int staged, int places) {
  constexpr bool kWhole = kWholeRows<kForm>;
  return {kWhole ? kAcross<kForm> : 0,
          kWhole ? 1 : kStrip<A, kForm>,
          kWhole ? kLongStrip : kAcross<kForm>,
          kWide<kForm>,
          strips,
          staged,
          places};
}
template <class A, Form kForm>
constexpr Capacity kForwardCapacity = capacity_of<A, kForm>(256,
                                                            sizeof(A) != 4      ? 1280
                                                            : kForm == kRowsOf7 ? 13 * kGateThreads
                                                            : kWide<kForm> == 4 ? 4096
                                                                                : 1792 * kWide<kForm>,
                                                            sizeof(A) != 4 ? 2048 : 4160);
template <class A, Form kForm>
constexpr Capacity kBackwardCapacity = capacity_of<A, kForm>(128,
                                                             sizeof(A) != 4      ? 512
                                                             : kForm == kOnes    ? 1024
                                                             : kForm == kRowsOf7 ? 7 * kGateThreads
                                                                                 : 2048,
                                                             sizeof(A) != 4 ? 640 : 2304);

// Calls body with the form of strips in packed maps that can be moved in vectors of 16 bytes, or only one by one.
template <class A, class Body>
int with_form(const PackedDims& dims, bool wide, Body&& body) {
  if constexpr (sizeof(A) == 4) {
    const auto all = [&](auto&& of_map) { return std::all_of(dims.dims, dims.dims + dims.n, of_map); };
    const auto rows_of = [](int64_t length) { return [=](const int64_t (&map)[3]) { return map[2] == length; }; };
    // Whole rows are found in maps of fewer than 2^30 elements.
    bool small = true;
    for (int m = 0; m < dims.n; ++m) small = small && dims.numel(m) < int64_t{1} << 30;
    if (small && wide && all(rows_of(7))) return body(std::integral_constant<Form, kRowsOf7>{});
    if (small && wide && all(rows_of(14)) && all([](const int64_t (&map)[3]) { return map[1] % 2 == 0; }))
      return body(std::integral_constant<Form, kRowsOf14>{});
    if (wide && all([](const int64_t (&map)[3]) { return map[2] % 4 == 0; }))
      return body(std::integral_constant<Form, kFours>{});
    if (wide && all([](const int64_t (&map)[3]) { return map[2] % 2 == 0; }))
      return body(std::integral_constant<Form, kTwos>{});
  }
  return body(std::integral_constant<Form, kOnes>{});
}

// The least length of parts that are as many as those of `most`.
inline int even(int length, int most) { return ceil_div(length, ceil_div(length, most)); }

// The neighbouring chunks that an item can have at most.
inline int most_slabs(const Map& map, Capacity capacity) {
  const int strips = capacity.strips / (map.strips * map.strips_across());
  const int places = 1 + (capacity.places - map.slab_places) / map.slab_step;
  return std::max(1, std::min({map.chunks, strips, capacity.staged_slabs(map), places}));
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

// Planes of whole rows, of which neighbouring tiles have as many as begin with a vector.
inline void tile_whole_rows(Map& map, Capacity capacity) {
  constexpr int kUnit = 2 * kLongStrip;
  map.d2 *= map.d1, map.d1 = map.strips = map.tiles_down = 1;
  if (map.d2 % map.wide != 0) map.wide = 1;
  const int most =
      std::min(capacity.strips * kLongStrip, capacity.staging_turns(map) * kGateThreads * map.wide - 2 * kUnit);
  map.columns =
      map.d2 <= most ? ceil_div(map.d2, kLongStrip) * kLongStrip : even(ceil_div(map.d2, kUnit), most / kUnit) * kUnit;
  map.tiles_across = ceil_div(map.d2, map.columns);
  map.beside = kUnit;
  map.lay_out_whole_rows(capacity.whole_row, false);
  map.chunks = map.d0;
  const int slabs = most_slabs(map, capacity);
  map.lay_out_whole_rows(capacity.whole_row, true);
  if (!capacity.holds(map) || most_slabs(map, capacity) < slabs) map.lay_out_whole_rows(capacity.whole_row, false);
}

inline Map tiled(const PackedDims& dims, int m, Capacity capacity) {
  constexpr int kWhole = 64, kHigh = 8;
  Map map{};
  map.d0 = static_cast<int>(dims.dims[m][0]);
  map.d1 = static_cast<int>(dims.dims[m][1]);
  map.d2 = static_cast<int>(dims.dims[m][2]);
  map.start = static_cast<int>(dims.offset(m));
  map.strip = capacity.strip, map.across = capacity.across, map.wide = capacity.wide, map.slabs = 1;
  if (capacity.whole_row) {
    tile_whole_rows(map, capacity);
    return map;
  }
  map.beside = map.wide;
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
