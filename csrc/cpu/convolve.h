// What the convolution of a spatial gate on the CPU looks like from outside; see passes.h.
#pragma once

#include <algorithm>
#include <cstdint>

namespace aia::cpu {

// A convolution k x k of planes H x W with zeros around, k odd. In a copy of some rows a few zeros follow each row, as
// many as a row needs before and behind it: a shift by a tap is then a shift of the whole run, and lanes never idle.
struct Convolution {
  int64_t B, H, W, k;

  int64_t pad() const { return k / 2; }
  int64_t stride() const { return W + pad(); }
  int64_t taps() const { return k * k; }
};

// Rows of one unit, of about so many elements.
constexpr int64_t kRunElements = 4096;
inline int64_t unit_rows(const Convolution& c) { return std::clamp<int64_t>(kRunElements / c.stride(), 1, c.H); }
inline int64_t units_of(const Convolution& c) { return c.B * ((c.H + unit_rows(c) - 1) / unit_rows(c)); }

// Numbers are of type A, float or double.
template <class A>
struct ConvolvePasses {
  static const ConvolvePasses base, v3, v4;

  // out [B, outputs, H, W] of in [B, inputs, H, W] by weight [outputs, inputs, k, k]. Units: units_of.
  void (*convolve)(const Convolution&, int64_t inputs, int64_t outputs, const A* in, const A* weight, A* out,
                   int64_t begin, int64_t end);
  // partial [units_of, inputs, k, k]: the unit's part of the gradient of a weight [1, inputs, k, k], for that of the
  // result [B, 1, H, W].
  void (*weight_gradient)(const Convolution&, int64_t inputs, const A* in, const A* grad, A* partial, int64_t begin,
                          int64_t end);
};

}  // namespace aia::cpu
