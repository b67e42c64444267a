// The inner gate of STinC2 on the CPU: maps over T, H and W, each averaged over C, and the transpose.
//
// A map is planes of positions, and has C channels either at each position, side by side, or for each plane, one set of
// positions after the other. The map over T is one plane [H, W]; those over H and W have a plane [W] or [H] per frame.
#include "average.h"

#include <algorithm>
#include <vector>

#include "lane_memory.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

template <class A>
A sum_of(const A* row, int64_t count) {
  Vec<A> sum{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum += load(row + i);
  if (i < count) sum += load(row + i, static_cast<int>(count - i));
  return sum_lanes<A>(sum);
}

// A number for each position of the three maps of a clip, in one piece of memory.
template <class A>
struct Positions {
  const Volume& x;
  std::vector<A> numbers;
  A *over_t, *over_h, *over_w;  // [H, W], [T, W] and [T, H]

  explicit Positions(const Volume& x)
      : x(x),
        numbers(x.H * x.W + x.T * x.W + x.T * x.H),
        over_t(numbers.data()),
        over_h(over_t + x.H * x.W),
        over_w(over_h + x.T * x.W) {}

  // Calls each(start of a map in a packed gate, its planes, their positions, the numbers) for the three maps.
  template <class Each>
  void for_maps(Each&& each) const {
    each(int64_t{0}, int64_t{1}, x.H * x.W, over_t);
    each(x.map_t(), x.T, x.W, over_h);
    each(x.map_t() + x.map_h(), x.T, x.H, over_w);
  }
};

template <class A>
void average(const Volume& x, const A* gate, A* averaged, int64_t begin, int64_t end) {
  const Positions<A> means(x);
  const A count = static_cast<A>(x.C);
  for (int64_t b = begin; b < end; ++b) {
    means.for_maps(
        [&, from = gate + b * x.packed(kSpacetime)](int64_t start, int64_t planes, int64_t positions, A* to) {
          const A* map = from + start;
          if (channels_side_by_side(x)) {
            for (int64_t i = 0; i < planes * positions; ++i) to[i] = sum_of(map + i * x.C, x.C) / count;
            return;
          }
          std::fill_n(to, planes * positions, A(0));
          for (int64_t plane = 0; plane < planes; ++plane, to += positions) {
            for (int64_t c = 0; c < x.C; ++c, map += positions)
              for (int64_t i = 0; i < positions; ++i) to[i] += map[i];
            for (int64_t i = 0; i < positions; ++i) to[i] /= count;
          }
        });
    A* to = averaged + b * x.packed(kChannel);
    for (int64_t t = 0; t < x.T; ++t)
      for (int64_t h = 0; h < x.H; ++h, to += x.W) {
        const A *of_t = means.over_t + h * x.W, *of_h = means.over_h + t * x.W, of_w = means.over_w[t * x.H + h];
        for (int64_t w = 0; w < x.W; ++w) to[w] = (of_t[w] + of_h[w] + of_w) / A(3);
      }
  }
}

template <class A>
void spread(const Volume& x, const A* grad, A* grad_gate, int64_t begin, int64_t end) {
  Positions<A> sums(x);
  const A share = A(1) / static_cast<A>(3 * x.C);
  for (int64_t b = begin; b < end; ++b) {
    std::fill(sums.numbers.begin(), sums.numbers.end(), A(0));
    const A* row = grad + b * x.packed(kChannel);
    for (int64_t t = 0; t < x.T; ++t)
      for (int64_t h = 0; h < x.H; ++h, row += x.W) {
        A *of_t = sums.over_t + h * x.W, *of_h = sums.over_h + t * x.W;
        for (int64_t w = 0; w < x.W; ++w) of_t[w] += row[w], of_h[w] += row[w];
        sums.over_w[t * x.H + h] = sum_of(row, x.W);
      }
    for (A& sum : sums.numbers) sum *= share;
    sums.for_maps([&, to = grad_gate + b * x.packed(kSpacetime)](int64_t start, int64_t planes, int64_t positions,
                                                                 const A* from) {
      A* map = to + start;
      if (channels_side_by_side(x))
        for (int64_t i = 0; i < planes * positions; ++i, map += x.C) std::fill_n(map, x.C, from[i]);
      else
        for (int64_t plane = 0; plane < planes; ++plane, from += positions)
          for (int64_t c = 0; c < x.C; ++c, map += positions) std::copy_n(from, positions, map);
    });
  }
}

template <class A>
constexpr AveragePasses<A> kPasses = {average<A>, spread<A>};

}  // namespace

}  // namespace aia::cpu::AIA_CPU_LEVEL

namespace aia::cpu {

using namespace AIA_CPU_LEVEL;

template <class A>
const AveragePasses<A> AveragePasses<A>::AIA_CPU_LEVEL = kPasses<A>;
template struct AveragePasses<float>;
template struct AveragePasses<double>;

}  // namespace aia::cpu
