// What the operators of attention by a memory per sample check of their arguments, the same on every device.
#pragma once

#include "checks.h"

namespace aia {

// Logits [B, 2 H d, N]: keys and queries of the heads, tokens contiguous; padding is [B, N] or null. R rows of phi in
// each head.
struct MemoryLogits {
  int64_t B, H, d, R, N, feature;
  Scalar scalar;
  const uint8_t* padding;
};

inline MemoryLogits memory_of(const Tensor& logits, int64_t feature, int64_t heads,
                              const std::optional<Tensor>& padding) {
  const Layout at = check_operand(logits, logits, "logits");
  AIA_CHECK(at.dim == 3 && at.numel > 0, "logits must be [B, 2 H d, N] and not empty, got ", described(logits));
  const int64_t B = at.sizes[0], columns = at.sizes[1], N = at.sizes[2];
  check_contiguous(logits, {B, columns, N}, logits.scalar_type(), logits, "logits");
  AIA_CHECK(feature >= 0 && feature <= 2, "feature must be 0 (l2), 1 (softplus) or 2 (softmax), got ", feature);
  AIA_CHECK(heads > 0 && columns % 2 == 0 && columns / 2 % heads == 0, "heads must divide half of the ", columns,
            " rows of logits, got ", heads);
  const int64_t d = columns / 2 / heads, R = d + (feature == 0 ? 1 : 0);
  const uint8_t* hidden = nullptr;
  if (padding) {
    check_contiguous(*padding, {B, N}, ScalarType::Bool, logits, "padding");
    hidden = static_cast<const uint8_t*>(padding->const_data_ptr());
  }
  return {B, heads, d, R, N, feature, scalar_of(logits, "logits"), hidden};
}

// Rows of phi(k), and behind it those of the gradients of keys and queries, which are written.
inline void check_rows(const Tensor& rows, const Tensor& logits, const MemoryLogits& at) {
  check_contiguous(rows, {at.B, at.H * (at.R + 2 * at.d), at.N}, accumulate_type(logits), logits, "rows");
  check_apart({rows, "rows", true}, {{logits, "logits"}});
}

// The sums over tokens of phi(k), eps and gamma: what a query's features are divided and multiplied by.
inline void check_divisor(const Tensor& sums, const std::optional<Tensor>& gamma, double eps, const Tensor& logits,
                          const MemoryLogits& at) {
  check_contiguous(sums, {at.B, at.H * at.R}, accumulate_type(logits), logits, "sums");
  if (gamma) check_contiguous(*gamma, {1}, logits.scalar_type(), logits, "gamma");
  check_eps(eps);
}

// The gradient of phi by way of a memory.
inline void check_reached(const Tensor& reached, const Tensor& logits, const MemoryLogits& at) {
  check_contiguous(reached, {at.B, at.H * at.R, at.N}, logits.scalar_type(), logits, "reached");
}

}  // namespace aia
