// What the operators of external attention check of their arguments, the same on every device.
#pragma once

#include "checks.h"

namespace aia {

// Logits, attention or their gradients: [B, N, M], contiguous, the M columns in groups. padding is [B, N] or null.
struct Logits {
  int64_t B, N, M, group;
  Scalar scalar;
  const uint8_t* padding;

  int64_t groups() const { return M / group; }
};

inline Logits logits_of(const Tensor& logits, int64_t group, const char* name,
                        const std::optional<Tensor>& padding = std::nullopt) {
  check_operand(logits, logits, name);
  AIA_CHECK(logits.dim() == 3 && logits.is_contiguous() && logits.size(2) > 0, name,
            " must be contiguous [B, N, M] with M > 0, got ", described(logits));
  const int64_t B = logits.size(0), N = logits.size(1), M = logits.size(2);
  AIA_CHECK(group > 0 && M % group == 0, "group must divide the ", M, " columns of ", name, ", got ", group);
  const Scalar scalar = scalar_of(logits, name);
  if (!padding) return {B, N, M, group, scalar, nullptr};
  check_contiguous(*padding, {B, N}, ScalarType::Bool, logits, "padding");
  return {B, N, M, group, scalar, static_cast<const uint8_t*>(padding->const_data_ptr())};
}

// Logits or attention [B, N, S] or [B, N, heads, S]: the S slots of a head are a group.
inline Logits logits_by_heads(const Tensor& logits, const char* name) {
  const Layout at = check_operand(logits, logits, name);
  AIA_CHECK((at.dim == 3 || at.dim == 4) && logits.is_contiguous() && at.numel > 0, name,
            " must be contiguous [B, N, S] or [B, N, heads, S] and not empty, got ", described(logits));
  const int64_t S = at.sizes[at.dim - 1];
  return {at.sizes[0], at.sizes[1], at.dim == 3 ? S : at.sizes[2] * S, S, scalar_of(logits, name), nullptr};
}

inline Logits check_double_normalize_back(const Tensor& grad, const Tensor& attention, const Tensor& mass) {
  const Logits at = logits_by_heads(attention, "attention");
  check_same(grad, attention, "grad", "attention");
  check_contiguous(mass, {at.B, at.N, at.groups()}, accumulate_type(attention), attention, "mass");
  return at;
}

inline Logits check_double_norm(const Tensor& logits, const Tensor& lse, int64_t group, double eps,
                                const std::optional<Tensor>& padding) {
  const Logits at = logits_of(logits, group, "logits", padding);
  check_contiguous(lse, {at.B, at.M}, accumulate_type(logits), logits, "lse");
  check_eps(eps);
  const Span written(logits, "logits", true);
  check_apart(written, {{lse, "lse"}});
  if (padding) check_apart(written, {{*padding, "padding"}});
  return at;
}

inline Logits check_double_norm_backward_reduce(const Tensor& grad, const Tensor& attention, int64_t group) {
  const Logits at = logits_of(grad, group, "grad");
  check_same(attention, grad, "attention", "grad");
  return at;
}

inline Logits check_double_norm_backward(const Tensor& grad, const Tensor& attention, const Tensor& mass,
                                         const Tensor& reduced, int64_t group) {
  const Logits at = check_double_norm_backward_reduce(grad, attention, group);
  check_contiguous(mass, {at.B, at.N, at.groups()}, accumulate_type(grad), grad, "mass");
  check_contiguous(reduced, {at.B, at.M}, accumulate_type(grad), grad, "reduced");
  check_apart({grad, "grad", true}, {{attention, "attention"}, {mass, "mass"}, {reduced, "reduced"}});
  return at;
}

// The tokens [B, N, C] of a residual, which are not empty: stored densely, features or, of maps, tokens contiguous.
struct Residual {
  int64_t B, N, C;
  bool maps;
  Scalar scalar;

  int64_t signs() const { return (B * N * C + 7) / 8; }
};

inline Residual residual_of(const Tensor& z, const char* name) {
  check_operand(z, z, name);
  AIA_CHECK(z.dim() == 3 && z.numel() > 0, name, " must be [B, N, C] and not empty, got ", described(z));
  const int64_t B = z.size(0), N = z.size(1), C = z.size(2);
  // Strides of axes of length one are arbitrary.
  const bool samples = B == 1 || z.stride(0) == N * C;
  const bool maps = (N == 1 || z.stride(1) == 1) && (C == 1 || z.stride(2) == N) && samples;
  AIA_CHECK(z.is_contiguous() || maps, name, " must be stored densely, its features or its tokens contiguous, got ",
            described(z));
  return {B, N, C, !z.is_contiguous(), scalar_of(z, name)};
}

inline Residual check_residual_relu(const Tensor& z, const Tensor& x, const std::optional<Tensor>& shift) {
  const Residual at = residual_of(z, "z");
  check_same(x, z, "x", "z");
  const Span written(z, "z", true);
  check_apart(written, {{x, "x"}});
  if (!shift) return at;
  check_contiguous(*shift, {at.C}, accumulate_type(z), z, "shift");
  check_apart(written, {{*shift, "shift"}});
  return at;
}

// V [C, M] of the block, which is not empty, and the eps of its batch norm.
struct FoldedValue {
  int64_t C, M;
  Scalar scalar;
  double eps;
};

inline FoldedValue folded_value_of(const Tensor& value, double eps) {
  check_operand(value, value, "value");
  AIA_CHECK(value.dim() == 2 && value.is_contiguous() && value.numel() > 0,
            "value must be contiguous [C, M] and not empty, got ", described(value));
  check_eps(eps);
  return {value.size(0), value.size(1), scalar_of(value, "value"), eps};
}

// Numbers [C] of any type of the framework, contiguous, or none.
inline Parameter channels_of(const std::optional<Tensor>& numbers, const FoldedValue& at, const Tensor& value,
                             const char* name) {
  if (!numbers) return {nullptr, Scalar::kFloat32};
  check_contiguous(*numbers, {at.C}, numbers->scalar_type(), value, name);
  return {const_cast<void*>(numbers->const_data_ptr()), scalar_of(*numbers, name)};
}

// Lists of the sums of a batch, [M], [M] and [M, M], in this order; or empty.
inline bool check_batch_sums(const std::vector<Tensor>& sums, const FoldedValue& at, const Tensor& value,
                             std::initializer_list<const char*> names, const char* name) {
  AIA_CHECK(sums.empty() || sums.size() == 3, name, " must hold three tensors or none, got ", sums.size());
  if (sums.empty()) return false;
  const char* const* of = names.begin();
  check_contiguous(sums[0], {at.M}, accumulate_type(value), value, of[0]);
  check_contiguous(sums[1], {at.M}, accumulate_type(value), value, of[1]);
  check_contiguous(sums[2], {at.M, at.M}, accumulate_type(value), value, of[2]);
  return true;
}

inline void check_fold_gradient(const Tensor& product, const Tensor& statistics, const FoldedValue& at,
                                const Tensor& value) {
  check_contiguous(product, {at.C, at.M}, accumulate_type(value), value, "product");
  check_contiguous(statistics, {at.C, 3}, accumulate_type(value), value, "statistics");
}

inline Residual check_residual_relu_backward(const Tensor& grad_y, const Tensor& signs) {
  const Residual at = residual_of(grad_y, "grad_y");
  check_contiguous(signs, {at.signs()}, ScalarType::Byte, grad_y, "signs");
  return at;
}

}  // namespace aia
