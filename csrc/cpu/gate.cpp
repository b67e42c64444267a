// The gate passes on the CPU: 3x3x3 convolution 2 -> 1, batch normalization and sigmoid on packed maps, and their
// transposes. See aia_kernels/schemas.py for what each computes.
//
// Lanes run along the rows of a slab, one after the other, as they lie in the map: every neighbour of an element is a
// fixed distance away, whatever the lengths of the axes. Slabs and rows outside the map are left out of the sums; what
// lies beyond the ends of a row is masked. The convolution along the row is done last: first, for each of its three
// taps, the sum over the other two axes, S_k[i] = sum w[.., k] P[i + ..]; then z[i] = S_0[i - 1] + S_1[i] + S_2[i + 1].
// So every load is shared by three products, and two masks serve them all. Two features and 27 neighbours make 54
// multiply-adds per element. The transpose with respect to the features is the same correlation with the taps mirrored.
#include <numeric>
#include <vector>

#include "exponential.h"
#include "planes.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

// Rows [d1, d1 + rows) of the slabs [d0, d0 + slabs) of one map of one clip: the unit of these passes.
struct Box {
  int map;
  int64_t b, d0, slabs, d1, rows;
  const int64_t* dims;
  int64_t offset;  // of the map in the packed clip
  int64_t index;   // of its partial results: clip by clip, of each map by map
  int64_t ahead;   // from its start to that of the next unit: in a map of the packed clip, and that of a feature
  int64_t ahead_pooled;

  bool whole() const { return rows == dims[1]; }
  int64_t length() const { return dims[2]; }
  int64_t plane() const { return dims[1] * dims[2]; }
  int64_t run() const { return rows * length(); }  // elements of a slab
  int64_t start() const { return offset + d0 * plane() + d1 * length(); }
  int64_t size() const { return slabs * run(); }
};

// The box of a unit among all, of which the last ones may be smaller than the others.
inline Box box_at(const PackedDims& maps, int64_t index) {
  int64_t local = index, before = 0;
  int map = 0;
  for (int64_t units; local >= maps.B * (units = map_units(maps, map)); ++map) local -= maps.B * units, before += units;
  const int64_t* dims = maps.dims[map];
  const UnitSize unit = unit_size(maps, map);
  const int64_t units = map_units(maps, map), across = (dims[1] + unit.rows - 1) / unit.rows;
  const int64_t b = local / units, of_clip = local % units;
  const int64_t d0 = of_clip / across * unit.slabs, d1 = of_clip % across * unit.rows;
  return {map,
          b,
          d0,
          std::min(unit.slabs, dims[0] - d0),
          d1,
          std::min(unit.rows, dims[1] - d1),
          dims,
          maps.offset(map),
          b * clip_units(maps) + before + of_clip,
          0,
          0};
}

// Calls each(box).
template <class Each>
void for_each_box(const PackedDims& maps, int64_t begin, int64_t end, Each&& each) {
  Box at = box_at(maps, begin);
  for (int64_t index = begin; index < end; ++index) {
    const Box next = box_at(maps, std::min(index + 1, end - 1));
    at.ahead = next.start() - at.start() + (next.b - at.b) * maps.packed();
    at.ahead_pooled = at.ahead + (next.b - at.b) * maps.packed();
    each(at);
    at = next;
  }
}

// What the next unit will meet, from where it begins on: asked for, into the L2 cache, while this one is computed. The
// hardware does not foresee where the rows of a slab end.
template <class A>
struct Ahead {
  const A* of[3];
  AIA_INLINE void ask(int64_t i) const {
    for (const A* p : of) __builtin_prefetch(p + i, 0, 2);
  }
};

// Calls body(offset, n) for the pieces of the packed clip that a box is: n elements side by side.
template <class Body>
AIA_INLINE void for_pieces(const Box& at, Body&& body) {
  if (at.whole()) return body(at.start(), at.size());
  for (int64_t s = 0; s < at.slabs; ++s) body(at.start() + s * at.plane(), at.run());
}

// The first lanes; zero in the others.
template <class A>
AIA_INLINE Vec<A> keep(Vec<A> v, std::integral_constant<int, kLanes>) {
  return v;
}
template <class A>
AIA_INLINE Vec<A> keep(Vec<A> v, int lanes) {
  return iota<A>() < splat_index<A>(lanes) ? v : Vec<A>{};
}

// The taps that stay inside the map along one axis: the source index is d + k - 1.
struct Taps {
  int first, last;
  Taps(int64_t d, int64_t size) : first(d == 0), last(d + 1 < size ? 3 : 2) {}
};

// Calls body(begin, end, taps) for the positions of a box's slabs whose rows have the same neighbours.
template <class Body>
AIA_INLINE void for_alike_rows(const Box& at, Body&& body) {
  const int64_t length = at.length(), size = at.dims[1];
  for (int64_t r = 0; r < at.rows;) {
    const Taps taps(at.d1 + r, size);
    const int64_t last = taps.first == 0 && taps.last == 3 ? std::min(at.rows, size - 1 - at.d1) : r + 1;
    body(r * length, last * length, taps);
    r = last;
  }
}

constexpr int kBlocks = 4;  // vectors that are convolved at a time

// How many slabs from slab s of a box on are met as one run: those of short planes, of which even the neighbours' rows
// before and behind lie inside the map. They are read there, and masked.
inline int64_t slabs_together(const Box& at, int64_t s) {
  const bool some = at.whole() && at.plane() >= at.length() + kLanes && at.plane() <= 16 * kLanes;
  const int64_t last = at.dims[0] - 2;
  return some && at.d0 + s >= 2 && at.d0 + s < last ? std::min(at.slabs, last - at.d0) - s : 1;
}

// Which elements have a left, a right, an upper and a lower neighbour in their slab, vector by vector from the first
// element of a slab on, or as for left and right of any row: masks that repeat after `period` vectors.
template <class A>
class Neighbours {
 public:
  Neighbours(int64_t rows, int64_t length) {
    const int64_t plane = rows * length <= 16 * kLanes ? rows * length : length;  // slabs_together
    period_ = plane / std::gcd<int64_t>(plane, kLanes);
    while (period_ < kBlocks) period_ *= 2;
    masks_.resize(period_ + kBlocks);
    for (int64_t i = 0, at = 0, column = 0; i < period_ + kBlocks; ++i)
      for (int lane = 0; lane < kLanes; ++lane) {
        if (column > 0) insert_lane<A>(masks_[i].left, lane);
        if (column + 1 < length) insert_lane<A>(masks_[i].right, lane);
        if (at >= length) insert_lane<A>(masks_[i].above, lane);
        if (at + length < plane) insert_lane<A>(masks_[i].below, lane);
        at = at + 1 == plane ? 0 : at + 1;
        column = column + 1 == length ? 0 : column + 1;
      }
  }

  struct Masks {
    LaneSet<A> left{}, right{}, above{}, below{};
  };
  AIA_INLINE const Masks& operator[](int64_t i) const { return masks_[i]; }
  AIA_INLINE int64_t behind(int64_t i, int blocks) const {
    return i + blocks < period_ ? i + blocks : i + blocks - period_;
  }

 private:
  int64_t period_;
  std::vector<Masks> masks_;
};

// Of each map.
template <class A>
std::vector<Neighbours<A>> neighbours_of(const PackedDims& maps) {
  std::vector<Neighbours<A>> all;
  for (int i = 0; i < maps.n; ++i) all.emplace_back(maps.dims[i][1], maps.dims[i][2]);
  return all;
}

// A neighbour of an element, and the three weights of its row.
template <class A>
struct Tap {
  const A *source, *weight;
};

// Adds to S_k of so many vectors the sum over taps of weight[k] * source[at], as kept(value, j) keeps it of the j-th.
template <int blocks, class A, class Lanes, class Kept>
AIA_INLINE void sum_taps(const Tap<A>* tap, const Tap<A>* last, int64_t at, Lanes lanes, Vec<A> (&sums)[3][blocks],
                         Kept&& kept) {
  for (; tap < last; ++tap) {
    const Vec<A> w[3] = {splat(tap->weight[0]), splat(tap->weight[1]), splat(tap->weight[2])};
    for (int j = 0; j < blocks; ++j) {
      const Vec<A> value = in_register<A>(kept(load(tap->source + at + j * kLanes, lanes), j));
      for (int k = 0; k < 3; ++k) sums[k][j] += value * w[k];
    }
  }
}

// Slabs of a map as they are read: the box begins at `begin`, and whole vectors may be read before `end`.
template <class A>
struct Source {
  const A *begin, *end;
};

// out[i] for i in [begin, end), whole rows, by the taps [first, last). What follows is overwritten, up to `room`.
// together: they are whole slabs, whose first rows have none above and whose last rows have none below.
template <bool together, class A>
void correlate_rows(const Tap<A>* first, const Tap<A>* last, const Neighbours<A>& near, int64_t begin, int64_t end,
                    int64_t readable, const Ahead<A>& ahead, A* out, int64_t room) {
  // A vector is finished when its right neighbour is known: what it lacks till then, and what its neighbour needs.
  Vec<A> unfinished{}, s0{}, s2{};
  LaneSet<A> right{};
  int64_t i = begin, vector = 0;
  const auto advance = [&](auto blocks, auto lanes) {
    Vec<A> sums[3][blocks] = {};
    const auto all = [](Vec<A> v, int) { return v; };
    if constexpr (together) {
      const Tap<A>*here = first + (last - first) / 3, *below = last - (last - first) / 3;
      sum_taps<blocks, A>(first, here, i, lanes, sums,
                          [&](Vec<A> v, int j) { return keep_lanes<A>(near[vector + j].above, v); });
      sum_taps<blocks, A>(here, below, i, lanes, sums, all);
      sum_taps<blocks, A>(below, last, i, lanes, sums,
                          [&](Vec<A> v, int j) { return keep_lanes<A>(near[vector + j].below, v); });
    } else {
      sum_taps<blocks, A>(first, last, i, lanes, sums, all);
    }
    for (int j = 0; j < blocks; ++j, i += kLanes) {
      ahead.ask(i);
      if (i > begin) store(out + i - kLanes, unfinished + keep_lanes<A>(right, shift_down<A>(s2, sums[2][j])));
      unfinished = keep_lanes<A>(near[vector + j].left, shift_up<A>(s0, sums[0][j])) + sums[1][j];
      right = near[vector + j].right;
      s0 = sums[0][j], s2 = sums[2][j];
    }
    vector = near.behind(vector, blocks);
  };
  constexpr std::integral_constant<int, kLanes> full;
  const int64_t whole = std::min(end - begin + kLanes - 1, readable - begin) / kLanes;
  for (; i + kBlocks * kLanes <= begin + whole * kLanes;) advance(std::integral_constant<int, kBlocks>{}, full);
  switch (whole - (i - begin) / kLanes) {
    case 3: advance(std::integral_constant<int, 3>{}, full); break;
    case 2: advance(std::integral_constant<int, 2>{}, full); break;
    case 1: advance(std::integral_constant<int, 1>{}, full); break;
  }
  if (i < end) advance(std::integral_constant<int, 1>{}, static_cast<int>(end - i));
  i -= kLanes;
  store(out + i, unfinished + keep_lanes<A>(right, shift_down<A>(s2, Vec<A>{})),
        static_cast<int>(std::min<int64_t>(kLanes, room - i)));
}

// out[i] = sum over sources and taps of weight[source][k0][k1][k2] * source[i + k0 - 1 slabs + k1 - 1 rows + k2 - 1],
// with slabs of the sources `pitch` elements apart.
template <class A>
void correlate(const Box& at, std::initializer_list<Source<A>> sources, int64_t pitch, const A* weight,
               const Neighbours<A>& near, Ahead<A> ahead, A* out) {
  const int64_t length = at.length();
  for (int64_t s = 0, count; s < at.slabs; s += count, out += count * at.plane()) {
    count = slabs_together(at, s);
    const Taps k0(at.d0 + s, at.dims[0]);
    Tap<A> taps[18];  // by k1: the first and the last row leave out one
    int64_t n = 0;
    for (int k1 = 0; k1 < 3; ++k1) {
      const A* of_source = weight;
      for (const Source<A>& source : sources) {
        for (int k = k0.first; k < k0.last; ++k)
          taps[n++] = {source.begin + (s + k - 1) * pitch + (k1 - 1) * length, of_source + (k * 3 + k1) * 3};
        of_source += 27;
      }
    }
    if (count > 1) {
      correlate_rows<true, A>(taps, taps + n, near, 0, count * at.plane(), count * at.plane() + kLanes, ahead, out,
                              (at.slabs - s) * at.plane());
      for (const A*& p : ahead.of) p += count * at.plane();
      continue;
    }
    const int64_t room = at.whole() ? (at.slabs - s) * at.plane() : at.run();
    for_alike_rows(at, [&](int64_t begin, int64_t end, const Taps& k1) {
      int64_t readable = end + kLanes;
      for (const Source<A>& source : sources)
        readable =
            std::min<int64_t>(readable, source.end - source.begin - (s + k0.last - 2) * pitch - (k1.last - 2) * length);
      correlate_rows<false, A>(taps + k1.first * (n / 3), taps + k1.last * (n / 3), near, begin, end, readable, ahead,
                               out, room);
    });
    for (const A*& p : ahead.of) p += at.plane();
  }
}

template <class A>
struct Norm {
  A mean, rstd, weight, bias;
  explicit Norm(const A* row) : mean(row[0]), rstd(row[1]), weight(row[2]), bias(row[3]) {}
  AIA_INLINE Vec<A> normalized(Vec<A> z) const { return (z - mean) * rstd; }
  AIA_INLINE Vec<A> gate(Vec<A> normalized) const {
    return A(1) / (A(1) + exponential<A>(-(normalized * weight + bias)));
  }
  // du: the gradient of the sigmoid's argument from that of the gate.
  static AIA_INLINE Vec<A> through_gate(Vec<A> grad_gate, Vec<A> gate) {
    return rounded<A>(grad_gate * gate * (A(1) - gate));  // the same bits whether it is stored between or not
  }
};

// Calls body(position, lanes) for the vectors of n contiguous elements.
template <class Body>
AIA_INLINE void for_vectors(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, std::integral_constant<int, kLanes>{});
  if (i < n) body(i, static_cast<int>(n - i));
}

// The sum of value(position, lanes) over n contiguous elements, by four chains of additions side by side.
template <class A, class Value>
AIA_INLINE A sum_over(int64_t n, Value&& value) {
  constexpr int kChains = 4;
  constexpr std::integral_constant<int, kLanes> full;
  Vec<A> sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    for (int j = 0; j < kChains; ++j) sums[j] += value(i + j * kLanes, full);
  for_vectors(n - i, [&](int64_t rest, auto lanes) { sums[0] += value(i + rest, lanes); });
  return sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Slabs of a feature whose products with dz are summed at a time: all that a tap reaches where their sums stay in
// registers.
template <class A>
constexpr int kTapSlabs = kLanes == 16 && sizeof(A) == 4 ? 3 : 1;

// The sums of a tap's products, by the slab, the row and the column of the tap; row[j] is the feature as the taps of
// slab j / 3 and row j % 3 see it.
template <class A>
struct TapSums {
  Vec<A> of[3 * kTapSlabs<A>][3] = {};

  // Adds row[j][i] * dz[i - k2 + 1] of whole rows, or slabs (together), of n elements. Of rows or slabs that are not in
  // the map what row[j] points to is met too, and given back.
  template <bool together>
  __attribute__((noinline, flatten)) void add(const A* const (&row)[3 * kTapSlabs<A>],
                                              const bool (&inside)[3 * kTapSlabs<A>], const A* dz, int64_t n,
                                              const Neighbours<A>& near) {
    constexpr int rows = 3 * kTapSlabs<A>;
    Vec<A> total[rows][3];
#pragma GCC unroll 9
    for (int j = 0; j < rows; ++j)
      for (int k2 = 0; k2 < 3; ++k2) total[j][k2] = of[j][k2];
    int64_t vector = 0;
    for_vectors(n, [&](int64_t i, auto lanes) {
      const auto& masks = near[vector];
      const auto from_dz = [&](int64_t k) { return in_register<A>(keep<A>(load(dz + i + k), lanes)); };
      const Vec<A> shifted[3] = {in_register<A>(keep_lanes<A>(masks.right, from_dz(1))), from_dz(0),
                                 in_register<A>(keep_lanes<A>(masks.left, from_dz(-1)))};
#pragma GCC unroll 9
      for (int j = 0; j < rows; ++j) {
        Vec<A> value = load(row[j] + i, lanes);
        if (together && j % 3 != 1) value = keep_lanes<A>(j % 3 ? masks.below : masks.above, value);
        value = in_register<A>(value);
        for (int k2 = 0; k2 < 3; ++k2) total[j][k2] += value * shifted[k2];
      }
      vector = near.behind(vector, 1);
    });
#pragma GCC unroll 9
    for (int j = 0; j < rows; ++j)
      for (int k2 = 0; k2 < 3; ++k2) of[j][k2] = inside[j] ? total[j][k2] : of[j][k2];
  }
};

// out[9 k0 + 3 k1 + k2] = sum over the box of feature[i + k0 - 1 slabs + k1 - 1 rows] * dz[i - k2 + 1], the products of
// the weight's taps, for k0 from `first` on. `feature` is where the box begins. Outside the map both are zero.
template <class A>
void weight_taps(const Box& at, int first, const A* feature, const A* dz, int64_t pitch, const Neighbours<A>& near,
                 double* out) {
  constexpr int rows = 3 * kTapSlabs<A>;
  TapSums<A> sums;
  for (int64_t s = 0, count; s < at.slabs; s += count) {
    count = slabs_together(at, s);
    const Taps k0(at.d0 + s, at.dims[0]);
    if (first + kTapSlabs<A> <= k0.first || first >= k0.last) continue;
    const A *slab = feature + s * at.plane(), *row[rows];
    bool inside[rows];
    const auto meet = [&](const Taps& k1, int64_t begin) {
      for (int j = 0; j < rows; ++j) {
        const int slabs = first + j / 3, k = j % 3;
        inside[j] = k0.first <= slabs && slabs < k0.last && k1.first <= k && k < k1.last;
        row[j] = slab + begin + (inside[j] ? (slabs - 1) * at.plane() + (k - 1) * at.length() : 0);
      }
    };
    if (count > 1) {
      meet(Taps(1, 3), 0);
      sums.template add<true>(row, inside, dz + s * pitch, count * at.plane(), near);
      continue;
    }
    for_alike_rows(at, [&](int64_t begin, int64_t end, const Taps& k1) {
      meet(k1, begin);
      sums.template add<false>(row, inside, dz + s * pitch + begin, end - begin, near);
    });
  }
  for (int k = 0; k < 3 * rows; ++k) out[9 * first + k] = sum_lanes<A>(sums.of[k / 3][k % 3]);
}

// z = conv(pooled), box by box, to the packed clip.
template <class A>
class Convolution {
 public:
  explicit Convolution(const PackedDims& maps) : near_(neighbours_of<A>(maps)) {}

  void operator()(const PackedDims& maps, const Box& at, const A* pooled, const A* weight, A* clip) {
    const int64_t packed = maps.packed();
    const A *maximum = pooled + at.b * 2 * packed + at.start(), *end = pooled + maps.B * 2 * packed;
    const A *next = maximum + at.ahead_pooled, *next_out = clip + at.start() + at.ahead;
    correlate<A>(at, {{maximum, end}, {maximum + packed, end}}, at.plane(), weight + at.map * 54, near_[at.map],
                 {next, next + packed, next_out}, clip + at.start());
  }

 private:
  std::vector<Neighbours<A>> near_;
};

// The gates of a box; they may overwrite z.
template <class A>
void activate_box(const Norm<A>& bn, const Box& at, const A* z, A* gate) {
  for_pieces(at, [&](int64_t start, int64_t n) {
    for_vectors(n, [&](int64_t i, auto lanes) {
      store(gate + start + i, bn.gate(bn.normalized(load(z + start + i, lanes))), lanes);
    });
  });
}

template <class A>
void conv(const PackedDims& maps, const A* pooled, const A* weight, A* z, double* partial, int64_t begin, int64_t end) {
  Convolution<A> convolve(maps);
  for_each_box(maps, begin, end, [&](const Box& at) {
    A* clip = z + at.b * maps.packed();
    convolve(maps, at, pooled, weight, clip);
    A sum = 0;
    for_pieces(at, [&](int64_t start, int64_t size) {
      sum += sum_over<A>(size, [&](int64_t i, auto n) { return load(clip + start + i, n); });
    });
    const A mean = sum / static_cast<A>(at.size());
    Vec<A> deviations{};  // of which the sum tells how far the rounded mean is off
    A squares = 0;
    for_pieces(at, [&](int64_t start, int64_t size) {
      squares += sum_over<A>(size, [&](int64_t i, auto n) {
        const Vec<A> deviation = keep<A>(load(clip + start + i, n) - mean, n);
        deviations += deviation;
        return deviation * deviation;
      });
    });
    const double count = static_cast<double>(at.size()), off = sum_lanes<A>(deviations) / count;
    double* moments = partial + at.index * kMomentPartials;
    moments[0] = count, moments[1] = mean + off, moments[2] = squares - off * off * count;
  });
}

template <class A>
void conv_activate(const PackedDims& maps, const A* pooled, const A* weight, const A* norm, A* z, A* gate,
                   int64_t begin, int64_t end) {
  Convolution<A> convolve(maps);
  for_each_box(maps, begin, end, [&](const Box& at) {
    const int64_t clip = at.b * maps.packed();
    convolve(maps, at, pooled, weight, z + clip);
    activate_box(Norm<A>(norm + at.map * 4), at, z + clip, gate + clip);
  });
}

template <class A>
void activate(const PackedDims& maps, const A* z, const A* norm, A* gate, int64_t begin, int64_t end) {
  for_each_box(maps, begin, end, [&](const Box& at) {
    const int64_t clip = at.b * maps.packed();
    activate_box(Norm<A>(norm + at.map * 4), at, z + clip, gate + clip);
  });
}

template <class A>
void backward_reduce(const PackedDims& maps, const A* grad_gate, const A* z, const A* gate, const A* norm, A* grad,
                     double* partial, int64_t begin, int64_t end) {
  for_each_box(maps, begin, end, [&](const Box& at) {
    const int64_t clip = at.b * maps.packed();
    const Norm<A> bn(norm + at.map * 4);
    Vec<A> sum{}, sum_normalized{};
    // du_at(place in the packed maps, lanes, normalized).
    const auto add = [&](auto&& du_at) {
      for_pieces(at, [&](int64_t start, int64_t size) {
        for_vectors(size, [&](int64_t i, auto n) {
          const int64_t place = clip + start + i;
          const Vec<A> normalized = bn.normalized(load(z + place, n)), du = keep<A>(du_at(place, n, normalized), n);
          sum += du;
          sum_normalized += du * normalized;
        });
      });
    };
    if (gate)
      add([&](int64_t i, auto n, Vec<A>) {
        const Vec<A> du = bn.through_gate(load(grad_gate + i, n), load(gate + i, n));
        store(grad + i, du, n);
        return du;
      });
    else
      add([&](int64_t i, auto n, Vec<A> normalized) {
        return bn.through_gate(load(grad_gate + i, n), bn.gate(normalized));
      });
    double* sums = partial + at.index * kNormPartials;
    sums[0] = sum_lanes<A>(sum), sums[1] = sum_lanes<A>(sum_normalized);
  });
}

// The gradient of z in a box and what surrounds it in the map. Rows and slabs outside the map are not there.
template <class A>
class GradientOfZ {
 public:
  explicit GradientOfZ(const PackedDims& maps) {
    int64_t capacity = 0;
    for (int i = 0; i < maps.n; ++i) {
      const UnitSize unit = unit_size(maps, i);
      capacity = std::max(capacity, (unit.slabs + 2) * (unit.rows + 2) * maps.dims[i][2]);
    }
    data_.resize(capacity + (kBlocks + 2) * kLanes);
  }

  static int64_t pitch(const Box& at) { return at.whole() ? at.plane() : (at.rows + 2) * at.length(); }
  const A* begin(const Box& at) const { return data_.data() + kLanes + pitch(at) + at.length(); }
  const A* end() const { return data_.data() + data_.size(); }

  // Calls value(offset in the packed clip, lanes).
  template <class Value>
  void fill(const Box& at, Value&& value) {
    const int64_t first = at.d1 > 0 ? -1 : 0, rows = std::min(at.rows + 1, at.dims[1] - at.d1) - first;
    for (int64_t s = at.d0 > 0 ? -1 : 0; s < std::min(at.slabs + 1, at.dims[0] - at.d0); ++s) {
      const int64_t from = at.start() + s * at.plane() + first * at.length();
      A* to = data_.data() + (begin(at) - data_.data()) + s * pitch(at) + first * at.length();
      for_positions(rows * at.length(), [&](int64_t i, auto lanes) { store(to + i, value(from + i, lanes)); });
    }
  }

 private:
  std::vector<A> data_;
};

template <class A>
void backward(const PackedDims& maps, const A* grad, bool of_gate, const A* z, const A* norm, const A* correction,
              const A* pooled, const A* weight, A* grad_pooled, double* partial, int64_t begin, int64_t end) {
  const int64_t packed = maps.packed();
  const std::vector<Neighbours<A>> near = neighbours_of<A>(maps);
  GradientOfZ<A> dz(maps);
  for_each_box(maps, begin, end, [&](const Box& at) {
    const Norm<A> bn(norm + at.map * 4);
    const A scale = bn.weight * bn.rstd;
    const A mean_du = correction[at.map * 2], mean_du_normalized = correction[at.map * 2 + 1];
    const bool corrected = mean_du_normalized != A(0);  // else an infinite z would make a NaN of the zero
    const A *clip_z = z + at.b * packed, *clip_grad = grad + at.b * packed;
    const auto fill = [&](auto through) {
      dz.fill(at, [&](int64_t i, auto n) {
        const Vec<A> normalized = bn.normalized(load(clip_z + i, n)), given = load(clip_grad + i, n);
        const Vec<A> du = through ? bn.through_gate(given, bn.gate(normalized)) : given;
        return (du - mean_du - (corrected ? normalized * mean_du_normalized : Vec<A>{})) * scale;
      });
    };
    of_gate ? fill(std::true_type{}) : fill(std::false_type{});
    for (int i = 0; i < 2; ++i) {
      A mirrored[27];
      for (int k = 0; k < 27; ++k) mirrored[k] = weight[at.map * 54 + i * 27 + 26 - k];
      const A *feature = pooled + at.b * 2 * packed + at.start(), *of_next = feature + at.ahead_pooled;
      A* out = grad_pooled + (at.b * 2 + i) * packed + at.start();
      const int64_t next = at.start() + at.ahead;
      const Ahead<A> ahead = i ? Ahead<A>{of_next, of_next + packed, out + at.ahead_pooled}
                               : Ahead<A>{clip_z + next, clip_grad + next, out + at.ahead_pooled};
      correlate<A>(at, {{dz.begin(at), dz.end()}}, dz.pitch(at), mirrored, near[at.map], ahead, out);
    }
    for (int i = 0; i < 2; ++i)
      for (int k0 = 0; k0 < 3; k0 += kTapSlabs<A>)
        weight_taps<A>(at, k0, pooled + (at.b * 2 + i) * packed + at.start(), dz.begin(at), dz.pitch(at), near[at.map],
                       partial + at.index * kWeightPartials + i * 27);
  });
}

template <class A>
constexpr GatePasses<A> kPasses = {conv<A>, activate<A>, conv_activate<A>, backward_reduce<A>, backward<A>};

}  // namespace

}  // namespace aia::cpu::AIA_CPU_LEVEL

namespace aia::cpu {

using namespace AIA_CPU_LEVEL;

template <class A>
const GatePasses<A> GatePasses<A>::AIA_CPU_LEVEL = kPasses<A>;
template struct GatePasses<float>;
template struct GatePasses<double>;

}  // namespace aia::cpu
