// The CUDA implementations of the operators of external attention that aia_kernels/schemas.py defines: checks,
// allocation, device and stream. The work itself is in cuda/.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../cuda/double_norm.h"
#include "../cuda/fold.h"
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

std::tuple<Tensor, Tensor> column_statistics(const Tensor& logits, std::optional<Tensor> padding) {
  const Tokens at = tokens_of(aia::logits_of(logits, 1, "logits", padding));
  const Launch launch(logits);
  Tensor statistics = new_numbers(logits, {at.B, 2, at.M}), lse = new_numbers(logits, {at.B, at.M});
  if (at.B == 0) return {statistics, lse};
  const int chunks = aia::cuda::token_split(at).chunks;
  Tensor partial = new_workspace(logits, chunks > 1, at.B * chunks * 2 * at.M);
  launch.check(aia::cuda::column_statistics(at, logits.const_data_ptr(), partial.mutable_data_ptr(),
                                            statistics.mutable_data_ptr(), lse.mutable_data_ptr(), launch.stream()));
  return {statistics, lse};
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

aia::cuda::Folding folding_of(const aia::FoldedValue& at) {
  AIA_CHECK(at.C < kLimit && at.M < kLimit, "value must have fewer than 2^30 rows and columns");
  return {static_cast<int>(at.C), static_cast<int>(at.M), at.scalar, at.eps};
}

const void* data_of(const std::vector<Tensor>& tensors, size_t i) {
  return i < tensors.size() ? tensors[i].const_data_ptr() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fold(const Tensor& value, std::optional<Tensor> weight,
                                                std::optional<Tensor> bias, std::vector<Tensor> of_batch, double count,
                                                std::vector<Tensor> fixed, double eps) {
  const aia::FoldedValue at = aia::folded_value_of(value, eps);
  const auto of_weight = aia::channels_of(weight, at, value, "weight"),
             of_bias = aia::channels_of(bias, at, value, "bias");
  const bool batch = aia::check_batch_sums(of_batch, at, value, {"origin", "total", "second"}, "of_batch");
  AIA_CHECK(fixed.size() == (batch ? 0 : 2), "fixed must hold mean and variance where of_batch is empty, else nothing");
  AIA_CHECK(!batch || count > 0, "count must be positive, got ", count);
  aia::Parameter mean{}, var{};
  if (!batch) mean = aia::channels_of(fixed[0], at, value, "mean"), var = aia::channels_of(fixed[1], at, value, "var");
  const Launch launch(value);
  Tensor folded = torch::stable::new_empty(value, {at.C, at.M}), shift = new_numbers(value, {at.C});
  Tensor statistics = new_numbers(value, {at.C, 3}), off = new_numbers(value, {batch ? at.M : 0});
  launch.check(aia::cuda::fold(
      folding_of(at), value.const_data_ptr(), of_weight, of_bias,
      {data_of(of_batch, 0), data_of(of_batch, 1), data_of(of_batch, 2)}, count, mean, var,
      {folded.mutable_data_ptr(), shift.mutable_data_ptr(), statistics.mutable_data_ptr(), off.mutable_data_ptr()},
      launch.stream()));
  return {folded, shift, statistics, off};
}

std::tuple<Tensor, Tensor> fold_sums(const Tensor& value, const Tensor& product, const Tensor& sums,
                                     const Tensor& statistics, std::optional<Tensor> off, double eps) {
  const aia::FoldedValue at = aia::folded_value_of(value, eps);
  aia::check_fold_gradient(product, statistics, at, value);
  aia::check_contiguous(sums, {at.C}, aia::accumulate_type(value), value, "sums");
  if (off) aia::check_contiguous(*off, {at.M}, aia::accumulate_type(value), value, "off");
  const Launch launch(value);
  Tensor joint = new_numbers(value, {2, at.C}), center = new_numbers(value, {at.C});
  launch.check(aia::cuda::fold_sums(
      folding_of(at),
      {value.const_data_ptr(), statistics.const_data_ptr(), off ? off->const_data_ptr() : nullptr, nullptr, nullptr},
      product.const_data_ptr(), sums.const_data_ptr(), joint.mutable_data_ptr(), center.mutable_data_ptr(),
      launch.stream()));
  return {joint, center};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fold_back(const Tensor& value, std::optional<Tensor> weight,
                                                     const Tensor& product, const Tensor& joint, const Tensor& center,
                                                     const Tensor& statistics, std::vector<Tensor> of_batch,
                                                     double eps) {
  const aia::FoldedValue at = aia::folded_value_of(value, eps);
  const auto of_weight = aia::channels_of(weight, at, value, "weight");
  aia::check_fold_gradient(product, statistics, at, value);
  aia::check_contiguous(joint, {2, at.C}, aia::accumulate_type(value), value, "joint");
  aia::check_contiguous(center, {at.C}, aia::accumulate_type(value), value, "center");
  const bool batch = aia::check_batch_sums(of_batch, at, value, {"off", "total", "second"}, "of_batch");
  const Launch launch(value);
  Tensor grad = torch::stable::new_empty(value, {at.C, at.M}), folded = torch::stable::new_empty(value, {at.C, at.M});
  const int64_t m = batch ? at.M : 0;
  Tensor inner = new_numbers(value, {m, m}), constant = new_numbers(value, {m});
  launch.check(aia::cuda::fold_back(
      folding_of(at),
      {value.const_data_ptr(), statistics.const_data_ptr(), data_of(of_batch, 0), data_of(of_batch, 1),
       data_of(of_batch, 2)},
      of_weight, product.const_data_ptr(), joint.const_data_ptr(), center.const_data_ptr(),
      {grad.mutable_data_ptr(), folded.mutable_data_ptr(), inner.mutable_data_ptr(), constant.mutable_data_ptr()},
      launch.stream()));
  return {grad, folded, inner, constant};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CUDA, m) {
  m.impl("column_statistics", TORCH_BOX(&column_statistics));
  m.impl("double_norm_", TORCH_BOX(&double_norm_));
  m.impl("double_norm_backward_reduce", TORCH_BOX(&double_norm_backward_reduce));
  m.impl("double_norm_backward_", TORCH_BOX(&double_norm_backward_));
  m.impl("fold", TORCH_BOX(&fold));
  m.impl("fold_back", TORCH_BOX(&fold_back));
  m.impl("fold_sums", TORCH_BOX(&fold_sums));
  m.impl("residual_relu_", TORCH_BOX(&residual_relu_));
  m.impl("residual_relu_backward", TORCH_BOX(&residual_relu_backward));
}
