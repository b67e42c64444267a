// CBAM on the CPU. See aia_kernels/schemas.py for what each pass computes.
//
// Lanes lie along the columns of a sample (cbam.h). Rows are met four at a time: what belongs to the columns, a gate or
// the accumulators of a sum over rows, is then loaded once for four vectors of x.
#include "cbam.h"

#include <limits>
#include <memory>
#include <vector>

#include "lane_memory.h"
#include "untyped.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

constexpr std::integral_constant<int, kLanes> kFull;

// Calls body(i, lanes) for the vectors of n elements. The last one overlaps its neighbour, which does to elements twice
// what is done to each alone, and spares a remainder.
template <class Body>
AIA_INLINE void for_vectors(int64_t n, Body&& body) {
  if (n < kLanes) return body(int64_t{0}, static_cast<int>(n));
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) body(i, kFull);
  if (n % kLanes) body(n - kLanes, kFull);
}
inline int64_t slots(int64_t n) { return (n + kLanes - 1) / kLanes; }
// The accumulator of the vector at i.
inline int64_t slot(int64_t i) { return slots(i); }

// All lanes, or those that no vector before this one has met.
template <class A>
struct Every {
  AIA_INLINE Vec<A> operator()(Vec<A> v, Vec<A>) const { return v; }
};
template <class A>
struct Fresh {
  IVec<A> lanes;
  AIA_INLINE Vec<A> operator()(Vec<A> v, Vec<A> other) const { return lanes ? v : other; }
};

// As for_vectors, from i on; body(i, lanes, fresh) gets fresh(v, other): v in the lanes that are met for the first
// time.
template <class A, class Body>
AIA_INLINE void for_vectors_once(int64_t i, int64_t n, Body&& body) {
  for (; i + kLanes <= n; i += kLanes) body(i, kFull, Every<A>{});
  if (i == n) return;
  if (n < kLanes)
    body(int64_t{0}, static_cast<int>(n), Fresh<A>{iota<A>() < splat_index<A>(n)});
  else
    body(n - kLanes, kFull, Fresh<A>{iota<A>() >= splat_index<A>(kLanes - n % kLanes)});
}

// Indices are all of 32 bits here.
template <class A, class Lanes>
AIA_INLINE IVec<A> load_index32(const int32_t* p, Lanes n) {
  if (n < kLanes) return detail::load_index_part<A>(p, n);
  typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
  I32 index;
  __builtin_memcpy(&index, p, sizeof index);
  return __builtin_convertvector(index, IVec<A>);
}
template <class A, class Lanes>
AIA_INLINE void store_index32(int32_t* p, IVec<A> wide, Lanes n) {
  if (n < kLanes) return detail::store_index_part<A>(p, wide, n);
  typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
  const I32 index = __builtin_convertvector(wide, I32);
  __builtin_memcpy(p, &index, sizeof index);
}

template <class A>
constexpr A kLowest = -std::numeric_limits<A>::infinity();

template <class A>
struct Pooled {
  Vec<A> sum{}, max = splat(kLowest<A>);
  IVec<A> argmax = iota<A>();

  AIA_INLINE void add(Vec<A> v, IVec<A> index) {
    sum += v;
    max_first<A>(v, index, max, argmax);
  }
};

// n values of what is absent.
template <class A>
const A* or_constant(const A* given, A value, int64_t n, std::vector<A>& room) {
  if (given) return given;
  room.assign(n, value);
  return room.data();
}

// Calls each(b, first, last) for the rows of each unit.
template <class Each>
AIA_INLINE void for_rows_of_units(const Matrix& x, int64_t begin, int64_t end, Each&& each) {
  const int64_t rows = unit_rows(x), runs = (x.rows + rows - 1) / rows;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % runs * rows;
    each(unit / runs, first, std::min(x.rows, first + rows));
  }
}

// A tile of a sample, the part-th from above: rows [first, last), and n columns from `column` on.
struct Tile {
  int64_t b, part, first, last, of_columns, column, n;
};
template <class Each>
AIA_INLINE void for_tiles(const Matrix& x, const Parts& parts, int64_t begin, int64_t end, Each&& each) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t of_columns = unit % parts.of_columns, part = unit / parts.of_columns % parts.of_rows;
    const int64_t first = part * parts.rows, column = of_columns * parts.columns;
    each(Tile{unit / parts.of_columns / parts.of_rows, part, first, std::min(x.rows, first + parts.rows), of_columns,
              column, std::min(parts.columns, x.columns - column)});
  }
}

// Calls some(r, count) for the rows from first to last: four by four, and one by one those that are left.
template <class Some>
AIA_INLINE void for_some_rows(int64_t first, int64_t last, Some&& some) {
  int64_t r = first;
  for (; r + 4 <= last; r += 4) some(r, std::integral_constant<int, 4>{});
  for (; r < last; ++r) some(r, std::integral_constant<int, 1>{});
}

// A row of n elements, times a gate where there is one. Lanes beyond its end are -inf as maxima see them.
template <class T, bool kGated, class A = Accumulate<T>>
struct GatedRow {
  const T* data;
  const A* gate;
  int64_t n;

  template <class Lanes>
  AIA_INLINE Vec<A> operator()(int64_t i, Lanes lanes) const {
    const Vec<A> v = load(data + i, lanes);
    return kGated ? v * load(gate + i, lanes) : v;
  }
  // The vector at i, at most, that ends inside the row: a short row has but one.
  AIA_INLINE Vec<A> candidates(int64_t i) const {
    if (n >= kLanes) return (*this)(i, kFull);
    return iota<A>() < splat_index<A>(n) ? (*this)(0, static_cast<int>(n)) : splat(kLowest<A>);
  }
};

// By two chains of each, which wait for themselves. A NaN leaves a sum of NaN, and any maximum.
template <class A, class Row>
AIA_INLINE void sum_and_max(const Row& row, Vec<A>& sum, Vec<A>& max) {
  Vec<A> odd_sum{}, odd_max = splat(kLowest<A>);
  sum = odd_sum, max = odd_max;
  int64_t i = 0;
  for (; i + 2 * kLanes <= row.n; i += 2 * kLanes) {
    const Vec<A> even = row(i, kFull), odd = row(i + kLanes, kFull);
    sum += even, odd_sum += odd;
    max = larger<A>(even, max), odd_max = larger<A>(odd, odd_max);
  }
  for_vectors_once<A>(i, row.n, [&](int64_t at, auto lanes, auto fresh) {
    const Vec<A> v = row(at, lanes);
    sum += fresh(v, Vec<A>{});
    max = larger<A>(fresh(v, splat(kLowest<A>)), max);
  });
  sum += odd_sum;
  max = larger<A>(odd_max, max);
}

// The first element of a row for which found(vector) has a bit, or n. Four vectors are asked at a time, the last ones
// of a row in part again: one branch, which few rows take twice.
template <class Row, class Found>
AIA_INLINE int64_t first_where(const Row& row, Found&& found) {
  const int64_t last = std::max<int64_t>(0, row.n - kLanes);
  for (int64_t i = 0; i < row.n; i += 4 * kLanes) {
    const int64_t begin = std::min(i, last);
    uint64_t bits = 0;
    for (int k = 0; k < 4; ++k) {
      const int64_t at = std::min(begin + k * kLanes, last);
      bits |= static_cast<uint64_t>(found(row.candidates(at))) << (at - begin);
    }
    if (bits) return begin + __builtin_ctzll(bits);
  }
  return row.n;
}

// Of as many rows as there are lanes or fewer, rows(k): first sums and maxima, in the fewest instructions, and then for
// each maximum where it is.
template <class A, class Rows>
AIA_INLINE void pool_some_rows(int count, Rows&& rows, A share, A* maximum, A* mean, int32_t* argmax) {
  Vec<A> sums[kLanes] = {}, maxima[kLanes] = {};
  for (int k = 0; k < count; ++k) sum_and_max<A>(rows(k), sums[k], maxima[k]);
  const Vec<A> sum = join_each<A, kLanes>([&](int i) { return sums[i]; }, [](Vec<A> a, Vec<A> b) { return a + b; });
  const Vec<A> max =
      join_each<A, kLanes>([&](int i) { return maxima[i]; }, [](Vec<A> a, Vec<A> b) { return larger<A>(a, b); });
  store(maximum, max, count);
  store(mean, sum * share, count);
  const unsigned numbers = equal_lanes<A>(sum, sum);
  for (int k = 0; k < count; ++k) {
    const auto row = rows(k);
    int64_t at = row.n;
    if (!(numbers >> k & 1)) at = first_where(row, [](Vec<A> v) { return ~equal_lanes<A>(v, v) & kAllLanes; });
    if (at < row.n)
      maximum[k] = std::numeric_limits<A>::quiet_NaN();
    else
      at = first_where(row, [m = splat(maximum[k])](Vec<A> v) { return equal_lanes<A>(v, m); });
    argmax[k] = static_cast<int32_t>(at);
  }
}

template <class T, bool kGated>
void pool_gated_columns(const Matrix& x, const T* data, const Accumulate<T>* gate, Accumulate<T>* pooled,
                        int32_t* argmax, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const A share = A(1) / static_cast<A>(x.columns);
  for_rows_of_units(x, begin, end, [&](int64_t b, int64_t first, int64_t last) {
    A *maximum = pooled + b * 2 * x.rows, *mean = maximum + x.rows;
    const A* factors = kGated ? gate + b * x.columns : nullptr;
    for (int64_t r = first; r < last; r += kLanes) {
      const T* rows = data + b * x.size() + r * x.columns;
      pool_some_rows<A>(
          static_cast<int>(std::min<int64_t>(kLanes, last - r)),
          [&](int k) { return GatedRow<T, kGated>{rows + k * x.columns, factors, x.columns}; }, share, maximum + r,
          mean + r, argmax + b * x.rows + r);
    }
  });
}

template <class T>
void pool_columns(const Matrix& x, const T* data, const Accumulate<T>* gate, Accumulate<T>* pooled, int32_t* argmax,
                  int64_t begin, int64_t end) {
  const auto pass = gate ? pool_gated_columns<T, true> : pool_gated_columns<T, false>;
  pass(x, data, gate, pooled, argmax, begin, end);
}

template <class T>
void pool_rows(const Matrix& x, const Parts& parts, const T* data, const Accumulate<T>* gate, double share,
               Accumulate<T>* pooled, int32_t* argmax, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t room = slots(parts.columns);
  std::unique_ptr<Pooled<A>[]> kept(new Pooled<A>[room]);
  for_tiles(x, parts, begin, end, [&](const Tile& at) {
    Pooled<A>* __restrict acc = kept.get();
    std::fill_n(acc, room, Pooled<A>{{}, splat(kLowest<A>), splat_index<A>(at.first)});
    const T* tile = data + at.b * x.size() + at.column;
    for_some_rows(at.first, at.last, [&](int64_t r, auto some) {
      constexpr int count = some;
      A factor[count];
      for (int k = 0; k < count; ++k) factor[k] = gate ? gate[at.b * x.rows + r + k] : A(1);
      for_vectors(at.n, [&](int64_t i, auto lanes) {
        Pooled<A> total = acc[slot(i)];
        for (int k = 0; k < count; ++k)
          total.add(load(tile + (r + k) * x.columns + i, lanes) * factor[k], splat_index<A>(r + k));
        acc[slot(i)] = total;
      });
    });
    const int64_t part = at.b * parts.of_rows + at.part;
    A* maximum = pooled + part * 2 * x.columns + at.column;
    int32_t* index = argmax + part * x.columns + at.column;
    for_vectors(at.n, [&](int64_t i, auto lanes) {
      const Pooled<A>& total = acc[slot(i)];
      store(maximum + i, total.max, lanes);
      store(maximum + x.columns + i, total.sum * static_cast<A>(share), lanes);
      store_index32<A>(index + i, total.argmax, lanes);
    });
  });
}

template <class A>
void join_pooled(const Matrix& x, const Parts& parts, const A* from, const int32_t* indices, A* pooled, int32_t* argmax,
                 int64_t begin, int64_t end) {
  const int64_t n = x.columns;
  for (int64_t b = begin; b < end; ++b)
    for_vectors(n, [&](int64_t i, auto lanes) {
      Pooled<A> total;
      total.argmax = IVec<A>{};
      for (int64_t part = b * parts.of_rows; part < (b + 1) * parts.of_rows; ++part) {
        const A* maximum = from + part * 2 * n + i;
        total.sum += load(maximum + n, lanes);
        max_first<A>(load(maximum, lanes), load_index32<A>(indices + part * n + i, lanes), total.max, total.argmax);
      }
      A* maximum = pooled + b * 2 * n + i;
      store(maximum, total.max, lanes);
      store(maximum + n, total.sum / static_cast<A>(x.rows), lanes);
      store_index32<A>(argmax + b * n + i, total.argmax, lanes);
    });
}

template <class T>
void recalibrate(const Matrix& x, const T* data, const Accumulate<T>* of_rows, const Accumulate<T>* of_columns, T* y,
                 T* confounder, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  std::vector<A> ones;
  for_rows_of_units(x, begin, end, [&](int64_t b, int64_t first, int64_t last) {
    const A* gate = or_constant<A>(of_columns ? of_columns + b * x.columns : nullptr, 1, x.columns, ones);
    for (int64_t r = first; r < last; ++r) {
      const int64_t row = b * x.size() + r * x.columns;
      const A factor = of_rows ? of_rows[b * x.rows + r] : A(1);
      const auto each = [&](auto both) {
        for_vectors(x.columns, [=](int64_t i, auto lanes) {
          const Vec<A> v = load(data + row + i, lanes), product = v * (load(gate + i, lanes) * factor);
          store(y + row + i, product, lanes);
          if (both) store(confounder + row + i, v - product, lanes);
        });
      };
      if (confounder)
        each(std::true_type{});
      else
        each(std::false_type{});
    }
  });
}

// The gradient of y = x - confounder, on a vector.
template <class T, bool kConfounder, class Lanes, class A = Accumulate<T>>
AIA_INLINE Vec<A> gradient(const T* grad_y, const T* grad_confounder, int64_t i, Lanes lanes) {
  const Vec<A> g = load(grad_y + i, lanes);
  return kConfounder ? g - load(grad_confounder + i, lanes) : g;
}

template <class T, bool kConfounder>
void reduce_tiles(const Matrix& x, const Parts& parts, const T* grad_y, const T* grad_confounder, const T* data,
                  const Accumulate<T>* of_rows, const Accumulate<T>* of_columns, Accumulate<T>* over_columns,
                  Accumulate<T>* over_rows, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  std::vector<A> ones;
  std::unique_ptr<Vec<A>[]> kept(new Vec<A>[slots(parts.columns)]);
  for_tiles(x, parts, begin, end, [&](const Tile& at) {
    Vec<A>* __restrict acc = kept.get();
    std::fill_n(acc, slots(at.n), Vec<A>{});
    const A* gate = of_columns ? of_columns + at.b * x.columns + at.column : nullptr;
    gate = or_constant<A>(gate, 1, at.n, ones);
    A* row_sums = over_columns + (at.b * parts.of_columns + at.of_columns) * x.rows;
    for_some_rows(at.first, at.last, [&](int64_t r, auto some) {
      constexpr int count = some;
      const int64_t start = at.b * x.size() + r * x.columns + at.column;
      A factor[count];
      Vec<A> over_row[count];
      for (int k = 0; k < count; ++k) {
        factor[k] = of_rows ? of_rows[at.b * x.rows + r + k] : A(1);
        over_row[k] = Vec<A>{};
      }
      for_vectors_once<A>(0, at.n, [&](int64_t i, auto lanes, auto fresh) {
        const Vec<A> g = load(gate + i, lanes);
        Vec<A> total = acc[slot(i)];
        for (int k = 0; k < count; ++k) {
          const int64_t place = start + k * x.columns + i;
          const Vec<A> q = gradient<T, kConfounder>(grad_y, grad_confounder, place, lanes) * load(data + place, lanes);
          over_row[k] += fresh(q * g, Vec<A>{});
          total += q * factor[k];
        }
        acc[slot(i)] = total;
      });
      for (int k = 0; k < count; ++k) row_sums[r + k] = sum_lanes<A>(over_row[k]);
    });
    A* sums = over_rows + (at.b * parts.of_rows + at.part) * x.columns + at.column;
    for_vectors(at.n, [&](int64_t i, auto lanes) { store(sums + i, acc[slot(i)], lanes); });
  });
}

template <class T>
void recalibrate_reduce(const Matrix& x, const Parts& parts, const T* grad_y, const T* grad_confounder, const T* data,
                        const Accumulate<T>* of_rows, const Accumulate<T>* of_columns, Accumulate<T>* over_columns,
                        Accumulate<T>* over_rows, int64_t begin, int64_t end) {
  const auto reduce = grad_confounder ? reduce_tiles<T, true> : reduce_tiles<T, false>;
  reduce(x, parts, grad_y, grad_confounder, data, of_rows, of_columns, over_columns, over_rows, begin, end);
}

// A gate, and what the pooled features of its axis send back: that of the mean to every element, and that of the
// maximum to where it was. Of one row: its indices count columns.
template <class A>
struct OfRow {
  A gate = 1, mean = 0, peak = 0;
  int64_t argmax = -1;

  OfRow(const Side& side, int64_t n, int64_t b, int64_t r, A share) {
    if (side.gate) gate = static_cast<const A*>(side.gate)[b * n + r];
    if (!side.grad) return;
    const A* grad = static_cast<const A*>(side.grad) + b * 2 * n + r;
    peak = grad[0], mean = grad[n] * share, argmax = side.argmax[b * n + r];
  }
  AIA_INLINE Vec<A> unpooled(int64_t i) const {
    return add_where<A>(iota<A>() + splat_index<A>(i) == splat_index<A>(argmax), splat(mean), splat(peak));
  }
};

// The same of some of the n columns: their indices count rows, of which r is met.
template <class A>
struct SomeColumns {
  Vec<A> gate, mean, peak;
  IVec<A> argmax;

  AIA_INLINE Vec<A> unpooled(int64_t r) const { return add_where<A>(argmax == splat_index<A>(r), mean, peak); }
};
template <class A>
class OfColumns {
 public:
  OfColumns(const Side& side, int64_t n, A share) : side_(side), n_(n), share_(share) {}

  // Sample b.
  void meet(int64_t b) {
    gate_ = or_constant<A>(side_.gate ? static_cast<const A*>(side_.gate) + b * n_ : nullptr, 1, n_, ones_);
    peak_ = or_constant<A>(side_.grad ? static_cast<const A*>(side_.grad) + b * 2 * n_ : nullptr, 0, n_, zeros_);
    mean_ = side_.grad ? peak_ + n_ : peak_;
    argmax_ = or_constant<int32_t>(side_.argmax ? side_.argmax + b * n_ : nullptr, -1, n_, none_);
  }

  template <class Lanes>
  AIA_INLINE SomeColumns<A> at(int64_t i, Lanes lanes) const {
    return {load(gate_ + i, lanes), load(mean_ + i, lanes) * share_, load(peak_ + i, lanes),
            load_index32<A>(argmax_ + i, lanes)};
  }

 private:
  const Side& side_;
  int64_t n_;
  A share_;
  const A *gate_ = nullptr, *peak_ = nullptr, *mean_ = nullptr;
  const int32_t* argmax_ = nullptr;
  std::vector<A> ones_, zeros_;
  std::vector<int32_t> none_;
};

template <class T>
void reduce_channel_rows(const Matrix& x, const T* data, const Side& spatial, Accumulate<T>* sums, int64_t begin,
                         int64_t end) {
  using A = Accumulate<T>;
  const A share = A(1) / static_cast<A>(x.channels());
  for_rows_of_units(x, begin, end, [&](int64_t b, int64_t first, int64_t last) {
    const A *peak = static_cast<const A*>(spatial.grad) + b * 2 * x.columns, *mean = peak + x.columns;
    const int32_t* argmax = spatial.argmax + b * x.columns;
    for_some_rows(first, last, [&](int64_t r, auto some) {
      constexpr int count = some;
      const T* rows = data + b * x.size() + r * x.columns;
      Vec<A> over_row[count];
      for (int k = 0; k < count; ++k) over_row[k] = Vec<A>{};
      for_vectors_once<A>(0, x.columns, [&](int64_t i, auto lanes, auto fresh) {
        const Vec<A> all = load(mean + i, lanes) * share, one = load(peak + i, lanes);
        const IVec<A> where = load_index32<A>(argmax + i, lanes);
        for (int k = 0; k < count; ++k) {
          const Vec<A> u = add_where<A>(where == splat_index<A>(r + k), all, one);
          over_row[k] += fresh(load(rows + k * x.columns + i, lanes) * u, Vec<A>{});
        }
      });
      for (int k = 0; k < count; ++k) sums[b * x.rows + r + k] = sum_lanes<A>(over_row[k]);
    });
  });
}

template <class T>
void reduce_channel_columns(const Matrix& x, const Parts& parts, const T* data, const Side& spatial,
                            Accumulate<T>* sums, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const A share = A(1) / static_cast<A>(x.channels());
  std::unique_ptr<Vec<A>[]> kept(new Vec<A>[slots(parts.columns)]);
  for_tiles(x, parts, begin, end, [&](const Tile& at) {
    Vec<A>* __restrict acc = kept.get();
    std::fill_n(acc, slots(at.n), Vec<A>{});
    for_some_rows(at.first, at.last, [&](int64_t r, auto some) {
      constexpr int count = some;
      const T* rows = data + at.b * x.size() + r * x.columns + at.column;
      const auto side = [&](int k) { return OfRow<A>(spatial, x.rows, at.b, r + k, share); };
      const OfRow<A> of[4] = {side(0), side(count > 1), side(count > 1 ? 2 : 0), side(count > 1 ? 3 : 0)};
      for_vectors(at.n, [&](int64_t i, auto lanes) {
        Vec<A> total = acc[slot(i)];
        for (int k = 0; k < count; ++k) total += load(rows + k * x.columns + i, lanes) * of[k].unpooled(at.column + i);
        acc[slot(i)] = total;
      });
    });
    A* to = sums + (at.b * parts.of_rows + at.part) * x.columns + at.column;
    for_vectors(at.n, [&](int64_t i, auto lanes) { store(to + i, acc[slot(i)], lanes); });
  });
}

template <class T>
void unpool_reduce(const Matrix& x, const Parts& parts, const T* data, const Side& spatial, Accumulate<T>* sums,
                   int64_t begin, int64_t end) {
  if (x.rows_are_channels)
    reduce_channel_rows<T>(x, data, spatial, sums, begin, end);
  else
    reduce_channel_columns<T>(x, parts, data, spatial, sums, begin, end);
}

template <class A>
void join_sums(int64_t parts, int64_t n, const A* from, A* to, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b)
    for_vectors(n, [&](int64_t i, auto lanes) {
      Vec<A> total{};
      for (int64_t part = b * parts; part < (b + 1) * parts; ++part) total += load(from + part * n + i, lanes);
      store(to + b * n + i, total, lanes);
    });
}

// Rows that are so short are met four at a time where a level has registers for it: what belongs to columns, most of
// what is loaded, is loaded once for all four. Four longer ones would be four streams of memory, which are slower.
constexpr int64_t kShortRow = 4 * kLanes;
inline bool met_in_fours(const Matrix& x) { return kMasks && x.columns <= kShortRow; }

// Rows r to r + count of a sample, whose elements begin at `at`.
template <class T, bool kConfounder, bool kRowsAreChannels, int count, class A = Accumulate<T>>
AIA_INLINE void unpool_some_rows(const Matrix& x, const T* grad_y, const T* grad_confounder, const OfRow<A>* rows,
                                 const OfColumns<A>& columns, int64_t r, int64_t at, T* grad_x) {
  for_vectors(x.columns, [&](int64_t i, auto lanes) {
    const SomeColumns<A> column = columns.at(i, lanes);
    for (int k = 0; k < count; ++k) {
      const int64_t place = at + k * x.columns + i;
      const Vec<A> g = gradient<T, kConfounder>(grad_y, grad_confounder, place, lanes);
      const Vec<A> of_row = rows[k].unpooled(i), of_column = column.unpooled(r + k);
      Vec<A> out = kRowsAreChannels ? (g * column.gate + of_column) * rows[k].gate + of_row
                                    : (g * rows[k].gate + of_row) * column.gate + of_column;
      if (kConfounder) out += load(grad_confounder + place, lanes);
      store(grad_x + place, out, lanes);
    }
  });
}

template <class T, bool kConfounder, bool kRowsAreChannels>
void unpool_rows(const Matrix& x, const T* grad_y, const T* grad_confounder, const Side& channel, const Side& spatial,
                 T* grad_x, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const A of_channel = A(1) / static_cast<A>(x.positions()), of_spatial = A(1) / static_cast<A>(x.channels());
  const Side &of_rows = kRowsAreChannels ? channel : spatial, &of_columns = kRowsAreChannels ? spatial : channel;
  OfColumns<A> columns(of_columns, x.columns, kRowsAreChannels ? of_spatial : of_channel);
  for_rows_of_units(x, begin, end, [&](int64_t b, int64_t first, int64_t last) {
    columns.meet(b);
    const auto some = [&](int64_t r, auto count) {
      const auto rows = at_each<count>(
          [&](int k) { return OfRow<A>(of_rows, x.rows, b, r + k, kRowsAreChannels ? of_channel : of_spatial); });
      unpool_some_rows<T, kConfounder, kRowsAreChannels, count>(x, grad_y, grad_confounder, rows.data(), columns, r,
                                                                b * x.size() + r * x.columns, grad_x);
    };
    const int64_t in_fours = met_in_fours(x) ? last : first;
    for_some_rows(first, in_fours, some);
    for (int64_t r = in_fours; r < last; ++r) some(r, std::integral_constant<int, 1>{});
  });
}

template <class T>
void unpool(const Matrix& x, const T* grad_y, const T* grad_confounder, const Side& channel, const Side& spatial,
            T* grad_x, int64_t begin, int64_t end) {
  const auto pass = x.rows_are_channels ? grad_confounder ? unpool_rows<T, true, true> : unpool_rows<T, false, true>
                    : grad_confounder   ? unpool_rows<T, true, false>
                                        : unpool_rows<T, false, false>;
  pass(x, grad_y, grad_confounder, channel, spatial, grad_x, begin, end);
}

template <class T, class A = Accumulate<T>>
constexpr CbamPasses kPasses = {
    untyped<pool_columns<T>>,       untyped<pool_rows<T>>,     untyped<join_pooled<A>>, untyped<recalibrate<T>>,
    untyped<recalibrate_reduce<T>>, untyped<unpool_reduce<T>>, untyped<join_sums<A>>,   untyped<unpool<T>>};

}  // namespace

}  // namespace aia::cpu::AIA_CPU_LEVEL

namespace aia::cpu {

using namespace AIA_CPU_LEVEL;

const CbamPasses CbamPasses::AIA_CPU_LEVEL[] = {kPasses<float>, kPasses<double>, kPasses<bf16>, kPasses<f16>};

}  // namespace aia::cpu
