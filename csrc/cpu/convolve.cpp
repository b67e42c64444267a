// The convolution of a spatial gate on the CPU. See aia_kernels/schemas.py for what it computes.
#include "convolve.h"

#include <vector>

#include "lane_memory.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

// Vectors met at once: each tap's weight is spread over lanes once for all of them.
constexpr int kVectors = 4, kStep = kVectors * kLanes;

inline int64_t rounded(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

// Rows [first, last) of a plane, with as many more above and below as a tap reaches, zeros where there are none. The
// element under tap (i, j) of position m of the run stands at m + i * stride + j.
template <class A>
void fill_padded(const Convolution& c, const A* plane, int64_t first, int64_t last, A* padded) {
  const int64_t p = c.pad(), stride = c.stride();
  for (int64_t r = first - p; r < last + p; ++r, padded += stride) {
    std::fill_n(padded, p, A(0));
    if (0 <= r && r < c.H)
      std::copy_n(plane + r * c.W, c.W, padded + p);
    else
      std::fill_n(padded + p, c.W, A(0));
  }
  std::fill_n(padded, 2 * p + kStep, A(0));
}

// A unit: rows [first, last) of sample b, and the length of their run.
struct Run {
  int64_t b, first, last, length;
};
template <class Each>
void for_units(const Convolution& c, int64_t begin, int64_t end, Each&& each) {
  const int64_t rows = unit_rows(c), runs = (c.H + rows - 1) / rows;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % runs * rows, last = std::min(c.H, first + rows);
    each(unit, Run{unit / runs, first, last, (last - first) * c.stride()});
  }
}

template <class A>
void convolve(const Convolution& c, int64_t inputs, int64_t outputs, const A* in, const A* weight, A* out,
              int64_t begin, int64_t end) {
  const int64_t stride = c.stride(), plane = c.H * c.W;
  const int64_t room = (unit_rows(c) + 2 * c.pad()) * stride + 2 * c.pad() + kStep;
  std::vector<A> padded(inputs * room), run(rounded(unit_rows(c) * stride));
  for_units(c, begin, end, [&](int64_t, const Run& at) {
    for (int64_t q = 0; q < inputs; ++q)
      fill_padded(c, in + (at.b * inputs + q) * plane, at.first, at.last, padded.data() + q * room);
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t m = 0; m < at.length; m += kStep) {
        const A* w = weight + o * inputs * c.taps();
        Vec<A> acc[kVectors] = {};
        for (int64_t q = 0; q < inputs; ++q)
          for (int64_t i = 0; i < c.k; ++i) {
            const A* from = padded.data() + q * room + m + i * stride;
            for (int64_t j = 0; j < c.k; ++j, ++from, ++w) {
              const Vec<A> factor = splat(*w);
              for (int v = 0; v < kVectors; ++v) acc[v] += load(from + v * kLanes) * factor;
            }
          }
        for (int v = 0; v < kVectors; ++v) store(run.data() + m + v * kLanes, acc[v]);
      }
      A* to = out + (at.b * outputs + o) * plane + at.first * c.W;
      for (int64_t r = 0; r < at.last - at.first; ++r, to += c.W) std::copy_n(run.data() + r * stride, c.W, to);
    }
  });
}

template <class A>
void weight_gradient(const Convolution& c, int64_t inputs, const A* in, const A* grad, A* partial, int64_t begin,
                     int64_t end) {
  const int64_t stride = c.stride(), plane = c.H * c.W, taps = inputs * c.taps();
  const int64_t room = (unit_rows(c) + 2 * c.pad()) * stride + 2 * c.pad() + kStep;
  std::vector<A> padded(inputs * room), run(rounded(unit_rows(c) * stride));
  std::vector<int64_t> offsets(taps);
  for (int64_t t = 0; t < taps; ++t) offsets[t] = t / c.taps() * room + t % c.taps() / c.k * stride + t % c.k;
  for_units(c, begin, end, [&](int64_t unit, const Run& at) {
    for (int64_t q = 0; q < inputs; ++q)
      fill_padded(c, in + (at.b * inputs + q) * plane, at.first, at.last, padded.data() + q * room);
    std::fill(run.begin(), run.end(), A(0));
    const A* rows = grad + at.b * plane + at.first * c.W;
    for (int64_t r = 0; r < at.last - at.first; ++r, rows += c.W) std::copy_n(rows, c.W, run.data() + r * stride);
    A* sums = partial + unit * taps;
    for (int64_t t = 0; t < taps; t += kVectors) {
      Vec<A> acc[kVectors] = {};
      const A* from[kVectors];
      for (int v = 0; v < kVectors; ++v) from[v] = padded.data() + offsets[std::min(t + v, taps - 1)];
      for (int64_t m = 0; m < at.length; m += kLanes) {
        const Vec<A> g = load(run.data() + m);
        for (int v = 0; v < kVectors; ++v) acc[v] += load(from[v] + m) * g;
      }
      for (int v = 0; v < kVectors && t + v < taps; ++v) sums[t + v] = sum_lanes<A>(acc[v]);
    }
  });
}

template <class A>
constexpr ConvolvePasses<A> kPasses = {convolve<A>, weight_gradient<A>};

}  // namespace

}  // namespace aia::cpu::AIA_CPU_LEVEL

namespace aia::cpu {

using namespace AIA_CPU_LEVEL;

template <class A>
const ConvolvePasses<A> ConvolvePasses<A>::AIA_CPU_LEVEL = kPasses<A>;
template struct ConvolvePasses<float>;
template struct ConvolvePasses<double>;

}  // namespace aia::cpu
