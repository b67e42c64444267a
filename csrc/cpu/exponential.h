// exp of every lane, and what is made of it: softplus and sigmoid.
//
// exp is exact to two units in the last place: 0 where the result is no normal number, infinity beyond the largest one,
// NaN for NaN.
//
// exp(x) = 2^n * exp(r), n = round(x / ln2), |r| <= ln2 / 2, and exp(r) = 1 + r + r^2 * q(r) with q the Chebyshev
// interpolant of (exp(r) - 1 - r) / r^2: relative errors of 1e-8 (float) and 2e-17 (double) before rounding. Adding
// 1.5 * 2^(bits of the mantissa) + bias rounds to n and leaves n + bias, the exponent of 2^n, in the lowest bits.
#pragma once

#include "lanes.h"

namespace aia::cpu::AIA_CPU_LEVEL {

template <class A>
struct Exponential;

template <>
struct Exponential<float> {
  static constexpr float lowest = -88.0f, highest = 89.0f;  // there the exponent field is 0 and all ones
  static constexpr float rounder = 12582912.0f + 127.0f, log2_e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // n * ln2_high is exact
  static constexpr int mantissa = 23;
  static constexpr float q[] = {0.00139336525f, 0.00836318154f, 0.0416664649f, 0.16666577f, 0.5f};
};

template <>
struct Exponential<double> {
  static constexpr double lowest = -709.0, highest = 710.0;
  static constexpr double rounder = 6755399441055744.0 + 1023.0, log2_e = 1.4426950408889634;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr int mantissa = 52;
  static constexpr double q[] = {2.51052176956845177e-8,  2.76200894819545888e-7,
                                 2.75572553983387109e-6,  0.0000248015212934638606,
                                 0.000198412698748223081, 0.00138888889172155869,
                                 0.00833333333332613456,  0.0416666666666241234,
                                 0.16666666666666671,     0.5};
};

template <class A>
AIA_INLINE Vec<A> exponential(Vec<A> x) {
  using E = Exponential<A>;
  x = smaller<A>(splat(E::highest), larger<A>(splat(E::lowest), x));
  const Vec<A> shifted = x * E::log2_e + E::rounder;
  const Vec<A> n = shifted - E::rounder;
  const Vec<A> r = (x - n * E::ln2_high) - n * E::ln2_low;
  Vec<A> p = splat(E::q[0]);
  for (size_t i = 1; i < sizeof E::q / sizeof E::q[0]; ++i) p = p * r + E::q[i];
  p = p * (r * r) + (r + A(1));
  return p * detail::bit_cast<Vec<A>>(detail::bit_cast<IVec<A>>(shifted) << E::mantissa);
}

template <class A>
AIA_INLINE Vec<A> magnitude(Vec<A> x) {
  return x < Vec<A>{} ? -x : x;
}

// log(1 + exp(x)) = max(x, 0) + log(1 + u) with u = exp(-|x|), and log(1 + u) = 2 atanh(w) with w = u / (2 + u) <= 1/3:
// the series in w^2 to relative errors of 2e-9 (float) and 2e-18 (double).
template <class A>
AIA_INLINE Vec<A> softplus(Vec<A> x) {
  constexpr int kTerms = sizeof(A) == 4 ? 8 : 17;
  const Vec<A> u = exponential<A>(-magnitude<A>(x)), w = u / (u + A(2)), square = w * w;
  Vec<A> series = splat(A(1) / (2 * kTerms - 1));
  for (int k = kTerms - 2; k >= 0; --k) series = series * square + A(1) / (2 * k + 1);
  return (x > Vec<A>{} ? x : Vec<A>{}) + (w + w) * series;
}

// 1 / (1 + exp(-x)), its derivative.
template <class A>
AIA_INLINE Vec<A> sigmoid(Vec<A> x) {
  const Vec<A> u = exponential<A>(-magnitude<A>(x));
  return (x < Vec<A>{} ? u : splat(A(1))) / (u + A(1));
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
