// Batch norm, residual and ReLU of a small block of external attention on the CPU, and sums over its tokens. Plain
// loops, which the compiler makes vectors of: a call has so few elements that calls are what it costs.
#include "batch_norm.h"

#include <algorithm>
#include <vector>

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

// Calls each(i, c) for every element of z, the i-th in the order of storage, of channel c.
template <class Each>
void for_elements(const Rows& z, Each&& each) {
  if (!z.maps) {
    for (int64_t first = 0; first < z.numel(); first += z.C)
      for (int64_t c = 0; c < z.C; ++c) each(first + c, c);
    return;
  }
  for (int64_t row = 0; row < z.B * z.C; ++row)
    for (int64_t i = row * z.N; i < (row + 1) * z.N; ++i) each(i, row % z.C);
}

// The sum of term(i) for count numbers i from first on, as many at a time as fill the vectors of any level.
template <class Term>
double sum_of(int64_t first, int64_t count, Term&& term) {
  constexpr int kParts = 16;
  double parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= count; i += kParts)
    for (int k = 0; k < kParts; ++k) parts[k] += term(first + i + k);
  for (int k = 0; i < count; ++i, ++k) parts[k] += term(first + i);
  double sum = 0;
  for (const double part : parts) sum += part;
  return sum;
}

// The sums of term(i, c) over the elements of each channel.
template <class Term>
std::vector<double> sums_of(const Rows& z, Term&& term) {
  std::vector<double> sums(z.C);
  double* to = sums.data();
  if (!z.maps) {
    for_elements(z, [&](int64_t i, int64_t c) { to[c] += term(i, c); });
    return sums;
  }
  for (int64_t row = 0; row < z.B * z.C; ++row)
    to[row % z.C] += sum_of(row * z.N, z.N, [&](int64_t i) { return term(i, row % z.C); });
  return sums;
}

template <class A>
void moments(const Rows& z, const A* data, A* mean, A* var) {
  const auto count = static_cast<double>(z.B * z.N);
  const std::vector<double> total = sums_of(z, [&](int64_t i, int64_t) { return static_cast<double>(data[i]); });
  std::vector<double> center(z.C);
  for (int64_t c = 0; c < z.C; ++c) mean[c] = static_cast<A>(center[c] = total[c] / count);
  const std::vector<double> squares = sums_of(z, [&, from = center.data()](int64_t i, int64_t c) {
    const double off = data[i] - from[c];
    return off * off;
  });
  for (int64_t c = 0; c < z.C; ++c) var[c] = static_cast<A>(squares[c] / count);
}

template <class A>
void apply(const Rows& z, const A* data, const A* x, const A* mean, const A* factor, const A* shift, A* y) {
  for_elements(z, [&](int64_t i, int64_t c) {
    const A total = (data[i] - mean[c]) * factor[c] + shift[c] + x[i];
    y[i] = total <= 0 ? A(0) : total;
  });
}

template <class A>
void backward_reduce(const Rows& z, const A* grad_y, const A* y, const A* data, const A* mean, A* g, A* sums,
                     A* products) {
  for (int64_t i = 0; i < z.numel(); ++i) g[i] = y[i] <= 0 ? A(0) : grad_y[i];
  const std::vector<double> of_g = sums_of(z, [&](int64_t i, int64_t) { return static_cast<double>(g[i]); });
  const std::vector<double> of_both = sums_of(
      z, [&](int64_t i, int64_t c) { return static_cast<double>(g[i]) * (static_cast<double>(data[i]) - mean[c]); });
  for (int64_t c = 0; c < z.C; ++c) sums[c] = static_cast<A>(of_g[c]), products[c] = static_cast<A>(of_both[c]);
}

template <class A>
void backward(const Rows& z, const A* g, const A* data, const A* mean, const A* factor, const A* slope,
              const A* constant, A* grad_z) {
  for_elements(
      z, [&](int64_t i, int64_t c) { grad_z[i] = g[i] * factor[c] + (data[i] - mean[c]) * slope[c] + constant[c]; });
}

template <class A>
void sums(const Rows& z, const A* g, A* out) {
  const std::vector<double> total = sums_of(z, [&](int64_t i, int64_t) { return static_cast<double>(g[i]); });
  for (int64_t c = 0; c < z.C; ++c) out[c] = static_cast<A>(total[c]);
}

template <class A>
void add(const Rows& z, const A* shift, A* data) {
  for_elements(z, [&](int64_t i, int64_t c) { data[i] += shift[c]; });
}

template <class A>
constexpr BatchNormPasses<A> kPasses = {moments<A>, apply<A>, backward_reduce<A>, backward<A>, sums<A>, add<A>};

}  // namespace

}  // namespace aia::cpu::AIA_CPU_LEVEL

namespace aia::cpu {

using namespace AIA_CPU_LEVEL;

template <class A>
const BatchNormPasses<A> BatchNormPasses<A>::AIA_CPU_LEVEL = kPasses<A>;
template struct BatchNormPasses<float>;
template struct BatchNormPasses<double>;

}  // namespace aia::cpu
