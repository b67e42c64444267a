// The CUDA implementations of the operators of external attention that aia_kernels/schemas.py defines: checks,
// allocation, device and stream. The work itself is in cuda/.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../cuda/double_norm.h"
#include "../cuda/residual.h"
#include "checks_external_attention.h"
#include "cuda.h"

namespace {

using aia::new_like;
using aia::new_numbers;
using aia::cuda::Features;
using aia::cuda::kLimit;
using aia::cuda::Launch;
using aia::cuda::Tokens;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tokens tokens_of(const aia::Logits& at) {
  AIA_CHECK(at.M < kLimit && at.N < kLimit && at.N * at.groups() < kLimit,
            "the logits must have fewer than 2^30 columns, and groups of one sample");
  return {at.B, at.N, static_cast<int>(at.M), static_cast<int>(at.group), at.scalar, at.padding};
}

Features features_of(const aia::Residual& at) {
  AIA_CHECK(at.N < kLimit && at.C < kLimit, "the residual must have fewer than 2^30 tokens and features");
  return {at.B, at.N, at.C, at.maps, at.scalar};
}

// A block of memory that is empty where it is not needed.
Tensor new_workspace(const Tensor& of, bool needed, int64_t count) { return new_numbers(of, {needed ? count : 0}); }

Tensor column_statistics(const Tensor& logits, std::optional<Tensor> padding) {
  const Tokens at = tokens_of(aia::logits_of(logits, 1, "logits", padding));
  const Launch launch(logits);
  Tensor statistics = new_numbers(logits, {at.B, 2, at.M});
  if (at.B == 0) return statistics;
  const int chunks = aia::cuda::token_split(at).chunks;
  Tensor partial = new_workspace(logits, chunks > 1, at.B * chunks * 2 * at.M);
  launch.check(aia::cuda::column_statistics(at, logits.const_data_ptr(), partial.mutable_data_ptr(),
                                            statistics.mutable_data_ptr(), launch.stream()));
  return statistics;
}

Tensor double_norm_(const Tensor& logits, const Tensor& lse, int64_t group, double eps, std::optional<Tensor> padding) {
  const Tokens at = tokens_of(aia::check_double_norm(logits, lse, group, eps, padding));
  const Launch launch(logits);
  Tensor mass = new_numbers(logits, {at.B, at.N, at.groups()});
  if (mass.numel() == 0) return mass;
  launch.check(aia::cuda::double_norm(at, logits.mutable_data_ptr(), lse.const_data_ptr(), eps, mass.mutable_data_ptr(),
                                      launch.stream()));
  return mass;
}

Tensor double_norm_backward_reduce(const Tensor& grad, const Tensor& attention, int64_t group) {
  const Tokens at = tokens_of(aia::check_double_norm_backward_reduce(grad, attention, group));
  const Launch launch(grad);
  Tensor reduced = new_numbers(grad, {at.B, at.M});
  if (at.B == 0) return reduced;
  const int chunks = aia::cuda::token_split(at).chunks;
  const void *g = grad.const_data_ptr(), *a = attention.const_data_ptr();
  Tensor partial = new_workspace(grad, chunks > 1, at.B * chunks * at.M);
  Tensor dots = new_workspace(grad, aia::cuda::needs_dots(at, g, a), at.B * at.N * at.groups());
  launch.check(aia::cuda::double_norm_backward_reduce(at, g, a, dots.mutable_data_ptr(), partial.mutable_data_ptr(),
                                                      reduced.mutable_data_ptr(), launch.stream()));
  return reduced;
}

void double_norm_backward_(const Tensor& grad, const Tensor& attention, const Tensor& mass, const Tensor& reduced,
                           int64_t group) {
  const Tokens at = tokens_of(aia::check_double_norm_backward(grad, attention, mass, reduced, group));
  const Launch launch(grad);
  if (grad.numel() == 0) return;
  launch.check(aia::cuda::double_norm_backward(at, grad.mutable_data_ptr(), attention.const_data_ptr(),
                                               mass.const_data_ptr(), reduced.const_data_ptr(), launch.stream()));
}

Tensor residual_relu_(const Tensor& z, const Tensor& x, std::optional<Tensor> shift) {
  const Features at = features_of(aia::check_residual_relu(z, x, shift));
  const Launch launch(z);
  Tensor signs = torch::stable::new_empty(z, {(at.numel() + 7) / 8}, ScalarType::Byte);
  launch.check(aia::cuda::residual_relu(at, z.mutable_data_ptr(), x.const_data_ptr(),
                                        shift ? shift->const_data_ptr() : nullptr,
                                        static_cast<uint8_t*>(signs.mutable_data_ptr()), launch.stream()));
  return signs;
}

std::tuple<Tensor, Tensor> residual_relu_backward(const Tensor& grad_y, const Tensor& signs) {
  const Features at = features_of(aia::check_residual_relu_backward(grad_y, signs));
  const Launch launch(grad_y);
  Tensor grad = new_like(grad_y), sums = new_numbers(grad_y, {at.C});
  const int64_t rows = aia::cuda::residual_partials(at);
  Tensor partial = new_workspace(grad_y, rows > 1, rows * at.C);
  launch.check(aia::cuda::residual_relu_backward(
      at, grad_y.const_data_ptr(), static_cast<const uint8_t*>(signs.const_data_ptr()), grad.mutable_data_ptr(),
      partial.mutable_data_ptr(), sums.mutable_data_ptr(), launch.stream()));
  return {grad, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CUDA, m) {
  m.impl("column_statistics", TORCH_BOX(&column_statistics));
  m.impl("double_norm_", TORCH_BOX(&double_norm_));
  m.impl("double_norm_backward_reduce", TORCH_BOX(&double_norm_backward_reduce));
  m.impl("double_norm_backward_", TORCH_BOX(&double_norm_backward_));
  m.impl("residual_relu_", TORCH_BOX(&residual_relu_));
  m.impl("residual_relu_backward", TORCH_BOX(&residual_relu_backward));
}
