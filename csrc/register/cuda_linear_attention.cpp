// The CUDA implementations of the operators of attention by a memory per sample that aia_kernels/schemas.py defines:
// checks, allocation, device and stream. The work itself is in cuda/memory_*.cu.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../cuda/memory.h"
#include "checks_linear_attention.h"
#include "cuda.h"

namespace {

using aia::Memory;
using aia::new_numbers;
using aia::new_tensor;
using aia::cuda::kLimit;
using aia::cuda::Launch;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Memory memory_of(const Tensor& logits, int64_t feature, int64_t heads, const std::optional<Tensor>& padding) {
  const Memory at = aia::memory_of(logits, feature, heads, padding);
  AIA_CHECK(at.N < kLimit && at.H * at.d < kLimit,
            "logits must have fewer than 2^30 tokens, and features of all heads");
  return at;
}

// The type of phi: the products that follow take bfloat16 as it is, and all else in the wider type.
ScalarType type_of_rows(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : aia::accumulate_type(logits);
}

const void* data_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor> keys(const Tensor& logits, int64_t feature, int64_t heads, std::optional<Tensor> padding,
                                std::optional<Tensor> statistics, bool gradients) {
  const Memory at = memory_of(logits, feature, heads, padding);
  aia::check_statistics(statistics, logits, at);
  const Launch launch(logits);
  const int64_t pitch = at.H * (at.R() + (gradients ? 2 * at.d : 0));
  Tensor rows = new_tensor(logits, {at.B, pitch, at.N}, type_of_rows(logits));
  Tensor sums = new_numbers(logits, {at.B, at.H * at.R()});
  Tensor partial = new_numbers(logits, {aia::cuda::memory_keys_partials(at, statistics.has_value())});
  launch.check(aia::cuda::memory_keys(at, logits.const_data_ptr(), data_of(statistics), rows.mutable_data_ptr(), pitch,
                                      partial.mutable_data_ptr(), sums.mutable_data_ptr(), launch.stream()));
  return {rows, sums};
}

Tensor queries(const Tensor& logits, int64_t feature, int64_t heads, std::optional<Tensor> padding, const Tensor& sums,
               std::optional<Tensor> gamma, double eps) {
  const Memory at = memory_of(logits, feature, heads, padding);
  aia::check_divisor(sums, gamma, eps, logits, at);
  const Launch launch(logits);
  Tensor query = new_tensor(logits, {at.B, at.H * at.R(), at.N}, type_of_rows(logits));
  launch.check(aia::cuda::memory_queries(at, logits.const_data_ptr(), sums.const_data_ptr(), data_of(gamma), eps,
                                         query.mutable_data_ptr(), launch.stream()));
  return query;
}

std::tuple<Tensor, Tensor, Tensor> queries_backward_(const Tensor& rows, const Tensor& logits, int64_t feature,
                                                     int64_t heads, std::optional<Tensor> padding, const Tensor& sums,
                                                     std::optional<Tensor> gamma, double eps, const Tensor& reached) {
  const Memory at = memory_of(logits, feature, heads, padding);
  aia::check_queries_backward(rows, type_of_rows(logits), logits, padding, sums, gamma, eps, reached, at);
  const Launch launch(logits);
  Tensor query = new_tensor(logits, {at.B, at.H * at.R(), at.N}, type_of_rows(logits));
  Tensor grad_sums = new_numbers(logits, {at.B, at.H * at.R()}), grad_gamma = new_numbers(logits, {1});
  Tensor partial = new_numbers(logits, {aia::cuda::memory_queries_backward_partials(at)});
  launch.check(aia::cuda::memory_queries_backward(
      at, logits.const_data_ptr(), sums.const_data_ptr(), data_of(gamma), eps, reached.const_data_ptr(),
      {rows.mutable_data_ptr(), query.mutable_data_ptr(), grad_sums.mutable_data_ptr(), grad_gamma.mutable_data_ptr()},
      partial.mutable_data_ptr(), launch.stream()));
  return {query, grad_sums, grad_gamma};
}

void keys_backward_(const Tensor& rows, const Tensor& logits, int64_t feature, int64_t heads,
                    std::optional<Tensor> padding, const Tensor& reached, const Tensor& grad_sums,
                    std::optional<Tensor> reduced) {
  const Memory at = memory_of(logits, feature, heads, padding);
  aia::check_keys_backward(rows, type_of_rows(logits), logits, padding, reached, grad_sums, reduced, at);
  const Launch launch(logits);
  Tensor partial = new_numbers(logits, {aia::cuda::memory_keys_backward_partials(at, reduced.has_value())});
  launch.check(aia::cuda::memory_keys_backward(at, logits.const_data_ptr(), reached.const_data_ptr(),
                                               grad_sums.const_data_ptr(), data_of(reduced), rows.mutable_data_ptr(),
                                               partial.mutable_data_ptr(), launch.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CUDA, m) {
  m.impl("memory_keys", TORCH_BOX(&keys));
  m.impl("memory_queries", TORCH_BOX(&queries));
  m.impl("memory_queries_backward_", TORCH_BOX(&queries_backward_));
  m.impl("memory_keys_backward_", TORCH_BOX(&keys_backward_));
}
