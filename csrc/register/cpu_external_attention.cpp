// The CPU implementations of the operators of external attention that aia_kernels/schemas.py defines: checks,
// allocation, choice of the instruction level, and the split over threads. The work itself is in cpu/.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../cpu/residual.h"
#include "checks_external_attention.h"
#include "cpu.h"
#include "cpu_double_norm.h"

namespace {

using aia::new_numbers;
using aia::cpu::back_to_logits;
using aia::cpu::normalize;
using aia::cpu::output_like;
using aia::cpu::parallel;
using aia::cpu::passes;
using aia::cpu::ResidualPasses;
using aia::cpu::Rows;
using aia::cpu::sums_of;
using aia::cpu::Tokens;
using aia::cpu::tokens_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> double_normalize(const Tensor& logits, double eps) {
  const Tokens at = tokens_of(aia::logits_by_heads(logits, "logits"));
  aia::check_eps(eps);
  Tensor attention = output_like(logits), mass = new_numbers(logits, {at.B, at.N, at.groups()});
  normalize(at, logits, eps, attention, mass);
  return {attention, mass};
}

Tensor double_normalize_back(const Tensor& grad, const Tensor& attention, const Tensor& mass) {
  const Tokens at = tokens_of(aia::check_double_normalize_back(grad, attention, mass));
  Tensor grad_logits = output_like(attention);
  back_to_logits(at, grad, attention, mass, sums_of(at, grad, attention), grad_logits);
  return grad_logits;
}

Rows rows_of(const aia::Residual& at) { return {at.B, at.N, at.C, at.maps, at.scalar}; }

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
  m.impl("column_statistics", TORCH_BOX(&aia::cpu::column_statistics));
  m.impl("double_norm_", TORCH_BOX(&aia::cpu::double_norm_));
  m.impl("double_norm_backward_reduce", TORCH_BOX(&aia::cpu::double_norm_backward_reduce));
  m.impl("double_norm_backward_", TORCH_BOX(&aia::cpu::double_norm_backward_));
  m.impl("double_normalize", TORCH_BOX(&double_normalize));
  m.impl("double_normalize_back", TORCH_BOX(&double_normalize_back));
  m.impl("residual_relu_", TORCH_BOX(&residual_relu_));
  m.impl("residual_relu_backward", TORCH_BOX(&residual_relu_backward));
}
