// The feature maps of attention by a memory per sample on the CPU, forward and backward. See aia_kernels/schemas.py for
// what each pass computes, and aia_kernels/algorithms/linear_attention.py for the letters.
//
// Lanes are tokens. A token's rows are met a few times, each time for some vectors of tokens side by side: once for the
// length, the mass or the maximum, and once for what is divided by it. They stay in cache in between.
#include "memory.h"

#include <cmath>
#include <limits>

#include "exponential.h"
#include "tile.h"
#include "untyped.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

// Vectors of tokens met side by side; tokens after which the sums of a long row begin anew, as its lanes would lose
// digits.
constexpr int kVectors = 4;
constexpr int64_t kChunk = 4096;

// Calls body(n, vectors, lanes) for tokens [first, last): that many vectors from token n on.
template <class Body>
AIA_INLINE void for_spans(int64_t first, int64_t last, Body&& body) {
  constexpr std::integral_constant<int, kLanes> whole;
  int64_t n = first;
  for (; n + kVectors * kLanes <= last; n += kVectors * kLanes) body(n, std::integral_constant<int, kVectors>{}, whole);
  for (; n + kLanes <= last; n += kLanes) body(n, std::integral_constant<int, 1>{}, whole);
  if (n < last) body(n, std::integral_constant<int, 1>{}, static_cast<int>(last - n));
}

// Which tokens of a span are there and take part; the others are made 0, whatever they hold.
template <class A, int kCount>
struct Shown {
  bool all;
  IVec<A> mask[kCount];

  template <class Lanes>
  AIA_INLINE Shown(const uint8_t* padding, Lanes lanes) : all(!padding && lanes == kLanes) {
    if (all) return;
    for (int j = 0; j < kCount; ++j) {
      mask[j] = iota<A>() < splat_index<A>(lanes);
      if (padding) mask[j] &= load_index<A>(padding + j * kLanes, static_cast<int>(lanes)) == IVec<A>{};
    }
  }
  AIA_INLINE Vec<A> keep(int j, Vec<A> v) const { return all ? v : keep_where<A>(mask[j], v); }
  AIA_INLINE Vec<A> or_else(int j, Vec<A> v, A other) const {
    if (all) return v;
    return mask[j] ? v : splat(other);
  }
};

template <class A>
AIA_INLINE Vec<A> sum_of(const Vec<A> (&v)[kVectors]) {
  return (v[0] + v[1]) + (v[2] + v[3]);
}
template <class A>
AIA_INLINE Vec<A> sum_of(const Vec<A> (&v)[1]) {
  return v[0];
}

// 1 where it is zero.
template <class A>
AIA_INLINE Vec<A> no_zero(Vec<A> v) {
  return v == Vec<A>{} ? splat(A(1)) : v;
}

template <class A>
AIA_INLINE Vec<A> square_root(Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return detail::bit_cast<Vec<A>>(_mm512_sqrt_ps(detail::bit_cast<__m512>(v)));
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return detail::bit_cast<Vec<A>>(_mm256_sqrt_ps(detail::bit_cast<__m256>(v)));
#elif defined(__SSE2__)
  if constexpr (sizeof(A) == 4) return detail::bit_cast<Vec<A>>(_mm_sqrt_ps(detail::bit_cast<__m128>(v)));
#endif
  for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

// A head's tokens in one unit.
struct Tile {
  int64_t head, b, h, first, last;

  Tile(const Memory& at, int64_t unit)
      : head(unit / tiles(at)),
        b(head / at.H),
        h(head % at.H),
        first(unit % tiles(at) * tile_tokens(at)),
        last(std::min(at.N, first + tile_tokens(at))) {}
};

inline const uint8_t* padding_of(const Memory& at, int64_t b, int64_t n) {
  return at.padding ? at.padding + b * at.N + n : nullptr;
}
// Where a head's keys and its queries begin in logits.
inline int64_t keys_of(const Memory& at, int64_t b, int64_t h) { return (b * 2 * at.H + h) * at.d * at.N; }
inline int64_t queries_of(const Memory& at, int64_t b, int64_t h) { return keys_of(at, b, h) + at.H * at.d * at.N; }
// Where the gradients of a head's keys and of its queries begin in rows, behind phi(k).
inline int64_t grad_keys_of(const Memory& at, int64_t b, int64_t h) {
  return (b * at.H * (at.R() + 2 * at.d) + at.H * at.R() + h * at.d) * at.N;
}
inline int64_t grad_queries_of(const Memory& at, int64_t b, int64_t h) {
  return grad_keys_of(at, b, h) + at.H * at.d * at.N;
}

// Sums of rows over tokens, a vector each.
template <class A>
class Sums {
 public:
  explicit Sums(int64_t rows) : rows_(rows), sums_(rows) { clear(); }
  void clear() { std::fill_n(static_cast<Vec<A>*>(sums_), rows_, Vec<A>{}); }
  AIA_INLINE void add(int64_t row, Vec<A> v) { sums_[row] += v; }
  void write(A* out) {
    for (int64_t r = 0; r < rows_; ++r) out[r] = sum_lanes<A>(sums_[r]);
  }

 private:
  int64_t rows_;
  Buffer<A> sums_;
};

// What a head's queries are divided by, (s + eps) / N of each row, eps not for the constant 1; none for a softmax.
template <class A>
class Divisor {
 public:
  Divisor(const Memory& at, const A* sums, A eps) : sums_(sums), eps_(eps), share_(A(1) / static_cast<A>(at.N)) {
    first_ = at.feature == Feature::kL2 ? 1 : 0;
    rows_ = at.R();
    weights_.reset(new A[rows_]);
  }
  const A* of(int64_t head) {
    for (int64_t r = 0; r < rows_; ++r)
      weights_[r] = sums_[head * rows_ + r] * share_ + (r < first_ ? A(0) : eps_ * share_);
    return weights_.get();
  }
  A share() const { return share_; }

 private:
  const A* sums_;
  A eps_, share_;
  int64_t first_, rows_;
  std::unique_ptr<A[]> weights_;
};

template <class T, class A = Accumulate<T>>
A gamma_of(const T* gamma) {
  return gamma ? load(gamma, 1)[0] : A(1);
}

// The inverse length of each token of a span over rows from z on; 1 where that is zero.
template <int kCount, class T, class Lanes, class A = Accumulate<T>>
AIA_INLINE void inverse_lengths(const Memory& at, const T* z, Lanes lanes, Vec<A> (&inverse)[kCount]) {
  Vec<A> square[kCount] = {};
  for (int64_t r = 0; r < at.d; ++r)
    for (int j = 0; j < kCount; ++j) {
      const Vec<A> v = load(z + r * at.N + j * kLanes, lanes);
      square[j] += v * v;
    }
  for (int j = 0; j < kCount; ++j) inverse[j] = A(1) / square_root<A>(no_zero<A>(square[j]));
}

// exp(z - maximum over rows) of a span, into out, and its sum over rows; and that of its products with `with`, or null.
template <int kCount, class T, class Lanes, class A = Accumulate<T>>
AIA_INLINE void exponentials(const Memory& at, const T* z, Lanes lanes, A* out, Vec<A> (&sum)[kCount], const T* with,
                             Vec<A>* product) {
  Vec<A> maximum[kCount];
  for (int j = 0; j < kCount; ++j) maximum[j] = splat(-std::numeric_limits<A>::infinity());
  for (int64_t r = 0; r < at.d; ++r)
    for (int j = 0; j < kCount; ++j) maximum[j] = larger<A>(load(z + r * at.N + j * kLanes, lanes), maximum[j]);
  for (int64_t r = 0; r < at.d; ++r)
    for (int j = 0; j < kCount; ++j) {
      const int64_t i = r * at.N + j * kLanes;
      const Vec<A> e = exponential<A>(load(z + i, lanes) - maximum[j]);
      store(out + i, e, lanes);
      sum[j] += e;
      if (with) product[j] += e * load(with + i, lanes);
    }
}

template <class T, class A>
void keys_of_tile(const Memory& at, const Tile& tile, const T* logits, A* phi, Sums<A>& sums) {
  const T* keys = logits + keys_of(at, tile.b, tile.h);
  for_spans(tile.first, tile.last, [&](int64_t n, auto vectors, auto lanes) {
    constexpr int kCount = vectors;
    const Shown<A, kCount> shown(padding_of(at, tile.b, n), lanes);
    Vec<A> inverse[kCount], v[kCount];
    const bool unit = at.feature == Feature::kL2;
    if (unit) {
      inverse_lengths(at, keys + n, lanes, inverse);
      for (int j = 0; j < kCount; ++j) store(phi + n + j * kLanes, v[j] = shown.keep(j, splat(A(1))), lanes);
      sums.add(0, sum_of<A>(v));
    }
    for (int64_t r = 0; r < at.d; ++r) {
      const int64_t row = r + (unit ? 1 : 0);
      for (int j = 0; j < kCount; ++j) {
        const Vec<A> z = load(keys + r * at.N + n + j * kLanes, lanes);
        v[j] = shown.keep(j, unit ? z * inverse[j] : softplus<A>(z));
        store(phi + row * at.N + n + j * kLanes, v[j], lanes);
      }
      sums.add(row, sum_of<A>(v));
    }
  });
}

// The sum over the tokens of a row of what value(n, j, vectors, lanes) gives, in chunks.
template <class A, class Value>
AIA_INLINE A sum_over_tokens(const Memory& at, Value&& value) {
  A total = 0;
  for (int64_t first = 0; first < at.N; first += kChunk) {
    Vec<A> sum{};
    for_spans(first, std::min(at.N, first + kChunk), [&](int64_t n, auto vectors, auto lanes) {
      Vec<A> v[vectors];
      value(n, lanes, v);
      sum += sum_of<A>(v);
    });
    total += sum_lanes<A>(sum);
  }
  return total;
}

template <class T, class A>
A maximum_over_tokens(const Memory& at, int64_t b, const T* row) {
  Vec<A> maximum[kVectors];
  for (Vec<A>& m : maximum) m = splat(-std::numeric_limits<A>::infinity());
  for_spans(0, at.N, [&](int64_t n, auto vectors, auto lanes) {
    const Shown<A, vectors> shown(padding_of(at, b, n), lanes);
    for (int j = 0; j < vectors; ++j)
      maximum[j] = larger<A>(shown.or_else(j, load(row + n + j * kLanes, lanes), -std::numeric_limits<A>::infinity()),
                             maximum[j]);
  });
  A highest = -std::numeric_limits<A>::infinity();
  for (const Vec<A>& m : maximum)
    for (int i = 0; i < kLanes; ++i) highest = m[i] > highest ? m[i] : highest;
  return highest;
}

// A softmax over the tokens of a row, or with the maximum and the sum that are given; returns its sum, 1 or what the
// tokens here have of it.
template <class T, class A>
A softmax_over_tokens(const Memory& at, int64_t b, const T* row, const A* maximum, const A* total, A* phi) {
  const A highest = maximum ? *maximum : maximum_over_tokens<T, A>(at, b, row);
  const Vec<A> origin = splat(highest == -std::numeric_limits<A>::infinity() ? A(0) : highest);
  const A here = sum_over_tokens<A>(at, [&](int64_t n, auto lanes, auto& v) {
    constexpr int kCount = sizeof v / sizeof v[0];
    const Shown<A, kCount> shown(padding_of(at, b, n), lanes);
    for (int j = 0; j < kCount; ++j) {
      v[j] = shown.keep(j, exponential<A>(load(row + n + j * kLanes, lanes) - origin));
      store(phi + n + j * kLanes, v[j], lanes);
    }
  });
  const A all = total ? *total : here, factor = A(1) / (all == 0 ? A(1) : all);
  for_spans(0, at.N, [&](int64_t n, auto vectors, auto lanes) {
    for (int j = 0; j < vectors; ++j) {
      A* to = phi + n + j * kLanes;
      store(to, load(to, lanes) * factor, lanes);
    }
  });
  return here * factor;
}

template <class T, class A = Accumulate<T>>
void keys(const Memory& at, const T* logits, const A* statistics, A* rows, int64_t pitch, A* partial, int64_t begin,
          int64_t end) {
  if (at.feature == Feature::kSoftmax) {
    const int64_t width = at.H * at.d;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / width, row = unit % width;
      const A* maximum = statistics ? statistics + b * 2 * width + row : nullptr;
      partial[unit] = softmax_over_tokens<T, A>(at, b, logits + (b * 2 * width + row) * at.N, maximum,
                                                maximum ? maximum + width : nullptr, rows + (b * pitch + row) * at.N);
    }
    return;
  }
  Sums<A> sums(at.R());
  for (int64_t unit = begin; unit < end; ++unit) {
    const Tile tile(at, unit);
    sums.clear();
    keys_of_tile(at, tile, logits, rows + (tile.b * pitch + tile.h * at.R()) * at.N, sums);
    sums.write(partial + unit * at.R());
  }
}

template <class T, class A>
void queries_of_tile(const Memory& at, const Tile& tile, const T* logits, const A* weights, A gamma, A* query) {
  const T* queries = logits + queries_of(at, tile.b, tile.h);
  for_spans(tile.first, tile.last, [&](int64_t n, auto vectors, auto lanes) {
    constexpr int kCount = vectors;
    const Shown<A, kCount> shown(padding_of(at, tile.b, n), lanes);
    const bool unit = at.feature == Feature::kL2;
    const T* z = queries + n;
    A* out = query + n;
    Vec<A> mass[kCount] = {}, inverse[kCount];
    if (at.feature == Feature::kSoftmax) {
      exponentials(at, z, lanes, out, mass, static_cast<const T*>(nullptr), nullptr);
    } else if (unit) {
      inverse_lengths(at, z, lanes, inverse);
      for (int j = 0; j < kCount; ++j) mass[j] = splat(weights[0]);
      for (int64_t r = 0; r < at.d; ++r)
        for (int j = 0; j < kCount; ++j)
          mass[j] += weights[r + 1] * (load(z + r * at.N + j * kLanes, lanes) * inverse[j]);
    } else {
      for (int64_t r = 0; r < at.d; ++r)
        for (int j = 0; j < kCount; ++j) {
          const int64_t i = r * at.N + j * kLanes;
          const Vec<A> v = softplus<A>(load(z + i, lanes));
          store(out + i, v, lanes);
          mass[j] += weights[r] * v;
        }
    }
    Vec<A> factor[kCount];
    for (int j = 0; j < kCount; ++j) factor[j] = shown.keep(j, gamma / no_zero<A>(mass[j]));
    if (unit)
      for (int j = 0; j < kCount; ++j) {
        store(out + j * kLanes, factor[j], lanes);
        factor[j] *= inverse[j];
      }
    for (int64_t r = 0; r < at.d; ++r)
      for (int j = 0; j < kCount; ++j) {
        const int64_t i = r * at.N + j * kLanes;
        A* to = out + i + (unit ? at.N : 0);
        store(to, shown.keep(j, (unit ? load(z + i, lanes) : load(out + i, lanes)) * factor[j]), lanes);
      }
  });
}

template <class T, class A = Accumulate<T>>
void queries(const Memory& at, const T* logits, const A* sums, const T* gamma, double eps, A* query, int64_t begin,
             int64_t end) {
  Divisor<A> divisor(at, sums, static_cast<A>(eps));
  for (int64_t unit = begin; unit < end; ++unit) {
    const Tile tile(at, unit);
    queries_of_tile(at, tile, logits, divisor.of(tile.head), gamma_of(gamma), query + tile.head * at.R() * at.N);
  }
}

// The operands of a tile's queries, backward: rows that begin with the head's. sums has one more, for gamma.
template <class T, class A>
struct QueriesBackward {
  const T *z, *reached;
  const A* weights;
  A gamma;
  A *query, *grad;
  Sums<A>& sums;
};

// Through phi(q) gamma / mass: of a span whose phi(q) has the mass and the product with P that are given, the factor of
// phi(q), the gradient of the mass, and the part of gamma's gradient.
template <class A, int kCount>
struct Quotient {
  Vec<A> factor[kCount], grad_mass[kCount], ratio[kCount];

  AIA_INLINE Quotient(const Shown<A, kCount>& shown, const Vec<A> (&mass)[kCount], const Vec<A> (&dot)[kCount],
                      A gamma) {
    for (int j = 0; j < kCount; ++j) {
      const Vec<A> inverse = A(1) / no_zero<A>(mass[j]);
      ratio[j] = shown.keep(j, dot[j] * inverse);
      factor[j] = shown.keep(j, gamma * inverse);
      grad_mass[j] = -(ratio[j] * factor[j]);
    }
  }
};

template <int kCount, class T, class A, class Lanes>
AIA_INLINE void through_unit_vectors(const Memory& at, const QueriesBackward<T, A>& of, int64_t n, Lanes lanes,
                                     const Shown<A, kCount>& shown) {
  Vec<A> inverse[kCount], mass[kCount] = {}, dot[kCount] = {}, along[kCount];
  inverse_lengths(at, of.z + n, lanes, inverse);
  for (int64_t r = 0; r < at.d; ++r)
    for (int j = 0; j < kCount; ++j) {
      const int64_t i = r * at.N + n + j * kLanes;
      const Vec<A> hat = load(of.z + i, lanes) * inverse[j];
      mass[j] += of.weights[r + 1] * hat;
      dot[j] += hat * load(of.reached + i + at.N, lanes);
    }
  Vec<A> whole_mass[kCount], whole_dot[kCount];
  for (int j = 0; j < kCount; ++j) {
    whole_mass[j] = mass[j] + of.weights[0];
    whole_dot[j] = dot[j] + load(of.reached + n + j * kLanes, lanes);
  }
  const Quotient<A, kCount> q(shown, whole_mass, whole_dot, of.gamma);
  for (int j = 0; j < kCount; ++j) {
    along[j] = q.factor[j] * dot[j] + q.grad_mass[j] * mass[j];
    store(of.query + n + j * kLanes, q.factor[j], lanes);
  }
  of.sums.add(0, sum_of<A>(q.grad_mass));
  of.sums.add(at.R(), sum_of<A>(q.ratio));
  for (int64_t r = 0; r < at.d; ++r) {
    Vec<A> part[kCount];
    for (int j = 0; j < kCount; ++j) {
      const int64_t i = r * at.N + n + j * kLanes;
      const Vec<A> hat = load(of.z + i, lanes) * inverse[j];
      const Vec<A> grad = load(of.reached + i + at.N, lanes) * q.factor[j] + of.weights[r + 1] * q.grad_mass[j];
      store(of.query + i + at.N, hat * q.factor[j], lanes);
      store(of.grad + i, shown.keep(j, (grad - hat * along[j]) * inverse[j]), lanes);
      part[j] = shown.keep(j, hat * q.grad_mass[j]);
    }
    of.sums.add(r + 1, sum_of<A>(part));
  }
}

template <int kCount, class T, class A, class Lanes>
AIA_INLINE void through_softplus(const Memory& at, const QueriesBackward<T, A>& of, int64_t n, Lanes lanes,
                                 const Shown<A, kCount>& shown) {
  Vec<A> mass[kCount] = {}, dot[kCount] = {};
  for (int64_t r = 0; r < at.d; ++r)
    for (int j = 0; j < kCount; ++j) {
      const int64_t i = r * at.N + n + j * kLanes;
      const Vec<A> phi = softplus<A>(load(of.z + i, lanes));
      store(of.query + i, phi, lanes);
      mass[j] += of.weights[r] * phi;
      dot[j] += phi * load(of.reached + i, lanes);
    }
  const Quotient<A, kCount> q(shown, mass, dot, of.gamma);
  of.sums.add(at.R(), sum_of<A>(q.ratio));
  for (int64_t r = 0; r < at.d; ++r) {
    Vec<A> part[kCount];
    for (int j = 0; j < kCount; ++j) {
      const int64_t i = r * at.N + n + j * kLanes;
      const Vec<A> phi = load(of.query + i, lanes);
      const Vec<A> grad = load(of.reached + i, lanes) * q.factor[j] + of.weights[r] * q.grad_mass[j];
      store(of.query + i, shown.keep(j, phi * q.factor[j]), lanes);
      store(of.grad + i, shown.keep(j, grad * sigmoid<A>(load(of.z + i, lanes))), lanes);
      part[j] = shown.keep(j, phi * q.grad_mass[j]);
    }
    of.sums.add(r, sum_of<A>(part));
  }
}

template <int kCount, class T, class A, class Lanes>
AIA_INLINE void through_softmax(const Memory& at, const QueriesBackward<T, A>& of, int64_t n, Lanes lanes,
                                const Shown<A, kCount>& shown) {
  Vec<A> mass[kCount] = {}, dot[kCount] = {};
  exponentials(at, of.z + n, lanes, of.query + n, mass, of.reached + n, dot);
  const Quotient<A, kCount> q(shown, mass, dot, of.gamma);
  of.sums.add(at.R(), sum_of<A>(q.ratio));
  for (int64_t r = 0; r < at.d; ++r)
    for (int j = 0; j < kCount; ++j) {
      const int64_t i = r * at.N + n + j * kLanes;
      const Vec<A> query = shown.keep(j, load(of.query + i, lanes) * q.factor[j]);
      store(of.query + i, query, lanes);
      store(of.grad + i, shown.keep(j, query * (load(of.reached + i, lanes) - q.ratio[j])), lanes);
    }
}

template <class T, class A = Accumulate<T>>
void queries_backward(const Memory& at, const T* logits, const A* sums, const T* gamma, double eps, const T* reached,
                      A* rows, A* query, A* partial, int64_t begin, int64_t end) {
  Divisor<A> divisor(at, sums, static_cast<A>(eps));
  Sums<A> sums_of_tile(at.R() + 1);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Tile tile(at, unit);
    const int64_t features = tile.head * at.R() * at.N;
    sums_of_tile.clear();
    const QueriesBackward<T, A> of{logits + queries_of(at, tile.b, tile.h),
                                   reached + features,
                                   divisor.of(tile.head),
                                   gamma_of(gamma),
                                   query + features,
                                   rows + grad_queries_of(at, tile.b, tile.h),
                                   sums_of_tile};
    for_spans(tile.first, tile.last, [&](int64_t n, auto vectors, auto lanes) {
      const Shown<A, vectors> shown(padding_of(at, tile.b, n), lanes);
      switch (at.feature) {
        case Feature::kL2: return through_unit_vectors(at, of, n, lanes, shown);
        case Feature::kSoftplus: return through_softplus(at, of, n, lanes, shown);
        case Feature::kSoftmax: return through_softmax(at, of, n, lanes, shown);
      }
    });
    A* out = partial + unit * (at.R() + 1);
    sums_of_tile.write(out);
    for (int64_t r = 0; r < at.R(); ++r) out[r] *= divisor.share();
  }
}

template <class T, class A>
void keys_backward_of_row(const Memory& at, const A* phi, const T* reached, A grad_sum, const A* reduced, A* grad) {
  const auto of_phi = [&](int64_t i, auto lanes) { return load(reached + i, lanes) + grad_sum; };
  const A sum = reduced ? *reduced : sum_over_tokens<A>(at, [&](int64_t n, auto lanes, auto& v) {
    for (int j = 0; j < static_cast<int>(sizeof v / sizeof v[0]); ++j) {
      const int64_t i = n + j * kLanes;
      v[j] = load(phi + i, lanes) * of_phi(i, lanes);
    }
  });
  for_spans(0, at.N, [&](int64_t n, auto vectors, auto lanes) {
    for (int j = 0; j < vectors; ++j) {
      const int64_t i = n + j * kLanes;
      store(grad + i, (of_phi(i, lanes) - sum) * load(phi + i, lanes), lanes);
    }
  });
}

// phi and reached begin with the head's first feature, behind the constant 1.
template <class T, class A>
void keys_backward_of_tile(const Memory& at, const Tile& tile, const T* z, const A* phi, const T* reached,
                           const A* grad_sums, A* grad) {
  for_spans(tile.first, tile.last, [&](int64_t n, auto vectors, auto lanes) {
    constexpr int kCount = vectors;
    const Shown<A, kCount> shown(padding_of(at, tile.b, n), lanes);
    const bool unit = at.feature == Feature::kL2;
    Vec<A> inverse[kCount], along[kCount] = {};
    if (unit) {
      inverse_lengths(at, z + n, lanes, inverse);
      for (int64_t r = 0; r < at.d; ++r)
        for (int j = 0; j < kCount; ++j) {
          const int64_t i = r * at.N + n + j * kLanes;
          along[j] += load(phi + i, lanes) * (load(reached + i, lanes) + grad_sums[r]);
        }
    }
    for (int64_t r = 0; r < at.d; ++r)
      for (int j = 0; j < kCount; ++j) {
        const int64_t i = r * at.N + n + j * kLanes;
        const Vec<A> of_phi = load(reached + i, lanes) + grad_sums[r];
        const Vec<A> v =
            unit ? (of_phi - load(phi + i, lanes) * along[j]) * inverse[j] : of_phi * sigmoid<A>(load(z + i, lanes));
        store(grad + i, shown.keep(j, v), lanes);
      }
  });
}

template <class T, class A = Accumulate<T>>
void keys_backward(const Memory& at, const T* logits, const T* reached, const A* grad_sums, const A* reduced, A* rows,
                   int64_t begin, int64_t end) {
  const int64_t pitch = at.H * (at.R() + 2 * at.d);
  if (at.feature == Feature::kSoftmax) {
    const int64_t width = at.H * at.d;
    for (int64_t unit = begin; unit < end; ++unit) {
      A* phi = rows + (unit / width * pitch + unit % width) * at.N;
      keys_backward_of_row(at, phi, reached + unit * at.N, grad_sums[unit], reduced ? reduced + unit : nullptr,
                           phi + width * at.N);
    }
    return;
  }
  const int64_t constant = at.R() - at.d;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Tile tile(at, unit);
    const int64_t first = tile.head * at.R() + constant;
    keys_backward_of_tile(at, tile, logits + keys_of(at, tile.b, tile.h),
                          rows + (tile.b * pitch + tile.h * at.R() + constant) * at.N, reached + first * at.N,
                          grad_sums + first, rows + grad_keys_of(at, tile.b, tile.h));
  }
}

template <class A>
void join(const Memory& at, int64_t parts, int64_t columns, const A* partial, A* sums, A* total) {
  const int64_t width = columns + (total ? 1 : 0);
  std::fill_n(sums, at.heads() * columns, A(0));
  if (total) *total = 0;
  for (int64_t part = 0; part < at.heads() * parts; ++part) {
    A* to = sums + part / parts * columns;
    for (int64_t c = 0; c < columns; ++c) to[c] += partial[part * width + c];
    if (total) *total += partial[part * width + columns];
  }
}

template <class T>
constexpr MemoryPasses kPasses = {untyped<keys<T>>, untyped<queries<T>>, untyped<queries_backward<T>>,
                                  untyped<keys_backward<T>>, untyped<join<Accumulate<T>>>};

}  // namespace

}  // namespace aia::cpu::AIA_CPU_LEVEL

namespace aia::cpu {

using namespace AIA_CPU_LEVEL;

const MemoryPasses MemoryPasses::AIA_CPU_LEVEL[] = {kPasses<float>, kPasses<double>, kPasses<bf16>, kPasses<f16>};

}  // namespace aia::cpu
