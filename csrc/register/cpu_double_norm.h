// The operators of the double normalization on the CPU: checks, allocation and the split over threads. The work itself
// is in cpu/double_norm.cpp.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/double_norm.h"
#include "checks_external_attention.h"
#include "cpu.h"

namespace aia::cpu {

inline Tokens tokens_of(const aia::Logits& at) { return {at.B, at.N, at.M, at.group, at.scalar, at.padding}; }
inline int64_t elements_of(const Tokens& at) { return at.B * at.N * at.M; }

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
  aia::cpu::split(split.units(at), elements_of(at), [&](int64_t begin, int64_t end) { reduce(parts, begin, end); });
  if (split.chunks > 1) parallel(at.B, [&](int64_t begin, int64_t end) { join(parts, out, begin, end); });
  return result;
}

inline std::tuple<Tensor, Tensor> statistics_of(const Tokens& at, const Tensor& logits) {
  const void* data = logits.const_data_ptr();
  Tensor statistics = reduce_tokens(
      logits, at, statistics_split(at), {2, at.M},
      [&](void* parts, int64_t begin, int64_t end) {
        passes<DoubleNormPasses>(at.scalar).column_statistics(at, data, parts, begin, end);
      },
      [&](void* parts, void* out, int64_t begin, int64_t end) {
        passes<DoubleNormPasses>(at.scalar).join_statistics(at, parts, out, begin, end);
      });
  Tensor lse = new_numbers(logits, {at.B, at.M});
  const void* found = statistics.const_data_ptr();
  void* out = lse.mutable_data_ptr();
  split(at.B, elements_of(at), [&](int64_t begin, int64_t end) {
    passes<DoubleNormPasses>(at.scalar).log_sum_exp(at, found, out, begin, end);
  });
  return {statistics, lse};
}

inline std::tuple<Tensor, Tensor> column_statistics(const Tensor& logits, std::optional<Tensor> padding) {
  return statistics_of(tokens_of(aia::logits_of(logits, 1, "logits", padding)), logits);
}

// Into attention, which may be the logits, and mass [B, N, groups].
inline void normalize(const Tokens& at, const Tensor& logits, const Tensor& lse, double eps, const Tensor& attention,
                      const Tensor& mass) {
  void *made = attention.mutable_data_ptr(), *sums = mass.mutable_data_ptr();
  const void *data = logits.const_data_ptr(), *origin = lse.const_data_ptr();
  split(token_units(at), elements_of(at), [&](int64_t begin, int64_t end) {
    passes<DoubleNormPasses>(at.scalar).double_norm(at, data, origin, eps, made, sums, begin, end);
  });
}

// Both, without padding.
inline void normalize(const Tokens& at, const Tensor& logits, double eps, const Tensor& attention, const Tensor& mass) {
  if (at.N * at.M > kSampleElements) {
    normalize(at, logits, std::get<1>(statistics_of(at, logits)), eps, attention, mass);
    return;
  }
  void *made = attention.mutable_data_ptr(), *sums = mass.mutable_data_ptr();
  const void* data = logits.const_data_ptr();
  split(at.B, elements_of(at), [&](int64_t begin, int64_t end) {
    passes<DoubleNormPasses>(at.scalar).whole(at, data, eps, made, sums, begin, end);
  });
}

inline Tensor double_norm_(const Tensor& logits, const Tensor& lse, int64_t group, double eps,
                           std::optional<Tensor> padding) {
  const Tokens at = tokens_of(check_double_norm(logits, lse, group, eps, padding));
  Tensor mass = new_numbers(logits, {at.B, at.N, at.groups()});
  normalize(at, logits, lse, eps, logits, mass);
  return mass;
}

inline Tensor sums_of(const Tokens& at, const Tensor& grad, const Tensor& attention) {
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

inline Tensor double_norm_backward_reduce(const Tensor& grad, const Tensor& attention, int64_t group) {
  return sums_of(tokens_of(aia::check_double_norm_backward_reduce(grad, attention, group)), grad, attention);
}

// Into grad_logits, which may be grad.
inline void back_to_logits(const Tokens& at, const Tensor& grad, const Tensor& attention, const Tensor& mass,
                           const Tensor& reduced, const Tensor& grad_logits) {
  void* out = grad_logits.mutable_data_ptr();
  const void *g = grad.const_data_ptr(), *a = attention.const_data_ptr();
  const void *m = mass.const_data_ptr(), *d = reduced.const_data_ptr();
  split(token_units(at), elements_of(at), [&](int64_t begin, int64_t end) {
    passes<DoubleNormPasses>(at.scalar).backward(at, g, a, m, d, out, begin, end);
  });
}

inline void double_norm_backward_(const Tensor& grad, const Tensor& attention, const Tensor& mass,
                                  const Tensor& reduced, int64_t group) {
  const Tokens at = tokens_of(aia::check_double_norm_backward(grad, attention, mass, reduced, group));
  back_to_logits(at, grad, attention, mass, reduced, grad);
}

}  // namespace aia::cpu
