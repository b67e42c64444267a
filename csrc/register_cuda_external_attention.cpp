// The CUDA implementations of the operators of external attention that aia_kernels/ops.py defines: checks, allocation,
// device and stream. The work itself is in cuda/.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/double_norm.h"
#include "cuda/residual.h"
#include "register_cuda.h"

namespace {

using aia::accumulate_type;
using aia::check_same;
using aia::scalar_of;
using aia::cuda::check_beside;
using aia::cuda::Features;
using aia::cuda::Launch;
using aia::cuda::Tokens;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLimit = int64_t{1} << 30;

Tokens tokens_of(const Tensor& logits, int64_t group, const char* name) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.is_contiguous() && logits.size(2) > 0, name,
                  " must be contiguous [B, N, M] with M > 0");
  const int64_t N = logits.size(1), M = logits.size(2);
  STD_TORCH_CHECK(group > 0 && M % group == 0, "group must divide the ", M, " columns of ", name, ", got ", group);
  STD_TORCH_CHECK(M < kLimit && N * (M / group) < kLimit, name,
                  " must have fewer than 2^30 columns, and groups of one sample");
  return Tokens{logits.size(0), N, static_cast<int>(M), static_cast<int>(group), scalar_of(logits, name), nullptr};
}

const uint8_t* padding_of(const std::optional<Tensor>& padding, const Tokens& at, const Tensor& logits) {
  if (!padding) return nullptr;
  STD_TORCH_CHECK(padding->dim() == 2 && padding->is_contiguous() && padding->size(0) == at.B &&
                      padding->size(1) == at.N && padding->scalar_type() == ScalarType::Bool,
                  "padding must be a contiguous boolean [B, N] for the logits' ", at.B, " samples of ", at.N,
                  " tokens");
  check_beside(*padding, logits, "padding");
  return static_cast<const uint8_t*>(padding->const_data_ptr());
}

void check_numbers(const Tensor& t, const std::vector<int64_t>& sizes, const Tensor& of, const char* name) {
  bool fits = t.dim() == static_cast<int64_t>(sizes.size()) && t.is_contiguous();
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = t.size(static_cast<int64_t>(i)) == sizes[i];
  STD_TORCH_CHECK(fits, name, " must be contiguous, of the shape that its operator's schema says");
  STD_TORCH_CHECK(t.scalar_type() == accumulate_type(of), name, " must be in the accumulation type");
  check_beside(t, of, name);
}

Tensor new_numbers(const Tensor& of, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(of, sizes, accumulate_type(of));
}

// A block of memory that is empty where it is not needed.
Tensor new_room(const Tensor& of, bool needed, int64_t count) { return new_numbers(of, {needed ? count : 0}); }

Tensor column_statistics(const Tensor& logits, std::optional<Tensor> padding) {
  Tokens at = tokens_of(logits, 1, "logits");
  at.padding = padding_of(padding, at, logits);
  const Launch launch(logits);
  Tensor statistics = new_numbers(logits, {at.B, 2, at.M});
  if (at.B == 0) return statistics;
  const int chunks = aia::cuda::token_split(at).chunks;
  Tensor partial = new_room(logits, chunks > 1, at.B * chunks * 2 * at.M);
  launch.check(aia::cuda::column_statistics(at, logits.const_data_ptr(), partial.mutable_data_ptr(),
                                            statistics.mutable_data_ptr(), launch.stream()));
  return statistics;
}

Tensor double_norm_(const Tensor& logits, const Tensor& lse, int64_t group, double eps, std::optional<Tensor> padding) {
  Tokens at = tokens_of(logits, group, "logits");
  at.padding = padding_of(padding, at, logits);
  check_numbers(lse, {at.B, at.M}, logits, "lse");
  STD_TORCH_CHECK(eps >= 0, "eps must not be negative, got ", eps);
  const Launch launch(logits);
  Tensor mass = new_numbers(logits, {at.B, at.N, at.groups()});
  if (mass.numel() == 0) return mass;
  launch.check(aia::cuda::double_norm(at, logits.mutable_data_ptr(), lse.const_data_ptr(), eps, mass.mutable_data_ptr(),
                                      launch.stream()));
  return mass;
}

Tensor double_norm_backward_reduce(const Tensor& grad, const Tensor& attention, int64_t group) {
  const Tokens at = tokens_of(grad, group, "grad");
  check_same(grad, attention, "grad and attention");
  check_beside(attention, grad, "attention");
  const Launch launch(grad);
  Tensor reduced = new_numbers(grad, {at.B, at.M});
  if (at.B == 0) return reduced;
  const int chunks = aia::cuda::token_split(at).chunks;
  const void *g = grad.const_data_ptr(), *a = attention.const_data_ptr();
  Tensor partial = new_room(grad, chunks > 1, at.B * chunks * at.M);
  Tensor dots = new_room(grad, aia::cuda::needs_dots(at, g, a), at.B * at.N * at.groups());
  launch.check(aia::cuda::double_norm_backward_reduce(at, g, a, dots.mutable_data_ptr(), partial.mutable_data_ptr(),
                                                      reduced.mutable_data_ptr(), launch.stream()));
  return reduced;
}

void double_norm_backward_(const Tensor& grad, const Tensor& attention, const Tensor& mass, const Tensor& reduced,
                           int64_t group) {
  const Tokens at = tokens_of(grad, group, "grad");
  check_same(grad, attention, "grad and attention");
  check_beside(attention, grad, "attention");
  check_numbers(mass, {at.B, at.N, at.groups()}, grad, "mass");
  check_numbers(reduced, {at.B, at.M}, grad, "reduced");
  if (grad.numel() == 0) return;
  const Launch launch(grad);
  launch.check(aia::cuda::double_norm_backward(at, grad.mutable_data_ptr(), attention.const_data_ptr(),
                                               mass.const_data_ptr(), reduced.const_data_ptr(), launch.stream()));
}

Features features_of(const Tensor& z, const char* name) {
  STD_TORCH_CHECK(z.dim() == 3, name, " must be [B, N, C], got ", z.dim(), " axes");
  const int64_t B = z.size(0), N = z.size(1), C = z.size(2);
  // Strides of axes of length one are arbitrary.
  const bool samples = B == 1 || z.stride(0) == N * C;
  const bool maps = (N == 1 || z.stride(1) == 1) && (C == 1 || z.stride(2) == N) && samples;
  STD_TORCH_CHECK(z.is_contiguous() || maps, name, " must be stored densely, its features or its tokens contiguous");
  STD_TORCH_CHECK(z.numel() > 0, name, " must not be empty");
  STD_TORCH_CHECK(N < kLimit && C < kLimit, name, " must have fewer than 2^30 tokens and features");
  return Features{B, N, C, !z.is_contiguous(), scalar_of(z, name)};
}

Tensor residual_relu_(const Tensor& z, const Tensor& x, std::optional<Tensor> shift) {
  const Features at = features_of(z, "z");
  check_same(z, x, "z and x");
  check_beside(x, z, "x");
  if (shift) check_numbers(*shift, {at.C}, z, "shift");
  const Launch launch(z);
  Tensor signs = torch::stable::new_empty(z, {(at.numel() + 7) / 8}, ScalarType::Byte);
  launch.check(aia::cuda::residual_relu(at, z.mutable_data_ptr(), x.const_data_ptr(),
                                        shift ? shift->const_data_ptr() : nullptr,
                                        static_cast<uint8_t*>(signs.mutable_data_ptr()), launch.stream()));
  return signs;
}

std::tuple<Tensor, Tensor> residual_relu_backward(const Tensor& grad_y, const Tensor& signs) {
  const Features at = features_of(grad_y, "grad_y");
  STD_TORCH_CHECK(signs.dim() == 1 && signs.is_contiguous() && signs.size(0) == (at.numel() + 7) / 8 &&
                      signs.scalar_type() == ScalarType::Byte,
                  "signs must be uint8, one bit for each element of grad_y");
  check_beside(signs, grad_y, "signs");
  const Launch launch(grad_y);
  Tensor grad = torch::stable::empty_like(grad_y), sums = new_numbers(grad_y, {at.C});
  const int64_t rows = aia::cuda::residual_partials(at);
  Tensor partial = new_room(grad_y, rows > 1, rows * at.C);
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
