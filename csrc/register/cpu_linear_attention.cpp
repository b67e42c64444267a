// The CPU implementations of the operators of attention by a memory per sample that aia_kernels/schemas.py defines:
// checks, allocation, choice of the instruction level, and the split over threads. The work itself is in
// cpu/memory.cpp. Behind the passes stands the algorithm as one operator for each direction: what
// aia_kernels/algorithms/linear_attention.py calls one by one, with the products of PyTorch, in the same order.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/memory.h"
#include "checks_external_attention.h"
#include "checks_linear_attention.h"
#include "cpu.h"
#include "cpu_products.h"

namespace {

using aia::Feature;
using aia::Memory;
using aia::memory_of;
using aia::new_numbers;
using aia::Span;
using aia::cpu::for_numbers;
using aia::cpu::key_parts;
using aia::cpu::key_units;
using aia::cpu::MemoryPasses;
using aia::cpu::multiply;
using aia::cpu::multiply_added;
using aia::cpu::numbers;
using aia::cpu::parallel;
using aia::cpu::passes;
using aia::cpu::tile_units;
using aia::cpu::tiles;
using aia::cpu::view_of;
using aia::cpu::with_large_pages;
using aia::cpu::with_type;
using torch::stable::Tensor;

const void* data_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor> keys(const Tensor& logits, int64_t feature, int64_t heads, std::optional<Tensor> padding,
                                std::optional<Tensor> statistics, bool gradients) {
  const Memory at = memory_of(logits, feature, heads, padding);
  aia::check_statistics(statistics, logits, at);
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
  const Memory at = memory_of(logits, feature, heads, padding);
  aia::check_divisor(sums, gamma, eps, logits, at);
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
  const Memory at = memory_of(logits, feature, heads, padding);
  aia::check_queries_backward(rows, aia::accumulate_type(logits), logits, padding, sums, gamma, eps, reached, at);
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
  const Memory at = memory_of(logits, feature, heads, padding);
  aia::check_keys_backward(rows, aia::accumulate_type(logits), logits, padding, reached, grad_sums, reduced, at);
  const void *data = logits.const_data_ptr(), *of_memory = reached.const_data_ptr();
  const void *of_sums = grad_sums.const_data_ptr(), *known = data_of(reduced);
  void* grads = rows.mutable_data_ptr();
  parallel(key_units(at), [&](int64_t begin, int64_t end) {
    passes<MemoryPasses>(at.scalar).keys_backward(at, data, of_memory, of_sums, known, grads, begin, end);
  });
}

// [B, q, p] of [B, p, q].
Tensor turned(const Tensor& t) {
  const aia::Layout at(t);
  return view_of(t, {at.sizes[0], at.sizes[2], at.sizes[1]}, {at.strides[0], at.strides[2], at.strides[1]});
}

// Contiguous [n, m, size] as [m, n, size]: itself where one of both is one.
Tensor exchanged(const Tensor& t, int64_t n, int64_t m, int64_t size) {
  if (n == 1 || m == 1) return t;
  Tensor out = new_numbers(t, {n * m * size});
  const size_t bytes = size * t.element_size();
  const auto* from = static_cast<const char*>(t.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t k = 0; k < n * m; ++k) std::memcpy(to + (k % m * n + k / m) * bytes, from + k * bytes, bytes);
  return out;
}
// Contiguous [B, H p, q] as [H, B p, q]: what one matrix of a head does to all samples is one product.
Tensor of_heads(const Tensor& t, int64_t H) {
  const aia::Layout at(t);
  const int64_t B = at.sizes[0], p = at.sizes[1] / H, q = at.sizes[2];
  return view_of(exchanged(t, B, H, p * q), {H, B * p, q}, {B * p * q, q, 1});
}
// The inverse.
Tensor of_samples(const Tensor& t, int64_t B) {
  const aia::Layout at(t);
  const int64_t H = at.sizes[0], p = at.sizes[1] / B, q = at.sizes[2];
  return view_of(exchanged(t, H, B, p * q), {B, H * p, q}, {H * p * q, q, 1});
}

// Multiplied as PyTorch does it: the factor is rounded first.
void scale(const Tensor& t, double factor) {
  if (factor != 1)
    for_numbers(t, [factor](auto& number, int64_t) { number *= static_cast<std::decay_t<decltype(number)>>(factor); });
}

// x [B, N, C] and the parameters (reference.Weights) of H heads, in one type that accumulates. The R rows and d
// features are those of all heads, the v values those of one.
struct Heads {
  int64_t B, N, C, H, d, R, v, feature;
  bool maps;
  Tensor projection, value;
  std::optional<Tensor> bias, value_bias, output, output_bias, gamma;

  Heads(const Tensor& x, const std::vector<std::optional<Tensor>>& weights, int64_t feature) : feature(feature) {
    const aia::Residual at = aia::residual_of(x, "x");
    const auto type = x.scalar_type();
    AIA_CHECK(type == aia::accumulate_type(x), "x must be float32 or float64, got ", aia::name_of(type));
    AIA_CHECK(weights.size() == 7, "weights must hold the 7 tensors of Weights, got ", weights.size());
    AIA_CHECK(weights[0] && weights[2], "projection and value must be tensors, got None");
    AIA_CHECK(feature >= 0 && feature <= 2, "feature must be 0 (l2), 1 (softplus) or 2 (softmax), got ", feature);
    B = at.B, N = at.N, C = at.C, maps = at.maps;
    projection = *weights[0], value = *weights[2];
    bias = weights[1], value_bias = weights[3], output = weights[4], output_bias = weights[5], gamma = weights[6];
    const aia::Layout of_projection = aia::check_operand(projection, x, "projection");
    const aia::Layout of_value = aia::check_operand(value, x, "value");
    AIA_CHECK(of_value.dim == 3 && of_value.sizes[0] > 0 && of_value.sizes[1] > 0,
              "value must be [heads, v, C] and not empty, got ", aia::described(value));
    H = of_value.sizes[0], v = of_value.sizes[1];
    AIA_CHECK(output || v == C, "value must be [heads, C, C] without an output, got ", aia::described(value));
    AIA_CHECK(of_projection.dim == 2 && of_projection.sizes[0] > 0 && of_projection.sizes[0] % (2 * H) == 0,
              "projection must be [2 heads d, C] of the ", H, " heads of value, got ", aia::described(projection));
    d = of_projection.sizes[0] / 2, R = d + (feature == 0 ? H : 0);
    const auto check = [&](const std::optional<Tensor>& t, std::initializer_list<int64_t> sizes, const char* name) {
      if (t) aia::check_contiguous(*t, sizes, type, x, name);
    };
    check(projection, {2 * d, C}, "projection");
    check(value, {H, v, C}, "value");
    check(bias, {2 * d}, "bias");
    check(value_bias, {H, v}, "value_bias");
    check(output, {H, C, v}, "output");
    check(output_bias, {C}, "output_bias");
    check(gamma, {1}, "gamma");
    AIA_CHECK(output || !output_bias, "output_bias must be None without an output");
  }
  // X [B, C, N].
  Tensor columns(const Tensor& x) const {
    return maps ? view_of(x, {B, C, N}, {C * N, N, 1}) : view_of(x, {B, C, N}, {C * N, 1, C});
  }
  bool divides() const { return feature != 2; }
  double share() const { return divides() ? 1.0 / static_cast<double>(N) : 1.0; }
};

// Z [B, 2 d, N] of X.
Tensor logits_of(const Heads& at, const Tensor& x) {
  Tensor z = new_numbers(x, {at.B, 2 * at.d, at.N});
  const Tensor projection = view_of(at.projection, {at.B, 2 * at.d, at.C}, {0, at.C, 1});
  if (at.bias)
    multiply_added(z, view_of(*at.bias, {2 * at.d, 1}, {1, 1}), projection, x);
  else
    multiply(z, projection, x);
  return z;
}

// T [B, R, C] of phi(k) and X.
Tensor over_tokens(const Heads& at, const Tensor& phi, const Tensor& x) {
  Tensor t = new_numbers(x, {at.B, at.R, at.C});
  multiply(t, phi, turned(x));
  return t;
}

// U [H, B R, v] of the R rows of a head, undefined without an output projection, and M [B, H R, C].
std::pair<Tensor, Tensor> memory_matrix(const Heads& at, const Tensor& t, const Tensor& s) {
  const int64_t rows = at.B * at.R / at.H;
  const double share = at.share(), first = at.output ? 1 : share, last = at.output ? share : 1;
  const Tensor of_t = of_heads(t, at.H);
  Tensor u = new_numbers(t, {at.H, rows, at.v});
  if (at.value_bias) {
    Tensor added = new_numbers(t, {at.H, rows, at.v});
    const Tensor of_s = exchanged(s, at.B, at.H, at.R / at.H);
    with_type(t, [&](auto zero) {
      using A = decltype(zero);
      const A *total = numbers<A>(of_s), *of_value = numbers<A>(*at.value_bias);
      A* to = static_cast<A*>(added.mutable_data_ptr());
      for (int64_t r = 0; r < at.H * rows; ++r)
        for (int64_t c = 0; c < at.v; ++c) *to++ = total[r] * of_value[r / rows * at.v + c];
    });
    multiply_added(u, added, of_t, turned(at.value), first, first);
  } else {
    multiply(u, of_t, turned(at.value));
    scale(u, first);
  }
  if (!at.output) return {Tensor(), of_samples(u, at.B)};
  Tensor m = new_numbers(t, {at.H, rows, at.C});
  multiply(m, u, turned(*at.output));
  if (at.output_bias)
    with_type(t, [&](auto zero) {
      using A = decltype(zero);
      const A *added = numbers<A>(*at.output_bias), share_of_head = static_cast<A>(1.0 / static_cast<double>(at.H));
      for_numbers(m, [&](auto& number, int64_t i) { number += share_of_head * added[i % at.C]; });
    });
  scale(m, last);
  return {u, of_samples(m, at.B)};
}

// The transpose of factors [B, p, C] times rows [B, p, N], stored as x, which is added or not.
Tensor product_like(const Heads& at, const Tensor& x, const Tensor& factors, const Tensor& rows, bool residual) {
  const auto make = [&](std::initializer_list<int64_t> sizes, const Tensor& added, const Tensor& a, const Tensor& b) {
    Tensor out = with_large_pages(new_numbers(x, sizes));
    if (residual)
      multiply_added(out, added, a, b);
    else
      multiply(out, a, b);
    return out;
  };
  if (!at.maps) return make({at.B, at.N, at.C}, x, turned(rows), factors);
  return turned(make({at.B, at.C, at.N}, at.columns(x), turned(factors), rows));
}

std::vector<Tensor> propagate(const Tensor& x, std::vector<std::optional<Tensor>> weights, int64_t feature, double eps,
                              bool residual) {
  const Heads at(x, weights, feature);
  const Tensor columns = at.columns(x), z = logits_of(at, columns);
  const auto [phi, s] = keys(z, feature, at.H, std::nullopt, std::nullopt, false);
  const Tensor t = over_tokens(at, phi, columns), m = memory_matrix(at, t, s).second;
  const Tensor query = queries(z, feature, at.H, std::nullopt, s, at.gamma, eps);
  return {product_like(at, x, m, query, residual), z, t, s};
}

// dX of dT [B, H R, C] and of rows, phi(k) and dZ.
Tensor grad_of_x(const Heads& at, const Tensor& grad, const Tensor& grad_t, const Tensor& rows, bool residual) {
  Tensor factors = new_numbers(grad, {at.B, at.R + 2 * at.d, at.C});
  const size_t size = grad.element_size() * at.C, of_t = at.R * size, of_z = 2 * at.d * size;
  auto* to = static_cast<char*>(factors.mutable_data_ptr());
  const auto* from = static_cast<const char*>(grad_t.const_data_ptr());
  for (int64_t b = 0; b < at.B; ++b, from += of_t, to += of_t + of_z) {
    std::memcpy(to, from, of_t);
    std::memcpy(to + of_t, at.projection.const_data_ptr(), of_z);
  }
  return product_like(at, grad, factors, rows, residual);
}

// The gradients of (T, s), [B, H R, C] and [B, H R, 1], for that of M, and into results those of the parameters that
// made M of them.
std::pair<Tensor, Tensor> through_memory(const Heads& at, const Tensor& grad_m, const Tensor& t, const Tensor& s,
                                         const Tensor& u, std::vector<std::optional<Tensor>>& results) {
  const int64_t rows = at.B * at.R / at.H;
  const Tensor grad = of_heads(grad_m, at.H);
  Tensor grad_u = grad;
  if (at.output) {
    results[5] = new_numbers(t, {at.H, at.C, at.v});
    multiply(*results[5], turned(grad), u);
    grad_u = new_numbers(t, {at.H, rows, at.v});
    multiply(grad_u, grad, *at.output);
  }
  Tensor grad_t = new_numbers(t, {at.H, rows, at.C}), grad_s = new_numbers(t, {at.H, rows, 1});
  multiply(grad_t, grad_u, at.value);
  if (at.value_bias) {
    multiply(grad_s, grad_u, view_of(*at.value_bias, {at.H, at.v, 1}, {at.v, 1, 1}));
    Tensor grad_bias = new_numbers(t, {at.H, at.v, 1});
    const Tensor of_s = exchanged(s, at.B, at.H, at.R / at.H);
    multiply(grad_bias, turned(grad_u), view_of(of_s, {at.H, rows, 1}, {rows, 1, 1}));
    results[4] = view_of(grad_bias, {at.H, at.v}, {at.v, 1});
  } else {
    for_numbers(grad_s, [](auto& number, int64_t) { number = 0; });
  }
  results[3] = new_numbers(t, {at.H, at.v, at.C});
  multiply(*results[3], turned(grad_u), of_heads(t, at.H));
  if (at.output_bias) {
    results[6] = torch::stable::sum(grad, std::vector<int64_t>{0, 1});
    for_numbers(*results[6],
                [&](auto& number, int64_t) { number /= static_cast<std::decay_t<decltype(number)>>(at.H); });
  }
  return {of_samples(grad_t, at.B), of_samples(grad_s, at.B)};
}

std::vector<Tensor> propagate_back(const Tensor& grad, const Tensor& x, std::vector<std::optional<Tensor>> weights,
                                   std::vector<std::optional<Tensor>> kept, int64_t feature, double eps, bool residual,
                                   bool needs_x) {
  const Heads at(x, weights, feature);
  aia::check_same(grad, x, "grad", "x");
  AIA_CHECK(kept.size() == 3 && kept[1].has_value() == kept[2].has_value(),
            "kept must hold Z and, together, T and s, or None for them, got ", kept.size(), " entries");
  const Tensor columns = at.columns(x), of_y = at.columns(grad), z = kept[0] ? *kept[0] : logits_of(at, columns);
  aia::check_contiguous(z, {at.B, 2 * at.d, at.N}, x.scalar_type(), x, "logits");
  const auto [rows, here] = keys(z, feature, at.H, std::nullopt, std::nullopt, true);
  const int64_t sample = (at.R + 2 * at.d) * at.N;
  const Tensor t = kept[1] ? *kept[1] : over_tokens(at, view_of(rows, {at.B, at.R, at.N}, {sample, at.N, 1}), columns);
  const Tensor s = kept[2] ? *kept[2] : here;
  aia::check_contiguous(t, {at.B, at.R, at.C}, x.scalar_type(), x, "t");
  aia::check_contiguous(s, {at.B, at.R}, x.scalar_type(), x, "s");
  const auto [u, m] = memory_matrix(at, t, s);
  Tensor reached = new_numbers(x, {at.B, at.R, at.N}), grad_m = new_numbers(x, {at.B, at.R, at.C});
  multiply(reached, m, of_y);
  std::vector<std::optional<Tensor>> found(8);
  const auto [query, grad_total, grad_gamma] =
      queries_backward_(rows, z, feature, at.H, std::nullopt, s, at.gamma, eps, reached);
  multiply(grad_m, query, turned(of_y));
  scale(grad_m, at.share());
  const auto [grad_t, grad_s] = through_memory(at, grad_m, t, s, u, found);
  if (at.divides())
    with_type(x, [&](auto zero) {
      const auto* added = numbers<decltype(zero)>(grad_total);
      for_numbers(grad_s, [&](auto& number, int64_t i) { number += added[i]; });
    });
  multiply(reached, grad_t, columns);
  keys_backward_(rows, z, feature, at.H, std::nullopt, reached, view_of(grad_s, {at.B, at.R}, {at.R, 1}), std::nullopt);
  if (needs_x) found[0] = grad_of_x(at, grad, grad_t, rows, residual);
  const Tensor grad_z = view_of(rows, {at.B, 2 * at.d, at.N}, {sample, at.N, 1}, at.R * at.N);
  Tensor of_projection = new_numbers(x, {at.B, 2 * at.d, at.C});
  multiply(of_projection, grad_z, turned(columns));
  found[1] = at.B == 1 ? view_of(of_projection, {2 * at.d, at.C}, {at.C, 1})
                       : torch::stable::sum(of_projection, std::vector<int64_t>{0});
  if (at.bias) found[2] = torch::stable::sum(grad_z, std::vector<int64_t>{0, 2});
  found[7] = grad_gamma;
  std::vector<Tensor> results;
  for (const std::optional<Tensor>& of : found) results.push_back(of ? *of : new_numbers(x, {0}));
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CPU, m) {
  m.impl("memory_keys", TORCH_BOX(&keys));
  m.impl("memory_queries", TORCH_BOX(&queries));
  m.impl("memory_queries_backward_", TORCH_BOX(&queries_backward_));
  m.impl("memory_keys_backward_", TORCH_BOX(&keys_backward_));
  m.impl("memory_propagate", TORCH_BOX(&propagate));
  m.impl("memory_propagate_back", TORCH_BOX(&propagate_back));
}
