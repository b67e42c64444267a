// The passes of CBAM on memory that somebody has checked and allocated: the choice of the instruction level, the split
// over threads, and what is summed up between them. The work itself is in cpu/.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/norm.h"
#include "../cpu/batch_norm.h"
#include "../cpu/cbam.h"
#include "../cpu/convolve.h"
#include "../cpu/perceptron.h"
#include "checks_cbam.h"
#include "cpu_products.h"

namespace aia::cpu {

// The elements of x that a pass meets.
inline int64_t elements_of(const Matrix& m) { return m.B * m.size(); }

// Over the columns or over the rows of x, times a gate of these or null, into pooled [B, 2, ...] and argmax [B, ...].
// `like` says where memory is to lie.
inline void pool_into(const Matrix& m, const Tensor& like, const void* x, bool over_columns, const void* gate,
                      void* pooled, void* argmax) {
  const CbamPasses& pass = passes<CbamPasses>(m.scalar);
  if (over_columns) {
    split(row_units(m), elements_of(m),
          [&](int64_t begin, int64_t end) { pass.pool_columns(m, x, gate, pooled, argmax, begin, end); });
    return;
  }
  const Parts parts(m);
  const auto pool = [&](double share, void* values, void* indices) {
    split(parts.units(m), elements_of(m),
          [&](int64_t begin, int64_t end) { pass.pool_rows(m, parts, x, gate, share, values, indices, begin, end); });
  };
  if (parts.of_rows == 1) return pool(1.0 / static_cast<double>(m.rows), pooled, argmax);
  const Tensor partial = new_numbers(like, {m.B * parts.of_rows, 2, m.columns});
  const Tensor indices = new_tensor(like, {m.B * parts.of_rows, m.columns}, ScalarType::Int);
  void *values = partial.mutable_data_ptr(), *where = indices.mutable_data_ptr();
  pool(1.0, values, where);
  split(m.B, elements_of(m),
        [&](int64_t begin, int64_t end) { pass.join_pooled(m, parts, values, where, pooled, argmax, begin, end); });
}

inline void recalibrate_into(const Matrix& m, const void* x, const void* of_rows, const void* of_columns, void* y,
                             void* confounder) {
  split(row_units(m), elements_of(m), [&](int64_t begin, int64_t end) {
    passes<CbamPasses>(m.scalar).recalibrate(m, x, of_rows, of_columns, y, confounder, begin, end);
  });
}

// Sums [B, n] of `parts` for each sample, which are there if it is one; fill(data) makes them.
template <class Fill>
void join_into(const Matrix& m, const Tensor& like, int64_t parts, int64_t n, void* result, Fill&& fill) {
  if (parts == 1) return fill(result);
  const Tensor partial = new_numbers(like, {m.B, parts, n});
  void* from = partial.mutable_data_ptr();
  fill(from);
  split(m.B, elements_of(m), [&](int64_t begin, int64_t end) {
    passes<CbamPasses>(m.scalar).join_sums(parts, n, from, result, begin, end);
  });
}

inline void recalibrate_reduce_into(const Matrix& m, const Tensor& like, const void* grad, const void* confounder,
                                    const void* x, const void* of_rows, const void* of_columns, void* over_columns,
                                    void* over_rows) {
  const Parts parts(m);
  join_into(m, like, parts.of_columns, m.rows, over_columns, [&](void* row_sums) {
    join_into(m, like, parts.of_rows, m.columns, over_rows, [&](void* column_sums) {
      split(parts.units(m), elements_of(m), [&](int64_t begin, int64_t end) {
        passes<CbamPasses>(m.scalar).recalibrate_reduce(m, parts, grad, confounder, x, of_rows, of_columns, row_sums,
                                                        column_sums, begin, end);
      });
    });
  });
}

inline void unpool_reduce_into(const Matrix& m, const Tensor& like, const void* x, const Side& spatial, void* sums) {
  const Parts parts(m);
  const int64_t units = m.rows_are_channels ? row_units(m) : parts.units(m);
  join_into(m, like, m.rows_are_channels ? 1 : parts.of_rows, m.channels(), sums, [&](void* to) {
    split(units, elements_of(m), [&](int64_t begin, int64_t end) {
      passes<CbamPasses>(m.scalar).unpool_reduce(m, parts, x, spatial, to, begin, end);
    });
  });
}

inline void unpool_into(const Matrix& m, const void* grad, const void* confounder, const Side& channel,
                        const Side& spatial, void* grad_x) {
  split(row_units(m), elements_of(m), [&](int64_t begin, int64_t end) {
    passes<CbamPasses>(m.scalar).unpool(m, grad, confounder, channel, spatial, grad_x, begin, end);
  });
}

// An element of the spatial gate's convolution of k x k takes two multiply-adds for each tap.
inline int64_t work_of(const Convolution& c) { return c.B * c.H * c.W * std::max<int64_t>(1, c.taps() / 4); }

template <class A>
void convolve_into(const Convolution& c, const A* pooled, const A* weight, A* z) {
  split(units_of(c), work_of(c), [&](int64_t begin, int64_t end) {
    passes<ConvolvePasses<A>>().convolve(c, 2, 1, pooled, weight, z, begin, end);
  });
}

template <class A>
void convolve_back_into(const Convolution& c, const A* grad, const A* pooled, const A* weight, A* grad_pooled,
                        A* grad_weight) {
  // The transpose of a convolution is one by the turned weight.
  const int64_t taps = c.taps();
  std::vector<A> turned(2 * taps), partial(units_of(c) * 2 * taps);
  for (int64_t q = 0; q < 2; ++q)
    std::reverse_copy(weight + q * taps, weight + (q + 1) * taps, turned.begin() + q * taps);
  split(units_of(c), 2 * work_of(c), [&](int64_t begin, int64_t end) {
    passes<ConvolvePasses<A>>().convolve(c, 1, 2, grad, turned.data(), grad_pooled, begin, end);
    passes<ConvolvePasses<A>>().weight_gradient(c, 2, pooled, grad, partial.data(), begin, end);
  });
  for (int64_t t = 0; t < 2 * taps; ++t) {
    double total = 0;
    for (int64_t unit = 0; unit < units_of(c); ++unit) total += partial[unit * 2 * taps + t];
    grad_weight[t] = static_cast<A>(total);
  }
}

// Maps [B, P] of a spatial gate, as the gate passes of Attention in Attention take one map.
inline PackedDims dims_of(int64_t B, int64_t P) {
  PackedDims d{1, 1, {{1, 1, P}}};
  d.B = B;
  return d;
}

// norm [4] and statistics [3] of finish_norm, of z [B, P].
template <class A>
void norm_into(const GateParameters& of, int64_t B, int64_t P, const A* z, A* norm, A* statistics) {
  A mean = 0, var = 1;
  if (of.batch) passes<BatchNormPasses<A>>().moments({B, P, 1, true, Scalar::kFloat32}, z, &mean, &var);
  finish_norm(of, mean, var, static_cast<double>(B * P), norm, statistics);
}

template <class A>
void activate_into(int64_t B, int64_t P, const A* z, const A* norm, A* gate) {
  const PackedDims d = dims_of(B, P);
  split(gate_units(d), B * P,
        [&](int64_t begin, int64_t end) { passes<GatePasses<A>>().activate(d, z, norm, gate, begin, end); });
}

// Of the gradient of the gate that of z, in its place, and those of the scale and the shift.
template <class A>
void norm_back_into(int64_t B, int64_t P, const A* z, const A* gate, const A* norm, const A* statistics, A* grad,
                    A* of_scale, A* of_shift) {
  const PackedDims d = dims_of(B, P);
  std::vector<double> partial(gate_units(d) * kNormPartials);
  split(gate_units(d), B * P, [&](int64_t begin, int64_t end) {
    passes<GatePasses<A>>().backward_reduce(d, grad, z, gate, norm, grad, partial.data(), begin, end);
  });
  double total[kNormPartials] = {};
  for (size_t i = 0; i < partial.size(); ++i) total[i % kNormPartials] += partial[i];
  *of_shift = static_cast<A>(total[0]), *of_scale = static_cast<A>(total[1]);
  const Norm<A> bn{norm[0], norm[1], norm[2], norm[3]};
  const A mean = mean_of(*of_shift, statistics[2]), mean_product = mean_of(*of_scale, statistics[2]);
  for (int64_t i = 0; i < B * P; ++i) grad[i] = bn.grad_z(grad[i], bn.normalized(z[i]), mean, mean_product);
}

// The MLP of a channel gate, of the pools [B, pools, C] of each sample; biases may be null.
struct MlpSizes {
  int64_t B, pools, C, hidden;

  int64_t rows() const { return B * pools; }
};

// Waking other threads takes as long as so many multiply-adds.
constexpr int64_t kMultiplyAddsAlone = int64_t{1} << 18;

template <class Body>
void split_product(const SmallProduct& p, int64_t unit_columns, const Body& body) {
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
  split_product(p, pass.dot_columns,
                [&](int64_t begin, int64_t end) { pass.times_transposed(p, a, b, out, begin, end); });
}
// a [rows, depth] times b [depth, columns].
template <class A>
void times(const SmallProduct& p, const A* a, const A* b, A* out) {
  const PerceptronPasses<A>& pass = passes<PerceptronPasses<A>>();
  split_product(p, pass.block_columns,
                [&](int64_t begin, int64_t end) { pass.times(p, a, p.depth, 1, b, out, begin, end); });
}
// The transpose of a [depth, rows] times b [depth, columns].
template <class A>
void transposed_times(const SmallProduct& p, const A* a, const A* b, A* out) {
  const PerceptronPasses<A>& pass = passes<PerceptronPasses<A>>();
  split_product(p, pass.block_columns,
                [&](int64_t begin, int64_t end) { pass.times(p, a, 1, p.rows, b, out, begin, end); });
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

template <class A>
struct MlpWeights {
  const A *weight_1, *bias_1, *weight_2, *bias_2;
};

template <class A>
void channel_gate_into(const MlpSizes& at, const A* pooled, const MlpWeights<A>& w, A* hidden, A* channel) {
  times_transposed<A>({at.rows(), at.C, at.hidden}, pooled, w.weight_1, hidden);
  for (int64_t row = 0; row < at.rows(); ++row)
    for (int64_t i = 0; i < at.hidden; ++i) {
      A& value = hidden[row * at.hidden + i];
      if (w.bias_1) value += w.bias_1[i];
      value = value <= A(0) ? A(0) : value;
    }
  const std::vector<A> sums = sum_of_pools(at.B, at.pools, at.hidden, hidden);
  times_transposed<A>({at.B, at.hidden, at.C}, sums.data(), w.weight_2, channel);
  if (w.bias_2)
    for (int64_t b = 0; b < at.B; ++b)
      for (int64_t c = 0; c < at.C; ++c) channel[b * at.C + c] += static_cast<A>(at.pools) * w.bias_2[c];
  passes<PerceptronPasses<A>>().sigmoid(at.B * at.C, channel);
}

template <class A>
struct MlpGradients {
  A *weight_1, *bias_1, *weight_2, *bias_2;
};

// What is null is not made.
template <class A>
void channel_gate_back_into(const MlpSizes& at, const A* grad, const A* pooled, const A* hidden, const A* channel,
                            const A* weight_1, const A* weight_2, A* grad_pooled, const MlpGradients<A>& found) {
  const int64_t B = at.B, pools = at.pools, R = at.hidden, C = at.C;
  std::vector<A> of_logits(B * C), of_sums(B * R), of_hidden(B * pools * R);
  for (int64_t i = 0; i < B * C; ++i) of_logits[i] = grad[i] * channel[i] * (A(1) - channel[i]);
  if (found.bias_2) sum_rows(B, C, of_logits.data(), static_cast<A>(pools), found.bias_2);
  if (found.weight_2) {
    const std::vector<A> sums = sum_of_pools(B, pools, R, hidden);
    transposed_times<A>({C, B, R}, of_logits.data(), sums.data(), found.weight_2);
  }
  times<A>({B, C, R}, of_logits.data(), weight_2, of_sums.data());
  for (int64_t row = 0; row < B * pools; ++row)
    for (int64_t i = 0; i < R; ++i)
      of_hidden[row * R + i] = hidden[row * R + i] <= A(0) ? A(0) : of_sums[row / pools * R + i];
  if (found.bias_1) sum_rows(B * pools, R, of_hidden.data(), A(1), found.bias_1);
  if (found.weight_1) transposed_times<A>({R, B * pools, C}, of_hidden.data(), pooled, found.weight_1);
  if (grad_pooled) times<A>({B * pools, R, C}, of_hidden.data(), weight_1, grad_pooled);
}

}  // namespace aia::cpu
