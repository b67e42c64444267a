// The CPU implementations of the operators of external attention that aia_kernels/ops.py defines: checks, allocation,
// choice of the instruction level, and the split over threads. The work itself is in cpu/.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/double_norm.h"
#include "cpu/residual.h"
#include "register_cpu.h"

namespace {

using aia::accumulate_type;
using aia::check_same;
using aia::scalar_of;
using aia::cpu::output_like;
using aia::cpu::parallel;
using aia::cpu::pick_level;
using aia::cpu::Rows;
using aia::cpu::Split;
using aia::cpu::token_units;
using aia::cpu::Tokens;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The passes of the best instruction level that this processor has.
struct Level {
  decltype(&aia::cpu::base::column_statistics) column_statistics;
  decltype(&aia::cpu::base::join_statistics) join_statistics;
  decltype(&aia::cpu::base::double_norm) double_norm;
  decltype(&aia::cpu::base::double_norm_backward_reduce) double_norm_backward_reduce;
  decltype(&aia::cpu::base::join_sums) join_sums;
  decltype(&aia::cpu::base::double_norm_backward) double_norm_backward;
  decltype(&aia::cpu::base::residual_relu) residual_relu;
  decltype(&aia::cpu::base::residual_relu_backward) residual_relu_backward;
  decltype(&aia::cpu::base::join_residual_sums) join_residual_sums;
};

#define AIA_LEVEL(level)                                                                                      \
  Level {                                                                                                     \
    level::column_statistics, level::join_statistics, level::double_norm, level::double_norm_backward_reduce, \
        level::join_sums, level::double_norm_backward, level::residual_relu, level::residual_relu_backward,   \
        level::join_residual_sums                                                                             \
  }

const Level& passes() {
  static const Level level = pick_level([](int best) {
#ifdef AIA_CPU_X86
    if (best == 2) return AIA_LEVEL(aia::cpu::v4);
    if (best == 1) return AIA_LEVEL(aia::cpu::v3);
#endif
    (void)best;
    return AIA_LEVEL(aia::cpu::base);
  });
  return level;
}

Tokens tokens_of(const Tensor& logits, int64_t group, const char* name) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.is_contiguous() && logits.size(2) > 0, name,
                  " must be contiguous [B, N, M] with M > 0");
  const int64_t M = logits.size(2);
  STD_TORCH_CHECK(group > 0 && M % group == 0, "group must divide the ", M, " columns of ", name, ", got ", group);
  return Tokens{logits.size(0), logits.size(1), M, group, scalar_of(logits, name), nullptr};
}

const uint8_t* padding_of(const std::optional<Tensor>& padding, const Tokens& at) {
  if (!padding) return nullptr;
  STD_TORCH_CHECK(padding->dim() == 2 && padding->is_contiguous() && padding->size(0) == at.B &&
                      padding->size(1) == at.N && padding->scalar_type() == ScalarType::Bool,
                  "padding must be a contiguous boolean [B, N] for the logits' ", at.B, " samples of ", at.N,
                  " tokens");
  return static_cast<const uint8_t*>(padding->const_data_ptr());
}

void check_numbers(const Tensor& t, const std::vector<int64_t>& sizes, const Tensor& of, const char* name) {
  bool fits = t.dim() == static_cast<int64_t>(sizes.size()) && t.is_contiguous();
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = t.size(static_cast<int64_t>(i)) == sizes[i];
  STD_TORCH_CHECK(fits, name, " must be contiguous, of the shape that its operator's schema says");
  STD_TORCH_CHECK(t.scalar_type() == accumulate_type(of), name, " must be in the accumulation type");
}

Tensor new_numbers(const Tensor& of, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(of, sizes, accumulate_type(of));
}

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
  parallel(split.units(at), [&](int64_t begin, int64_t end) { reduce(parts, begin, end); });
  if (split.chunks > 1) parallel(at.B, [&](int64_t begin, int64_t end) { join(parts, out, begin, end); });
  return result;
}

Tensor column_statistics(const Tensor& logits, std::optional<Tensor> padding) {
  Tokens at = tokens_of(logits, 1, "logits");
  at.padding = padding_of(padding, at);
  const void* data = logits.const_data_ptr();
  return reduce_tokens(
      logits, at, statistics_split(at), {2, at.M},
      [&](void* parts, int64_t begin, int64_t end) { passes().column_statistics(at, data, parts, begin, end); },
      [&](void* parts, void* out, int64_t begin, int64_t end) {
        passes().join_statistics(at, parts, out, begin, end);
      });
}

Tensor double_norm_(const Tensor& logits, const Tensor& lse, int64_t group, double eps, std::optional<Tensor> padding) {
  Tokens at = tokens_of(logits, group, "logits");
  at.padding = padding_of(padding, at);
  check_numbers(lse, {at.B, at.M}, logits, "lse");
  STD_TORCH_CHECK(eps >= 0, "eps must not be negative, got ", eps);
  Tensor mass = new_numbers(logits, {at.B, at.N, at.groups()});
  void *data = logits.mutable_data_ptr(), *out = mass.mutable_data_ptr();
  const void* origin = lse.const_data_ptr();
  parallel(token_units(at),
           [&](int64_t begin, int64_t end) { passes().double_norm(at, data, origin, eps, out, begin, end); });
  return mass;
}

Tensor double_norm_backward_reduce(const Tensor& grad, const Tensor& attention, int64_t group) {
  const Tokens at = tokens_of(grad, group, "grad");
  check_same(grad, attention, "grad and attention");
  const void *g = grad.const_data_ptr(), *a = attention.const_data_ptr();
  return reduce_tokens(
      grad, at, sums_split(at), {at.M},
      [&](void* parts, int64_t begin, int64_t end) {
        passes().double_norm_backward_reduce(at, g, a, parts, begin, end);
      },
      [&](void* parts, void* out, int64_t begin, int64_t end) { passes().join_sums(at, parts, out, begin, end); });
}

void double_norm_backward_(const Tensor& grad, const Tensor& attention, const Tensor& mass, const Tensor& reduced,
                           int64_t group) {
  const Tokens at = tokens_of(grad, group, "grad");
  check_same(grad, attention, "grad and attention");
  check_numbers(mass, {at.B, at.N, at.groups()}, grad, "mass");
  check_numbers(reduced, {at.B, at.M}, grad, "reduced");
  void* g = grad.mutable_data_ptr();
  const void *a = attention.const_data_ptr(), *m = mass.const_data_ptr(), *d = reduced.const_data_ptr();
  parallel(token_units(at),
           [&](int64_t begin, int64_t end) { passes().double_norm_backward(at, g, a, m, d, begin, end); });
}

Rows rows_of(const Tensor& z, const char* name) {
  STD_TORCH_CHECK(z.dim() == 3, name, " must be [B, N, C], got ", z.dim(), " axes");
  const int64_t B = z.size(0), N = z.size(1), C = z.size(2);
  // Strides of axes of length one are arbitrary.
  const bool samples = B == 1 || z.stride(0) == N * C;
  const bool maps = (N == 1 || z.stride(1) == 1) && (C == 1 || z.stride(2) == N) && samples;
  STD_TORCH_CHECK(z.is_contiguous() || maps, name, " must be stored densely, its features or its tokens contiguous");
  return Rows{B, N, C, !z.is_contiguous(), scalar_of(z, name)};
}

Tensor residual_relu_(const Tensor& z, const Tensor& x, std::optional<Tensor> shift) {
  const Rows rows = rows_of(z, "z");
  check_same(z, x, "z and x");
  if (shift) check_numbers(*shift, {rows.C}, z, "shift");
  Tensor signs = torch::stable::new_empty(z, {(rows.numel() + 7) / 8}, ScalarType::Byte);
  void* data = z.mutable_data_ptr();
  const void *residual = x.const_data_ptr(), *shifts = shift ? shift->const_data_ptr() : nullptr;
  auto* bits = static_cast<uint8_t*>(signs.mutable_data_ptr());
  parallel(element_units(rows),
           [&](int64_t begin, int64_t end) { passes().residual_relu(rows, data, residual, shifts, bits, begin, end); });
  return signs;
}

std::tuple<Tensor, Tensor> residual_relu_backward(const Tensor& grad_y, const Tensor& signs) {
  const Rows rows = rows_of(grad_y, "grad_y");
  STD_TORCH_CHECK(signs.dim() == 1 && signs.is_contiguous() && signs.size(0) == (rows.numel() + 7) / 8 &&
                      signs.scalar_type() == ScalarType::Byte,
                  "signs must be uint8, one bit for each element of grad_y");
  Tensor grad = output_like(grad_y), sums = new_numbers(grad_y, {rows.C});
  Tensor partial = torch::stable::new_zeros(grad_y, {partial_sums(rows)}, accumulate_type(grad_y));
  const void* data = grad_y.const_data_ptr();
  const auto* bits = static_cast<const uint8_t*>(signs.const_data_ptr());
  void *out = grad.mutable_data_ptr(), *parts = partial.mutable_data_ptr();
  parallel(element_units(rows), [&](int64_t begin, int64_t end) {
    passes().residual_relu_backward(rows, data, bits, out, parts, begin, end);
  });
  passes().join_residual_sums(rows, parts, sums.mutable_data_ptr());
  return {grad, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CPU, m) {
  m.impl("column_statistics", TORCH_BOX(&column_statistics));
  m.impl("double_norm_", TORCH_BOX(&double_norm_));
  m.impl("double_norm_backward_reduce", TORCH_BOX(&double_norm_backward_reduce));
  m.impl("double_norm_backward_", TORCH_BOX(&double_norm_backward_));
  m.impl("residual_relu_", TORCH_BOX(&residual_relu_));
  m.impl("residual_relu_backward", TORCH_BOX(&residual_relu_backward));
}
