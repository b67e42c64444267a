// The double normalization of external attention on the CPU. See aia_kernels/schemas.py for what each pass computes.
//
// Lanes are columns. The reductions over tokens take a block of columns at a time and a few tokens that stay in the L1
// cache: column_statistics finds their maximum first, then their exponentials. What is done to the groups of a token is
// written once, over vectors of columns, whether a group is whole vectors in registers or ends within one.
#include "double_norm.h"

#include <cmath>
#include <limits>
#include <memory>

#include "exponential.h"
#include "tile.h"
#include "untyped.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// Below this mass a term of it may have been too small to be a normal number.
template <class A>
constexpr A kSafeMass = sizeof(A) == 4 ? A(0x1p-60) : A(0x1p-512);

inline int64_t vectors(int64_t columns) { return (columns + kLanes - 1) / kLanes; }

// Calls body(column, lanes) for the vectors of a row.
template <class Body>
AIA_INLINE void for_columns(int64_t columns, Body&& body) {
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) body(c, std::integral_constant<int, kLanes>{});
  if (c < columns) body(c, static_cast<int>(columns - c));
}

// A unit of a reduction over tokens: columns [c, c + columns) of tokens [first, last) of sample b.
struct Block {
  int64_t b, chunk, c, columns, first, last;

  Block(const Tokens& at, const Split& split, int64_t unit)
      : b(unit / split.blocks / split.chunks),
        chunk(unit / split.blocks % split.chunks),
        c(unit % split.blocks * split.columns),
        columns(std::min(split.columns, at.M - c)),
        first(chunk * split.tokens),
        last(std::min(at.N, first + split.tokens)) {}
};

// Running column statistics of a vector of columns.
template <class A>
struct Statistics {
  Vec<A> maximum = splat(-kInfinity<A>), sum{};

  // Where to count from: exp(x - maximum) would be NaN with a maximum of -inf.
  static AIA_INLINE Vec<A> origin(Vec<A> maximum) { return maximum == -kInfinity<A> ? Vec<A>{} : maximum; }

  AIA_INLINE void raise(Vec<A> to) {
    const Vec<A> higher = larger<A>(to, maximum);
    sum *= exponential<A>(maximum - origin(higher));
    maximum = higher;
  }
  // Comparisons let NaN pass by; it shows in the sum. Only with +inf the sum is NaN and the maximum is not.
  AIA_INLINE void write(A* out, int64_t M, int lanes) const {
    const IVec<A> nan = (sum != sum) & (maximum != kInfinity<A>);
    store(out, nan ? sum : maximum, lanes);
    store(out + M, sum, lanes);
  }
};

// Adds a few rows to the statistics of kVectors vectors of columns.
template <int kVectors, class T, class A, class Lanes>
AIA_INLINE void add_rows(const T* const* rows, int count, int64_t c, Statistics<A>* statistics, Lanes lanes) {
  Vec<A> maximum[kVectors], sum[kVectors] = {}, from[kVectors];
  for (int j = 0; j < kVectors; ++j) maximum[j] = splat(-kInfinity<A>);
  for (int r = 0; r < count; ++r)
    for (int j = 0; j < kVectors; ++j) maximum[j] = larger<A>(load(rows[r] + c + j * kLanes, lanes), maximum[j]);
  for (int j = 0; j < kVectors; ++j) {
    statistics[j].raise(maximum[j]);
    from[j] = statistics[j].origin(statistics[j].maximum);
  }
  for (int r = 0; r < count; ++r)
    for (int j = 0; j < kVectors; ++j) sum[j] += exponential<A>(load(rows[r] + c + j * kLanes, lanes) - from[j]);
  for (int j = 0; j < kVectors; ++j) statistics[j].sum += sum[j];
}

template <class T>
void column_statistics(const Tokens& at, const T* logits, Accumulate<T>* partial, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  constexpr int kRows = 64, kElements = 8192;
  const Split split = statistics_split(at);
  const int most = static_cast<int>(std::clamp<int64_t>(kElements / split.columns, 8, kRows));
  std::unique_ptr<Statistics<A>[]> statistics(new Statistics<A>[vectors(split.columns)]);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block block(at, split, unit);
    std::fill_n(statistics.get(), vectors(block.columns), Statistics<A>{});
    for (int64_t n = block.first; n < block.last;) {
      const T* rows[kRows];
      int count = 0;
      for (; n < block.last && count < most; ++n) {
        const int64_t token = block.b * at.N + n;
        if (!at.padding || !at.padding[token]) rows[count++] = logits + token * at.M + block.c;
      }
      int64_t c = 0;
      for (; c + 4 * kLanes <= block.columns; c += 4 * kLanes)
        add_rows<4>(rows, count, c, statistics.get() + c / kLanes, std::integral_constant<int, kLanes>{});
      for (; c + kLanes <= block.columns; c += kLanes)
        add_rows<1>(rows, count, c, statistics.get() + c / kLanes, std::integral_constant<int, kLanes>{});
      if (c < block.columns)
        add_rows<1>(rows, count, c, statistics.get() + c / kLanes, static_cast<int>(block.columns - c));
    }
    A* out = partial + (block.b * split.chunks + block.chunk) * 2 * at.M + block.c;
    for_columns(block.columns, [&](int64_t c, auto lanes) { statistics[c / kLanes].write(out + c, at.M, lanes); });
  }
}

template <class A>
void join_statistics(const Tokens& at, const A* partial, A* statistics, int64_t begin, int64_t end) {
  const int64_t chunks = statistics_split(at).chunks;
  for (int64_t b = begin; b < end; ++b)
    for_columns(at.M, [&](int64_t c, auto lanes) {
      Statistics<A> joined;
      for (int64_t i = 0; i < chunks; ++i) {
        const A* part = partial + (b * chunks + i) * 2 * at.M + c;
        const Vec<A> maximum = load(part, lanes);
        joined.raise(maximum);
        joined.sum += load(part + at.M, lanes) * exponential<A>(maximum - joined.origin(joined.maximum));
      }
      joined.write(statistics + b * 2 * at.M + c, at.M, lanes);
    });
}

template <class A>
void log_sum_exp(const Tokens& at, const A* statistics, A* lse, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b)
    for (int64_t c = 0; c < at.M; ++c)
      lse[b * at.M + c] = statistics[2 * b * at.M + c] + std::log(statistics[(2 * b + 1) * at.M + c]);
}

template <class A>
void join_sums(const Tokens& at, const A* partial, A* sums, int64_t begin, int64_t end) {
  const int64_t chunks = sums_split(at).chunks;
  for (int64_t b = begin; b < end; ++b)
    for_columns(at.M, [&](int64_t c, auto lanes) {
      Vec<A> sum{};
      for (int64_t i = 0; i < chunks; ++i) sum += load(partial + (b * chunks + i) * at.M + c, lanes);
      store(sums + b * at.M + c, sum, lanes);
    });
}

// What the sum of a group makes of it: the numbers by which its columns are finished, and, if that sum was no use,
// other terms for its columns.
template <class A, int kFactors>
struct Group {
  A factors[kFactors];
  const A* terms = nullptr;
};

// The passes over the groups of a row of columns. A group of kVectors whole vectors, as in every published network,
// stays in registers, and so does one of a part of a vector; 0 stands for any group.
constexpr int kPart = -1;
template <class A, int kFactors, int kVectors>
class Groups {
 public:
  Groups(int64_t columns, int64_t group)
      : columns_(columns),
        group_(group),
        terms_(kVectors ? 0 : vectors(columns)),
        factors_(kVectors ? 0 : kFactors * vectors(columns)) {
    if constexpr (kVectors == kPart)
      for (int lane = 0; lane < static_cast<int>(group); ++lane) insert_lane<A>(part_, lane);
  }

  // Calls term(column, lanes) for every column, inspect(g, sum of the group's terms), which returns a Group, for every
  // group, and finish(column, lanes, term, factors of the lanes' groups) for every column.
  template <class Term, class Inspect, class Finish>
  AIA_INLINE void operator()(Term&& term, Inspect&& inspect, Finish&& finish) {
    if constexpr (kVectors == kPart) {
      const int lanes = static_cast<int>(group_);
      for (int64_t c = 0, g = 0; c < columns_; c += group_, ++g) {
        Vec<A> v = keep_lanes<A>(part_, term(c, lanes));
        const Group<A, kFactors> found = inspect(g, sum_lanes<A>(v));
        if (found.terms) [[unlikely]]
          v = load(found.terms);
        Vec<A> factors[kFactors];
        for (int i = 0; i < kFactors; ++i) factors[i] = splat(found.factors[i]);
        finish(c, lanes, v, factors);
      }
    } else if constexpr (kVectors > 0) {
      constexpr std::integral_constant<int, kLanes> whole;
      for (int64_t c = 0, g = 0; c < columns_; c += kVectors * kLanes, ++g) {
        Vec<A> v[kVectors], sum = v[0] = term(c, whole);
        for (int j = 1; j < kVectors; ++j) sum += v[j] = term(c + j * kLanes, whole);
        const Group<A, kFactors> found = inspect(g, sum_lanes<A>(sum));
        if (found.terms) [[unlikely]]
          for (int j = 0; j < kVectors; ++j) v[j] = load(found.terms + j * kLanes);
        Vec<A> factors[kFactors];
        for (int i = 0; i < kFactors; ++i) factors[i] = splat(found.factors[i]);
        for (int j = 0; j < kVectors; ++j) finish(c + j * kLanes, whole, v[j], factors);
      }
    } else {
      A *terms = begin_of(terms_), *factors = begin_of(factors_);
      const int64_t pitch = vectors(columns_) * kLanes;
      for_columns(columns_, [&](int64_t c, auto lanes) { store(terms + c, term(c, lanes)); });
      for (int64_t c = 0, g = 0; c < columns_; c += group_, ++g) {
        const Group<A, kFactors> found = inspect(g, sum_of(terms + c));
        if (found.terms) std::copy_n(found.terms, group_, terms + c);
        for (int i = 0; i < kFactors; ++i) std::fill_n(factors + i * pitch + c, group_, found.factors[i]);
      }
      for_columns(columns_, [&](int64_t c, auto lanes) {
        Vec<A> f[kFactors];
        for (int i = 0; i < kFactors; ++i) f[i] = load(factors + i * pitch + c);
        finish(c, lanes, load(terms + c), f);
      });
    }
  }

 private:
  static A* begin_of(Buffer<A>& buffer) { return reinterpret_cast<A*>(static_cast<Vec<A>*>(buffer)); }

  A sum_of(const A* terms) const {
    A sums[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= group_; i += kLanes)
      for (int k = 0; k < kLanes; ++k) sums[k] += terms[i + k];
    for (int k = 0; i < group_; ++i, ++k) sums[k] += terms[i];
    return sum_lanes<A>(load(sums));
  }

  int64_t columns_, group_;
  Buffer<A> terms_, factors_;
  LaneSet<A> part_{};
};

// Calls body with the number of vectors in a group as a constant, 0 for a group that is held in memory.
template <class Body>
void with_vectors(int64_t group, Body&& body) {
  // Vectors of several small groups take fewer exponentials.
  if (group < kLanes && 4 * group >= kLanes) return body(std::integral_constant<int, kPart>{});
  if constexpr (kLanes <= 8)
    if (group == 8) return body(std::integral_constant<int, 8 / kLanes>{});
  switch (group) {
    case 16: return body(std::integral_constant<int, 16 / kLanes>{});
    case 32: return body(std::integral_constant<int, 32 / kLanes>{});
    case 64: return body(std::integral_constant<int, 64 / kLanes>{});
    case 128: return body(std::integral_constant<int, 128 / kLanes>{});
    default: return body(std::integral_constant<int, 0>{});
  }
}

// A group of a token whose mass is too small to be told from the terms of its sum (or is NaN), from its maximum: makes
// A of the logits, and returns the mass.
template <class T, class A>
__attribute__((noinline)) A normalize_from_maximum(const T* logits, const A* lse, int64_t group, A eps, A* attention) {
  for_columns(group,
              [&](int64_t c, auto lanes) { store(attention + c, load(logits + c, lanes) - load(lse + c, lanes)); });
  A maximum = -kInfinity<A>, sum = 0;
  for (int64_t i = 0; i < group; ++i) maximum = std::max(maximum, attention[i]);
  if (maximum == -kInfinity<A>) maximum = 0;  // logits that hide a token: A is 0 / eps
  for (int64_t i = 0; i < group; ++i) sum += attention[i] = std::exp(attention[i] - maximum);
  const A scaled_mass = eps > 0 ? sum + eps * std::exp(-maximum) : sum;
  for (int64_t i = 0; i < group; ++i) attention[i] /= scaled_mass;
  return eps + sum * std::exp(maximum);
}

// What the passes below do with groups of kVectors vectors (with_vectors). Each is a function of its own: inlined side
// by side into one, the registers of the hot loops are shared out worse, which costs 7 to 10 %.
template <int kVectors, class T, class A = Accumulate<T>>
__attribute__((noinline)) void double_norm_of(const Tokens& at, const T* logits, const A* lse, A eps, T* attention,
                                              A* mass, int64_t begin, int64_t end) {
  Groups<A, 1, kVectors> groups(at.M, at.group);
  std::unique_ptr<A[]> another(new A[vectors(at.group) * kLanes]);
  const int64_t last = std::min(at.B * at.N, end * unit_tokens(at));
  for (int64_t token = begin * unit_tokens(at); token < last; ++token) {
    const T* x = logits + token * at.M;
    T* a = attention + token * at.M;
    A* token_mass = mass + token * at.groups();
    if (at.padding && at.padding[token]) {
      for_columns(at.M, [&](int64_t c, auto lanes) { store(a + c, Vec<A>{}, lanes); });
      std::fill_n(token_mass, at.groups(), eps);
      continue;
    }
    const A* origin = lse + token / at.N * at.M;
    groups([&](int64_t c, auto lanes) { return exponential<A>(load(x + c, lanes) - load(origin + c, lanes)); },
           [&](int64_t g, A sum) -> Group<A, 1> {
             token_mass[g] = sum + eps;
             if (sum >= kSafeMass<A>) [[likely]]
               return {{A(1) / (sum + eps)}};
             const int64_t c = g * at.group;
             token_mass[g] = normalize_from_maximum(x + c, origin + c, at.group, eps, another.get());
             return {{A(1)}, another.get()};
           },
           [&](int64_t c, auto lanes, Vec<A> p, const Vec<A>(&factor)[1]) { store(a + c, p * factor[0], lanes); });
  }
}

// Exponentials of kVectors vectors of columns of all rows, less the maximum of each column, and their statistics.
template <int kVectors, class T, class A, class Lanes>
AIA_INLINE void exponentials_of(const T* logits, const Tokens& at, A* exponentials, A* statistics, Lanes lanes) {
  const int64_t pitch = vectors(at.M) * kLanes;
  Statistics<A> found[kVectors];
  for (int64_t n = 0; n < at.N; ++n)
    for (int j = 0; j < kVectors; ++j)
      found[j].maximum = larger<A>(load(logits + n * at.M + j * kLanes, lanes), found[j].maximum);
  Vec<A> from[kVectors];
  for (int j = 0; j < kVectors; ++j) from[j] = found[j].origin(found[j].maximum);
  for (int64_t n = 0; n < at.N; ++n)
    for (int j = 0; j < kVectors; ++j) {
      const Vec<A> e = exponential<A>(load(logits + n * at.M + j * kLanes, lanes) - from[j]);
      store(exponentials + n * pitch + j * kLanes, e);
      found[j].sum += e;
    }
  for (int j = 0; j < kVectors; ++j) found[j].write(statistics + j * kLanes, pitch, kLanes);
}

// double_norm of samples from their logits: P = exp(logits - maximum) / sum.
template <int kVectors, class T, class A = Accumulate<T>>
__attribute__((noinline)) void whole_of(const Tokens& at, const T* logits, A eps, T* attention, A* mass, int64_t begin,
                                        int64_t end) {
  const int64_t pitch = vectors(at.M) * kLanes;
  Groups<A, 1, kVectors> groups(at.M, at.group);
  std::unique_ptr<A[]> exponentials(new A[at.N * pitch]), statistics(new A[3 * pitch]);
  std::unique_ptr<A[]> another(new A[vectors(at.group) * kLanes]);
  A *sums = statistics.get() + pitch, *lse = sums + pitch;
  for (int64_t b = begin; b < end; ++b) {
    const T* sample = logits + b * at.N * at.M;
    int64_t column = 0;
    for (; column + 4 * kLanes <= at.M; column += 4 * kLanes)
      exponentials_of<4>(sample + column, at, exponentials.get() + column, statistics.get() + column,
                         std::integral_constant<int, kLanes>{});
    for (; column < at.M; column += kLanes)
      exponentials_of<1>(sample + column, at, exponentials.get() + column, statistics.get() + column,
                         static_cast<int>(std::min<int64_t>(kLanes, at.M - column)));
    for (int64_t c = 0; c < at.M; ++c) lse[c] = statistics[c] + std::log(sums[c]), sums[c] = A(1) / sums[c];
    for (int64_t n = 0; n < at.N; ++n) {
      const A* e = exponentials.get() + n * pitch;
      const T* x = sample + n * at.M;
      T* a = attention + (b * at.N + n) * at.M;
      A* token_mass = mass + (b * at.N + n) * at.groups();
      groups([&](int64_t c, auto lanes) { return load(e + c, lanes) * load(sums + c, lanes); },
             [&](int64_t g, A sum) -> Group<A, 1> {
               token_mass[g] = sum + eps;
               if (sum >= kSafeMass<A>) [[likely]]
                 return {{A(1) / (sum + eps)}};
               const int64_t c = g * at.group;
               token_mass[g] = normalize_from_maximum(x + c, lse + c, at.group, eps, another.get());
               return {{A(1)}, another.get()};
             },
             [&](int64_t c, auto lanes, Vec<A> p, const Vec<A>(&factor)[1]) { store(a + c, p * factor[0], lanes); });
    }
  }
}

template <int kVectors, class T, class A = Accumulate<T>>
__attribute__((noinline)) void backward_reduce_of(const Tokens& at, const T* grad, const T* attention, A* partial,
                                                  int64_t begin, int64_t end) {
  const Split split = sums_split(at);
  Buffer<A> sums(vectors(split.columns));
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block block(at, split, unit);
    Groups<A, 1, kVectors> groups(block.columns, at.group);
    std::fill_n(static_cast<Vec<A>*>(sums), vectors(block.columns), Vec<A>{});
    for (int64_t n = block.first; n < block.last; ++n) {
      const int64_t start = (block.b * at.N + n) * at.M + block.c;
      const T *g = grad + start, *a = attention + start;
      groups([&](int64_t c, auto lanes) { return load(g + c, lanes) * load(a + c, lanes); },
             [](int64_t, A sum) -> Group<A, 1> { return {{sum}}; },
             [&](int64_t c, auto lanes, Vec<A> product, const Vec<A>(&sum)[1]) {
               const Vec<A> q = product - load(a + c, lanes) * sum[0];
               if constexpr (kVectors == kPart) {  // groups begin within a vector
                 A* to = reinterpret_cast<A*>(static_cast<Vec<A>*>(sums)) + c;
                 store(to, load(to, lanes) + q, lanes);
               } else {
                 sums[c / kLanes] += q;
               }
             });
    }
    A* out = partial + (block.b * split.chunks + block.chunk) * at.M + block.c;
    for_columns(block.columns, [&](int64_t c, auto lanes) { store(out + c, sums[c / kLanes], lanes); });
  }
}

template <int kVectors, class T, class A = Accumulate<T>>
__attribute__((noinline)) void backward_of(const Tokens& at, const T* grad, const T* attention, const A* mass,
                                           const A* reduced, T* grad_logits, int64_t begin, int64_t end) {
  Groups<A, 2, kVectors> groups(at.M, at.group);
  const int64_t last = std::min(at.B * at.N, end * unit_tokens(at));
  for (int64_t token = begin * unit_tokens(at); token < last; ++token) {
    const T *g = grad + token * at.M, *a = attention + token * at.M;
    T* out = grad_logits + token * at.M;
    const A *token_mass = mass + token * at.groups(), *d = reduced + token / at.N * at.M;
    groups([&](int64_t c, auto lanes) { return load(g + c, lanes) * load(a + c, lanes); },
           [&](int64_t i, A sum) -> Group<A, 2> { return {{sum, token_mass[i]}}; },
           [&](int64_t c, auto lanes, Vec<A> product, const Vec<A>(&f)[2]) {
             store(out + c, product - load(a + c, lanes) * (f[0] + f[1] * load(d + c, lanes)), lanes);
           });
  }
}

template <class T, class A = Accumulate<T>>
void double_norm(const Tokens& at, const T* logits, const A* lse, double eps, T* attention, A* mass, int64_t begin,
                 int64_t end) {
  with_vectors(at.group, [&](auto count) {
    double_norm_of<count>(at, logits, lse, static_cast<A>(eps), attention, mass, begin, end);
  });
}

template <class T, class A = Accumulate<T>>
void whole(const Tokens& at, const T* logits, double eps, T* attention, A* mass, int64_t begin, int64_t end) {
  with_vectors(at.group,
               [&](auto count) { whole_of<count>(at, logits, static_cast<A>(eps), attention, mass, begin, end); });
}

template <class T, class A = Accumulate<T>>
void double_norm_backward_reduce(const Tokens& at, const T* grad, const T* attention, A* partial, int64_t begin,
                                 int64_t end) {
  with_vectors(at.group, [&](auto count) { backward_reduce_of<count>(at, grad, attention, partial, begin, end); });
}

template <class T, class A = Accumulate<T>>
void double_norm_backward(const Tokens& at, const T* grad, const T* attention, const A* mass, const A* reduced,
                          T* grad_logits, int64_t begin, int64_t end) {
  with_vectors(at.group,
               [&](auto count) { backward_of<count>(at, grad, attention, mass, reduced, grad_logits, begin, end); });
}

template <class T>
constexpr DoubleNormPasses kPasses = {untyped<column_statistics<T>>,
                                      untyped<join_statistics<Accumulate<T>>>,
                                      untyped<log_sum_exp<Accumulate<T>>>,
                                      untyped<double_norm<T>>,
                                      untyped<whole<T>>,
                                      untyped<double_norm_backward_reduce<T>>,
                                      untyped<join_sums<Accumulate<T>>>,
                                      untyped<double_norm_backward<T>>};

}  // namespace

}  // namespace aia::cpu::AIA_CPU_LEVEL

namespace aia::cpu {

using namespace AIA_CPU_LEVEL;

const DoubleNormPasses DoubleNormPasses::AIA_CPU_LEVEL[] = {kPasses<float>, kPasses<double>, kPasses<bf16>,
                                                            kPasses<f16>};

}  // namespace aia::cpu
