// The CPU implementations of the operators of attention by a memory per sample that aia_kernels/schemas.py defines:
// checks, allocation, choice of the instruction level, and the split over threads. The work itself is in
// cpu/memory.cpp.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../cpu/memory.h"
#include "checks_linear_attention.h"
#include "cpu.h"

namespace {

using aia::memory_of;
using aia::MemoryLogits;
using aia::new_numbers;
using aia::Span;
using aia::cpu::Feature;
using aia::cpu::Memory;
using aia::cpu::MemoryPasses;
using aia::cpu::parallel;
using aia::cpu::passes;
using aia::cpu::with_large_pages;
using torch::stable::Tensor;

Memory memory(const MemoryLogits& at) {
  return {at.B, at.H, at.d, at.N, static_cast<Feature>(at.feature), at.scalar, at.padding};
}

const void* data_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor> keys(const Tensor& logits, int64_t feature, int64_t heads, std::optional<Tensor> padding,
                                std::optional<Tensor> statistics, bool gradients) {
  const Memory at = memory(memory_of(logits, feature, heads, padding));
  if (statistics) {
    AIA_CHECK(at.feature == Feature::kSoftmax, "statistics must be None but for a softmax");
    aia::check_contiguous(*statistics, {at.B, 2, at.H * at.d}, aia::accumulate_type(logits), logits, "statistics");
  }
  const int64_t pitch = at.H * (at.R() + (gradients ? 2 * at.d : 0)), parts = key_parts(at);
  Tensor rows = with_large_pages(new_numbers(logits, {at.B, pitch, at.N}));
  Tensor sums = new_numbers(logits, {at.B, at.H * at.R()});
  Tensor partial = parts == 1 ? sums : new_numbers(logits, {at.heads(), parts, at.R()});
  const void *data = logits.const_data_ptr(), *known = data_of(statistics);
  void *out = rows.mutable_data_ptr(), *part = partial.mutable_data_ptr();
  const MemoryPasses& pass = passes<MemoryPasses>(at.scalar);
  parallel(key_units(at),
           [&](int64_t begin, int64_t end) { pass.keys(at, data, known, out, pitch, part, begin, end); });
  if (parts > 1) pass.join(at, parts, at.R(), part, sums.mutable_data_ptr(), nullptr);
  return {rows, sums};
}

Tensor queries(const Tensor& logits, int64_t feature, int64_t heads, std::optional<Tensor> padding, const Tensor& sums,
               std::optional<Tensor> gamma, double eps) {
  const MemoryLogits given = memory_of(logits, feature, heads, padding);
  aia::check_divisor(sums, gamma, eps, logits, given);
  const Memory at = memory(given);
  Tensor query = with_large_pages(new_numbers(logits, {at.B, at.H * at.R(), at.N}));
  const void *data = logits.const_data_ptr(), *total = sums.const_data_ptr(), *factor = data_of(gamma);
  void* out = query.mutable_data_ptr();
  parallel(tile_units(at), [&](int64_t begin, int64_t end) {
    passes<MemoryPasses>(at.scalar).queries(at, data, total, factor, eps, out, begin, end);
  });
  return query;
}

std::tuple<Tensor, Tensor, Tensor> queries_backward_(const Tensor& rows, const Tensor& logits, int64_t feature,
                                                     int64_t heads, std::optional<Tensor> padding, const Tensor& sums,
                                                     std::optional<Tensor> gamma, double eps, const Tensor& reached) {
  const MemoryLogits given = memory_of(logits, feature, heads, padding);
  aia::check_divisor(sums, gamma, eps, logits, given);
  aia::check_rows(rows, logits, given);
  aia::check_reached(reached, logits, given);
  const Span written(rows, "rows", true);
  aia::check_apart(written, {{sums, "sums"}, {reached, "reached"}});
  if (padding) aia::check_apart(written, {{*padding, "padding"}});
  if (gamma) aia::check_apart(written, {{*gamma, "gamma"}});
  const Memory at = memory(given);
  Tensor query = with_large_pages(new_numbers(logits, {at.B, at.H * at.R(), at.N}));
  Tensor grad_sums = new_numbers(logits, {at.B, at.H * at.R()}), grad_gamma = new_numbers(logits, {1});
  Tensor partial = new_numbers(logits, {at.heads(), tiles(at), at.R() + 1});
  const void *data = logits.const_data_ptr(), *total = sums.const_data_ptr(), *factor = data_of(gamma);
  const void* of_memory = reached.const_data_ptr();
  void *grads = rows.mutable_data_ptr(), *out = query.mutable_data_ptr(), *part = partial.mutable_data_ptr();
  const MemoryPasses& pass = passes<MemoryPasses>(at.scalar);
  parallel(tile_units(at), [&](int64_t begin, int64_t end) {
    pass.queries_backward(at, data, total, factor, eps, of_memory, grads, out, part, begin, end);
  });
  pass.join(at, tiles(at), at.R(), part, grad_sums.mutable_data_ptr(), grad_gamma.mutable_data_ptr());
  return {query, grad_sums, grad_gamma};
}

void keys_backward_(const Tensor& rows, const Tensor& logits, int64_t feature, int64_t heads,
                    std::optional<Tensor> padding, const Tensor& reached, const Tensor& grad_sums,
                    std::optional<Tensor> reduced) {
  const MemoryLogits given = memory_of(logits, feature, heads, padding);
  const Memory at = memory(given);
  aia::check_rows(rows, logits, given);
  aia::check_reached(reached, logits, given);
  aia::check_contiguous(grad_sums, {at.B, at.H * at.R()}, aia::accumulate_type(logits), logits, "grad_sums");
  const Span written(rows, "rows", true);
  aia::check_apart(written, {{reached, "reached"}, {grad_sums, "grad_sums"}});
  if (padding) aia::check_apart(written, {{*padding, "padding"}});
  if (reduced) {
    AIA_CHECK(at.feature == Feature::kSoftmax, "reduced must be None but for a softmax");
    aia::check_contiguous(*reduced, {at.B, at.H * at.d}, aia::accumulate_type(logits), logits, "reduced");
    aia::check_apart(written, {{*reduced, "reduced"}});
  }
  const void *data = logits.const_data_ptr(), *of_memory = reached.const_data_ptr();
  const void *of_sums = grad_sums.const_data_ptr(), *known = data_of(reduced);
  void* grads = rows.mutable_data_ptr();
  parallel(key_units(at), [&](int64_t begin, int64_t end) {
    passes<MemoryPasses>(at.scalar).keys_backward(at, data, of_memory, of_sums, known, grads, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CPU, m) {
  m.impl("memory_keys", TORCH_BOX(&keys));
  m.impl("memory_queries", TORCH_BOX(&queries));
  m.impl("memory_queries_backward_", TORCH_BOX(&queries_backward_));
  m.impl("memory_keys_backward_", TORCH_BOX(&keys_backward_));
}
