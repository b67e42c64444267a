// The products of a channel gate's MLP on the CPU, and its sigmoid. PyTorch's products copy their operands into panels,
// which for so few rows takes as long as the product. Here a block of results stays in registers, and operands are read
// where they are.
#include "perceptron.h"

#include <algorithm>

#include "exponential.h"
#include "lane_memory.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

constexpr std::integral_constant<int, kLanes> kFull;

// Results of times_transposed at a time, as many as there are lanes, each a sum in a vector of its own.
constexpr int kDotRows = kLanes >= 8 ? 4 : 2, kDotColumns = kLanes / kDotRows;
// And of times: rows by vectors of columns. A level with masks has 32 registers, others have 16.
constexpr int kBlockRows = kMasks ? 8 : 4, kBlockVectors = 2;

template <class A>
void times_transposed(const SmallProduct& p, const A* a, const A* b, A* out, int64_t begin, int64_t end) {
  for (int64_t column = begin * kDotColumns; column < std::min(p.columns, end * kDotColumns); column += kDotColumns)
    for (int64_t row = 0; row < p.rows; row += kDotRows) {
      // Rows beyond the last one are this one again.
      const auto from_a = at_each<kDotRows>([&](int i) { return a + std::min(row + i, p.rows - 1) * p.depth; });
      const auto from_b =
          at_each<kDotColumns>([&](int j) { return b + std::min(column + j, p.columns - 1) * p.depth; });
      Vec<A> sums[kLanes] = {};
      const auto add = [&](int64_t k, auto lanes) {
        const auto of_b = at_each<kDotColumns>([&](int j) { return load(from_b[j] + k, lanes); });
        for_each<kDotRows>([&](auto i) {
          const Vec<A> of_a = load(from_a[i] + k, lanes);
          for (int j = 0; j < kDotColumns; ++j) sums[i * kDotColumns + j] += of_a * of_b[j];
        });
      };
      int64_t k = 0;
      for (; k + kLanes <= p.depth; k += kLanes) add(k, kFull);
      if (k < p.depth) add(k, static_cast<int>(p.depth - k));
      const Vec<A> total =
          join_each<A, kLanes>([&](int i) { return sums[i]; }, [](Vec<A> x, Vec<A> y) { return x + y; });
      const int64_t columns = std::min<int64_t>(kDotColumns, p.columns - column);
      for (int64_t i = 0; i < std::min<int64_t>(kDotRows, p.rows - row); ++i)
        for (int64_t j = 0; j < columns; ++j) out[(row + i) * p.columns + column + j] = total[i * kDotColumns + j];
    }
}

// `rows` rows of `vectors` vectors of results, of which the last has so many lanes.
template <int rows, int vectors, class A, class Lanes>
AIA_INLINE void times_block(const SmallProduct& p, const A* a, int64_t row_step, int64_t depth_step, const A* b, A* out,
                            Lanes last) {
  Vec<A> sums[rows][vectors] = {};
  for (int64_t k = 0; k < p.depth; ++k, a += depth_step, b += p.columns) {
    Vec<A> of_b[vectors];
    for (int j = 0; j + 1 < vectors; ++j) of_b[j] = load(b + j * kLanes);
    of_b[vectors - 1] = load(b + (vectors - 1) * kLanes, last);
    for (int i = 0; i < rows; ++i) {
      const Vec<A> of_a = splat(a[i * row_step]);
      for (int j = 0; j < vectors; ++j) sums[i][j] += of_a * of_b[j];
    }
  }
  for (int i = 0; i < rows; ++i, out += p.columns) {
    for (int j = 0; j + 1 < vectors; ++j) store(out + j * kLanes, sums[i][j]);
    store(out + (vectors - 1) * kLanes, sums[i][vectors - 1], last);
  }
}

// All rows of a block of columns.
template <int vectors, class A, class Lanes>
AIA_INLINE void times_columns(const SmallProduct& p, const A* a, int64_t row_step, int64_t depth_step, const A* b,
                              A* out, Lanes last) {
  int64_t row = 0;
  for (; row + kBlockRows <= p.rows; row += kBlockRows, a += kBlockRows * row_step, out += kBlockRows * p.columns)
    times_block<kBlockRows, vectors>(p, a, row_step, depth_step, b, out, last);
  for (; row < p.rows; ++row, a += row_step, out += p.columns)
    times_block<1, vectors>(p, a, row_step, depth_step, b, out, last);
}

template <class A>
void times(const SmallProduct& p, const A* a, int64_t row_step, int64_t depth_step, const A* b, A* out, int64_t begin,
           int64_t end) {
  constexpr int64_t kColumns = kBlockVectors * kLanes;
  for (int64_t column = begin * kColumns; column < std::min(p.columns, end * kColumns); column += kColumns) {
    const int64_t left = p.columns - column;
    const auto block = [&](auto vectors, auto last) {
      times_columns<vectors>(p, a, row_step, depth_step, b + column, out + column, last);
    };
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, kBlockVectors> all;
    if (left >= kColumns)
      block(all, kFull);
    else if (left > kLanes)
      block(all, static_cast<int>(left - kLanes));
    else if (left == kLanes)
      block(one, kFull);
    else
      block(one, static_cast<int>(left));
  }
}

template <class A>
void sigmoid(int64_t n, A* x) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, cpu::AIA_CPU_LEVEL::sigmoid<A>(load(x + i)));
  const auto rest = static_cast<int>(n - i);
  if (rest) store(x + i, cpu::AIA_CPU_LEVEL::sigmoid<A>(load(x + i, rest)), rest);
}

template <class A>
constexpr PerceptronPasses<A> kPasses = {kDotColumns, times_transposed<A>, kBlockVectors * kLanes, times<A>,
                                         sigmoid<A>};

}  // namespace

}  // namespace aia::cpu::AIA_CPU_LEVEL

namespace aia::cpu {

using namespace AIA_CPU_LEVEL;

template <class A>
const PerceptronPasses<A> PerceptronPasses<A>::AIA_CPU_LEVEL = kPasses<A>;
template struct PerceptronPasses<float>;
template struct PerceptronPasses<double>;

}  // namespace aia::cpu
