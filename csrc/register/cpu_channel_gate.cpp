// The CPU implementations of the operators of CBAM's channel gate that aia_kernels/schemas.py defines: the MLP of
// pooled features, and its transpose. The products are in cpu/perceptron.cpp.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/perceptron.h"
#include "checks_cbam.h"
#include "cpu.h"
#include "cpu_products.h"

namespace {

using aia::new_numbers;
using aia::cpu::mutable_numbers;
using aia::cpu::numbers;
using aia::cpu::parallel;
using aia::cpu::passes;
using aia::cpu::PerceptronPasses;
using aia::cpu::SmallProduct;
using aia::cpu::with_type;
using torch::stable::Tensor;

// Waking other threads takes as long as so many multiply-adds.
constexpr int64_t kMultiplyAddsAlone = int64_t{1} << 18;

template <class Body>
void split(const SmallProduct& p, int64_t unit_columns, const Body& body) {
  const int64_t units = (p.columns + unit_columns - 1) / unit_columns;
  if (p.multiply_adds() < kMultiplyAddsAlone)
    body(int64_t{0}, units);
  else
    parallel(units, body);
}

// a [rows, depth] times the transpose of b [columns, depth].
template <class A>
void times_transposed(const SmallProduct& p, const A* a, const A* b, A* out) {
  const PerceptronPasses<A>& pass = passes<PerceptronPasses<A>>();
  split(p, pass.dot_columns, [&](int64_t begin, int64_t end) { pass.times_transposed(p, a, b, out, begin, end); });
}

// a [rows, depth] times b [depth, columns].
template <class A>
void times(const SmallProduct& p, const A* a, const A* b, A* out) {
  const PerceptronPasses<A>& pass = passes<PerceptronPasses<A>>();
  split(p, pass.block_columns, [&](int64_t begin, int64_t end) { pass.times(p, a, p.depth, 1, b, out, begin, end); });
}
// The transpose of a [depth, rows] times b [depth, columns].
template <class A>
void transposed_times(const SmallProduct& p, const A* a, const A* b, A* out) {
  const PerceptronPasses<A>& pass = passes<PerceptronPasses<A>>();
  split(p, pass.block_columns, [&](int64_t begin, int64_t end) { pass.times(p, a, 1, p.rows, b, out, begin, end); });
}

// The sums [B, n] over the middle axis of from [B, pools, n].
template <class A>
std::vector<A> sum_of_pools(int64_t B, int64_t pools, int64_t n, const A* from) {
  std::vector<A> sums(B * n);
  for (int64_t row = 0; row < B * pools; ++row)
    for (int64_t i = 0; i < n; ++i) sums[row / pools * n + i] += from[row * n + i];
  return sums;
}
// The sums [n] over the rows of from [rows, n], times a factor.
template <class A>
void sum_rows(int64_t rows, int64_t n, const A* from, A factor, A* sums) {
  std::fill_n(sums, n, A(0));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < n; ++i) sums[i] += from[row * n + i];
  for (int64_t i = 0; i < n; ++i) sums[i] *= factor;
}

std::tuple<Tensor, Tensor> channel_gate(const Tensor& pooled, const Tensor& weight_1, std::optional<Tensor> bias_1,
                                        const Tensor& weight_2, std::optional<Tensor> bias_2) {
  const aia::ChannelMlp at(pooled, weight_1, weight_2);
  at.check_biases(bias_1, bias_2, pooled);
  Tensor hidden = new_numbers(pooled, {at.B, at.pools, at.hidden}), channel = new_numbers(pooled, {at.B, at.C});
  with_type(pooled, [&](auto zero) {
    using A = decltype(zero);
    A *h = mutable_numbers<A>(hidden), *g = mutable_numbers<A>(channel);
    const int64_t rows = at.B * at.pools;
    times_transposed<A>({rows, at.C, at.hidden}, numbers<A>(pooled), numbers<A>(weight_1), h);
    const A* bias = bias_1 ? numbers<A>(*bias_1) : nullptr;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < at.hidden; ++i) {
        A& value = h[row * at.hidden + i];
        if (bias) value += bias[i];
        value = value <= A(0) ? A(0) : value;
      }
    const std::vector<A> sums = sum_of_pools(at.B, at.pools, at.hidden, h);
    times_transposed<A>({at.B, at.hidden, at.C}, sums.data(), numbers<A>(weight_2), g);
    if (bias_2)
      for (int64_t b = 0; b < at.B; ++b)
        for (int64_t c = 0; c < at.C; ++c) g[b * at.C + c] += static_cast<A>(at.pools) * numbers<A>(*bias_2)[c];
    passes<PerceptronPasses<A>>().sigmoid(at.B * at.C, g);
  });
  return {hidden, channel};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> channel_gate_backward(const Tensor& grad_channel,
                                                                         const Tensor& pooled, const Tensor& hidden,
                                                                         const Tensor& channel, const Tensor& weight_1,
                                                                         const Tensor& weight_2) {
  const aia::ChannelMlp at(pooled, weight_1, weight_2);
  at.check_results(grad_channel, hidden, channel, pooled);
  const int64_t B = at.B, pools = at.pools, R = at.hidden, C = at.C;
  Tensor grad_pooled = new_numbers(pooled, {B, pools, C});
  Tensor grad_1 = new_numbers(pooled, {R, C}), grad_bias_1 = new_numbers(pooled, {R});
  Tensor grad_2 = new_numbers(pooled, {C, R}), grad_bias_2 = new_numbers(pooled, {C});
  with_type(pooled, [&](auto zero) {
    using A = decltype(zero);
    const A *grad = numbers<A>(grad_channel), *g = numbers<A>(channel), *h = numbers<A>(hidden);
    std::vector<A> of_logits(B * C), of_sums(B * R), of_hidden(B * pools * R);
    for (int64_t i = 0; i < B * C; ++i) of_logits[i] = grad[i] * g[i] * (A(1) - g[i]);
    const std::vector<A> sums = sum_of_pools(B, pools, R, h);
    sum_rows(B, C, of_logits.data(), static_cast<A>(pools), mutable_numbers<A>(grad_bias_2));
    transposed_times<A>({C, B, R}, of_logits.data(), sums.data(), mutable_numbers<A>(grad_2));
    times<A>({B, C, R}, of_logits.data(), numbers<A>(weight_2), of_sums.data());
    for (int64_t row = 0; row < B * pools; ++row)
      for (int64_t i = 0; i < R; ++i)
        of_hidden[row * R + i] = h[row * R + i] <= A(0) ? A(0) : of_sums[row / pools * R + i];
    sum_rows(B * pools, R, of_hidden.data(), A(1), mutable_numbers<A>(grad_bias_1));
    transposed_times<A>({R, B * pools, C}, of_hidden.data(), numbers<A>(pooled), mutable_numbers<A>(grad_1));
    times<A>({B * pools, R, C}, of_hidden.data(), numbers<A>(weight_1), mutable_numbers<A>(grad_pooled));
  });
  return {grad_pooled, grad_1, grad_bias_1, grad_2, grad_bias_2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CPU, m) {
  m.impl("cbam_channel_gate", TORCH_BOX(&channel_gate));
  m.impl("cbam_channel_gate_backward", TORCH_BOX(&channel_gate_backward));
}
