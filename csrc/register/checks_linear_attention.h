// What the operators of attention by a memory per sample check of their arguments, the same on every device.
#pragma once

#include "../common/memory.h"
#include "checks.h"

namespace aia {

inline Memory memory_of(const Tensor& logits, int64_t feature, int64_t heads, const std::optional<Tensor>& padding) {
  const Layout at = check_operand(logits, logits, "logits");
  AIA_CHECK(at.dim == 3 && at.numel > 0, "logits must be [B, 2 H d, N] and not empty, got ", described(logits));
  const int64_t B = at.sizes[0], columns = at.sizes[1], N = at.sizes[2];
  check_contiguous(logits, {B, columns, N}, logits.scalar_type(), logits, "logits");
  AIA_CHECK(feature >= 0 && feature <= 2, "feature must be 0 (l2), 1 (softplus) or 2 (softmax), got ", feature);
  AIA_CHECK(heads > 0 && columns % 2 == 0 && columns / 2 % heads == 0, "heads must divide half of the ", columns,
            " rows of logits, got ", heads);
  const uint8_t* hidden = nullptr;
  if (padding) {
    check_contiguous(*padding, {B, N}, ScalarType::Bool, logits, "padding");
    hidden = static_cast<const uint8_t*>(padding->const_data_ptr());
  }
  return {B, heads, columns / 2 / heads, N, static_cast<Feature>(feature), scalar_of(logits, "logits"), hidden};
}

// Of a softmax over tokens its statistics, where they are known.
inline void check_statistics(const std::optional<Tensor>& statistics, const Tensor& logits, const Memory& at) {
  if (!statistics) return;
  AIA_CHECK(at.feature == Feature::kSoftmax, "statistics must be None but for a softmax");
  check_contiguous(*statistics, {at.B, 2, at.H * at.d}, accumulate_type(logits), logits, "statistics");
}

// Rows of phi(k), and behind it those of the gradients of keys and queries, which are written; they are of a type.
inline void check_rows(const Tensor& rows, ScalarType type, const Tensor& logits, const Memory& at) {
  check_contiguous(rows, {at.B, at.H * (at.R() + 2 * at.d), at.N}, type, logits, "rows");
  check_apart({rows, "rows", true}, {{logits, "logits"}});
}

// The sums over tokens of phi(k), eps and gamma: what a query's features are divided and multiplied by.
inline void check_divisor(const Tensor& sums, const std::optional<Tensor>& gamma, double eps, const Tensor& logits,
                          const Memory& at) {
  check_contiguous(sums, {at.B, at.H * at.R()}, accumulate_type(logits), logits, "sums");
  if (gamma) check_contiguous(*gamma, {1}, logits.scalar_type(), logits, "gamma");
  check_eps(eps);
}

// The gradient of phi by way of a memory.
inline void check_reached(const Tensor& reached, const Tensor& logits, const Memory& at) {
  check_contiguous(reached, {at.B, at.H * at.R(), at.N}, logits.scalar_type(), logits, "reached");
}

// What a backward of queries reads and writes.
inline void check_queries_backward(const Tensor& rows, ScalarType type, const Tensor& logits,
                                   const std::optional<Tensor>& padding, const Tensor& sums,
                                   const std::optional<Tensor>& gamma, double eps, const Tensor& reached,
                                   const Memory& at) {
  check_divisor(sums, gamma, eps, logits, at);
  check_rows(rows, type, logits, at);
  check_reached(reached, logits, at);
  const Span written(rows, "rows", true);
  check_apart(written, {{sums, "sums"}, {reached, "reached"}});
  if (padding) check_apart(written, {{*padding, "padding"}});
  if (gamma) check_apart(written, {{*gamma, "gamma"}});
}

// And of keys.
inline void check_keys_backward(const Tensor& rows, ScalarType type, const Tensor& logits,
                                const std::optional<Tensor>& padding, const Tensor& reached, const Tensor& grad_sums,
                                const std::optional<Tensor>& reduced, const Memory& at) {
  check_rows(rows, type, logits, at);
  check_reached(reached, logits, at);
  check_contiguous(grad_sums, {at.B, at.H * at.R()}, accumulate_type(logits), logits, "grad_sums");
  const Span written(rows, "rows", true);
  check_apart(written, {{reached, "reached"}, {grad_sums, "grad_sums"}});
  if (padding) check_apart(written, {{*padding, "padding"}});
  if (!reduced) return;
  AIA_CHECK(at.feature == Feature::kSoftmax, "reduced must be None but for a softmax");
  check_contiguous(*reduced, {at.B, at.H * at.d}, accumulate_type(logits), logits, "reduced");
  check_apart(written, {{*reduced, "reduced"}});
}

}  // namespace aia
