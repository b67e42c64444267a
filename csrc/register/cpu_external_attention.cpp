// The CPU implementations of the operators of external attention that aia_kernels/schemas.py defines: checks,
// allocation, choice of the instruction level, and the split over threads. The work itself is in cpu/.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/double_norm.h"
#include "../cpu/residual.h"
#include "checks_external_attention.h"
#include "cpu.h"

namespace {

using aia::new_numbers;
using aia::cpu::DoubleNormPasses;
using aia::cpu::output_like;
using aia::cpu::parallel;
using aia::cpu::passes;
using aia::cpu::ResidualPasses;
using aia::cpu::Rows;
using aia::cpu::Split;
using aia::cpu::token_units;
using aia::cpu::Tokens;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tokens tokens_of(const aia::Logits& at) { return {at.B, at.N, at.M, at.group, at.scalar, at.padding}; }

Rows rows_of(const aia::Residual& at) { return {at.B, at.N, at.C, at.maps, at.scalar}; }

// A reduction over tokens: reduce writes [B, chunks, sizes..., M], and join, called with samples, [B, sizes..., M].
template <class Reduce, class Join>
Tensor reduce_tokens(const Tensor& of, const Tokens& at, const Split& split, const std::vector<int64_t>& sizes,
                     Reduce&& reduce, Join&& join) {
  std::vector<int64_t> shape{at.B};
  shape.insert(shape.end(), sizes.begin(), sizes.end());
  Tensor result = new_numbers(of, shape), partial = result;
  if (split.chunks > 1) {
    shape.insert(shape.begin() + 1, split.chunks);
    partial = new_numbers(of, shape);
  }
  void *parts = partial.mutable_data_ptr(), *out = result.mutable_data_ptr();
  parallel(split.units(at), [&](int64_t begin, int64_t end) { reduce(parts, begin, end); });
  if (split.chunks > 1) parallel(at.B, [&](int64_t begin, int64_t end) { join(parts, out, begin, end); });
  return result;
}

Tensor column_statistics(const Tensor& logits, std::optional<Tensor> padding) {
  const Tokens at = tokens_of(aia::logits_of(logits, 1, "logits", padding));
  const void* data = logits.const_data_ptr();
  return reduce_tokens(
      logits, at, statistics_split(at), {2, at.M},
      [&](void* parts, int64_t begin, int64_t end) {
        passes<DoubleNormPasses>(at.scalar).column_statistics(at, data, parts, begin, end);
      },
      [&](void* parts, void* out, int64_t begin, int64_t end) {
        passes<DoubleNormPasses>(at.scalar).join_statistics(at, parts, out, begin, end);
      });
}

Tensor double_norm_(const Tensor& logits, const Tensor& lse, int64_t group, double eps, std::optional<Tensor> padding) {
  const Tokens at = tokens_of(aia::check_double_norm(logits, lse, group, eps, padding));
  Tensor mass = new_numbers(logits, {at.B, at.N, at.groups()});
  void *data = logits.mutable_data_ptr(), *out = mass.mutable_data_ptr();
  const void* origin = lse.const_data_ptr();
  parallel(token_units(at), [&](int64_t begin, int64_t end) {
    passes<DoubleNormPasses>(at.scalar).double_norm(at, data, origin, eps, out, begin, end);
  });
  return mass;
}

Tensor double_norm_backward_reduce(const Tensor& grad, const Tensor& attention, int64_t group) {
  const Tokens at = tokens_of(aia::check_double_norm_backward_reduce(grad, attention, group));
  const void *g = grad.const_data_ptr(), *a = attention.const_data_ptr();
  return reduce_tokens(
      grad, at, sums_split(at), {at.M},
      [&](void* parts, int64_t begin, int64_t end) {
        passes<DoubleNormPasses>(at.scalar).backward_reduce(at, g, a, parts, begin, end);
      },
      [&](void* parts, void* out, int64_t begin, int64_t end) {
        passes<DoubleNormPasses>(at.scalar).join_sums(at, parts, out, begin, end);
      });
}

void double_norm_backward_(const Tensor& grad, const Tensor& attention, const Tensor& mass, const Tensor& reduced,
                           int64_t group) {
  const Tokens at = tokens_of(aia::check_double_norm_backward(grad, attention, mass, reduced, group));
  void* g = grad.mutable_data_ptr();
  const void *a = attention.const_data_ptr(), *m = mass.const_data_ptr(), *d = reduced.const_data_ptr();
  parallel(token_units(at), [&](int64_t begin, int64_t end) {
    passes<DoubleNormPasses>(at.scalar).backward(at, g, a, m, d, begin, end);
  });
}

Tensor residual_relu_(const Tensor& z, const Tensor& x, std::optional<Tensor> shift) {
  const aia::Residual at = aia::check_residual_relu(z, x, shift);
  const Rows rows = rows_of(at);
  Tensor signs = torch::stable::new_empty(z, {at.signs()}, ScalarType::Byte);
  void* data = z.mutable_data_ptr();
  const void *residual = x.const_data_ptr(), *shifts = shift ? shift->const_data_ptr() : nullptr;
  void* bits = signs.mutable_data_ptr();
  parallel(element_units(rows), [&](int64_t begin, int64_t end) {
    passes<ResidualPasses>(rows.scalar).relu(rows, data, residual, shifts, bits, begin, end);
  });
  return signs;
}

std::tuple<Tensor, Tensor> residual_relu_backward(const Tensor& grad_y, const Tensor& signs) {
  const Rows rows = rows_of(aia::check_residual_relu_backward(grad_y, signs));
  Tensor grad = output_like(grad_y), sums = new_numbers(grad_y, {rows.C});
  Tensor partial = torch::stable::new_zeros(grad_y, {partial_sums(rows)}, aia::accumulate_type(grad_y));
  const void* data = grad_y.const_data_ptr();
  const void* bits = signs.const_data_ptr();
  void *out = grad.mutable_data_ptr(), *parts = partial.mutable_data_ptr();
  parallel(element_units(rows), [&](int64_t begin, int64_t end) {
    passes<ResidualPasses>(rows.scalar).relu_backward(rows, data, bits, out, parts, begin, end);
  });
  passes<ResidualPasses>(rows.scalar).join_sums(rows, parts, sums.mutable_data_ptr());
  return {grad, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CPU, m) {
  m.impl("column_statistics", TORCH_BOX(&column_statistics));
  m.impl("double_norm_", TORCH_BOX(&double_norm_));
  m.impl("double_norm_backward_reduce", TORCH_BOX(&double_norm_backward_reduce));
  m.impl("double_norm_backward_", TORCH_BOX(&double_norm_backward_));
  m.impl("residual_relu_", TORCH_BOX(&residual_relu_));
  m.impl("residual_relu_backward", TORCH_BOX(&residual_relu_backward));
}
