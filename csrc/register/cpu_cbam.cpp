// The CPU implementations of the operators of CBAM that aia_kernels/schemas.py defines: checks, allocation, choice of
// the instruction level, and the split over threads. The work itself is in cpu/cbam.cpp.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/cbam.h"
#include "../cpu/convolve.h"
#include "checks_cbam.h"
#include "cpu.h"

namespace {

using aia::FeatureMaps;
using aia::maps_of;
using aia::Matrix;
using aia::matrix_of;
using aia::new_numbers;
using aia::Side;
using aia::cpu::CbamPasses;
using aia::cpu::Convolution;
using aia::cpu::ConvolvePasses;
using aia::cpu::output_like;
using aia::cpu::parallel;
using aia::cpu::Parts;
using aia::cpu::passes;
using aia::cpu::row_units;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Over the columns or over the rows of x, times a gate of these or null, into pooled [B, 2, ...] and argmax [B, ...].
void pool(const Matrix& m, const Tensor& x, bool over_columns, const void* gate, Tensor& pooled, Tensor& argmax) {
  const CbamPasses& pass = passes<CbamPasses>(m.scalar);
  const void* data = x.const_data_ptr();
  void *out = pooled.mutable_data_ptr(), *index = argmax.mutable_data_ptr();
  if (over_columns) {
    parallel(row_units(m),
             [&](int64_t begin, int64_t end) { pass.pool_columns(m, data, gate, out, index, begin, end); });
    return;
  }
  const Parts parts(m);
  const bool whole = parts.of_rows == 1;
  const double share = whole ? 1.0 / static_cast<double>(m.rows) : 1.0;
  Tensor partial = whole ? pooled : new_numbers(x, {m.B * parts.of_rows, 2, m.columns});
  Tensor indices = whole ? argmax : torch::stable::new_empty(x, {m.B * parts.of_rows, m.columns}, ScalarType::Int);
  void *values = partial.mutable_data_ptr(), *where = indices.mutable_data_ptr();
  parallel(parts.units(m),
           [&](int64_t begin, int64_t end) { pass.pool_rows(m, parts, data, gate, share, values, where, begin, end); });
  if (whole) return;
  parallel(m.B, [&](int64_t begin, int64_t end) { pass.join_pooled(m, parts, values, where, out, index, begin, end); });
}

std::tuple<Tensor, Tensor> pool_positions(const Tensor& x) { return aia::pooled_positions(x, pool); }

std::tuple<Tensor, Tensor> pool_channels(const Tensor& x, std::optional<Tensor> channel) {
  return aia::pooled_channels(x, channel, pool);
}

std::vector<Tensor> recalibrate(const Tensor& x, std::optional<Tensor> channel, std::optional<Tensor> spatial,
                                bool with_confounder) {
  const FeatureMaps at = maps_of(x, "x");
  const Matrix m = matrix_of(at);
  const aia::MapGates gates(channel, spatial, at, x);
  std::vector<Tensor> results{output_like(x)};
  if (with_confounder) results.push_back(output_like(x));
  const void* data = x.const_data_ptr();
  void *y = results[0].mutable_data_ptr(), *rest = with_confounder ? results[1].mutable_data_ptr() : nullptr;
  const void *of_rows = gates.of_rows(m), *of_columns = gates.of_columns(m);
  parallel(row_units(m), [&](int64_t begin, int64_t end) {
    passes<CbamPasses>(m.scalar).recalibrate(m, data, of_rows, of_columns, y, rest, begin, end);
  });
  return results;
}

// Sums [B, n] of `parts` for each sample, which are there if it is one; fill(data) makes them.
template <class Fill>
void join(const Matrix& m, const Tensor& of, int64_t parts, int64_t n, Tensor& result, Fill&& fill) {
  Tensor partial = parts == 1 ? result : new_numbers(of, {m.B, parts, n});
  void *from = partial.mutable_data_ptr(), *to = result.mutable_data_ptr();
  fill(from);
  if (parts == 1) return;
  parallel(m.B,
           [&](int64_t begin, int64_t end) { passes<CbamPasses>(m.scalar).join_sums(parts, n, from, to, begin, end); });
}

std::tuple<Tensor, Tensor> recalibrate_reduce(const Tensor& grad_y, std::optional<Tensor> grad_confounder,
                                              const Tensor& x, std::optional<Tensor> channel,
                                              std::optional<Tensor> spatial) {
  const FeatureMaps at = maps_of(x, "x");
  const Matrix m = matrix_of(at);
  aia::check_same(grad_y, x, "grad_y", "x");
  const void* confounder = aia::confounder_of(grad_confounder, grad_y);
  const aia::MapGates gates(channel, spatial, at, x);
  Tensor grad_channel = new_numbers(x, {at.B, at.C}), grad_spatial = new_numbers(x, {at.B, 1, at.H, at.W});
  const Parts parts(m);
  const void *grad = grad_y.const_data_ptr(), *data = x.const_data_ptr();
  const auto reduce = [&](const void* of_rows, const void* of_columns, Tensor& over_columns, Tensor& over_rows) {
    join(m, x, parts.of_columns, m.rows, over_columns, [&](void* row_sums) {
      join(m, x, parts.of_rows, m.columns, over_rows, [&](void* column_sums) {
        parallel(parts.units(m), [&](int64_t begin, int64_t end) {
          passes<CbamPasses>(m.scalar).recalibrate_reduce(m, parts, grad, confounder, data, of_rows, of_columns,
                                                          row_sums, column_sums, begin, end);
        });
      });
    });
  };
  if (m.rows_are_channels)
    reduce(gates.channel, gates.spatial, grad_channel, grad_spatial);
  else
    reduce(gates.spatial, gates.channel, grad_spatial, grad_channel);
  return {grad_channel, grad_spatial};
}

Tensor unpool_reduce(const Tensor& x, const Tensor& grad_spatial, const Tensor& spatial_argmax) {
  const FeatureMaps at = maps_of(x, "x");
  const Matrix m = matrix_of(at);
  const aia::MapFeatures from = aia::MapFeatures::of_positions(grad_spatial, spatial_argmax, at, x);
  Tensor grad_channel = new_numbers(x, {at.B, at.C});
  const Parts parts(m);
  const Side spatial{nullptr, from.grad, from.argmax};
  const void* data = x.const_data_ptr();
  const int64_t units = m.rows_are_channels ? row_units(m) : parts.units(m);
  join(m, x, m.rows_are_channels ? 1 : parts.of_rows, at.C, grad_channel, [&](void* sums) {
    parallel(units, [&](int64_t begin, int64_t end) {
      passes<CbamPasses>(m.scalar).unpool_reduce(m, parts, data, spatial, sums, begin, end);
    });
  });
  return grad_channel;
}

Tensor unpool(const Tensor& grad_y, std::optional<Tensor> grad_confounder, std::optional<Tensor> channel,
              std::optional<Tensor> grad_channel, std::optional<Tensor> channel_argmax, std::optional<Tensor> spatial,
              std::optional<Tensor> grad_spatial, std::optional<Tensor> spatial_argmax) {
  const aia::UnpoolMaps given(grad_y, grad_confounder, channel, grad_channel, channel_argmax, spatial, grad_spatial,
                              spatial_argmax);
  const Matrix m = matrix_of(given.at);
  const Side of_channels = given.of_channels(), of_positions = given.of_positions();
  Tensor grad_x = output_like(grad_y);
  const void* data = grad_y.const_data_ptr();
  void* out = grad_x.mutable_data_ptr();
  parallel(row_units(m), [&](int64_t begin, int64_t end) {
    passes<CbamPasses>(m.scalar).unpool(m, data, given.grad_confounder, of_channels, of_positions, out, begin, end);
  });
  return grad_x;
}

// Calls body with a value of the type of the maps.
template <class Body>
void with_map_type(ScalarType type, Body&& body) {
  return type == ScalarType::Double ? body(double{}) : body(float{});
}

Convolution convolution_of(const aia::MapConvolution& at) { return {at.B, at.H, at.W, at.k}; }

Tensor convolve(const Tensor& pooled, const Tensor& weight) {
  const aia::MapConvolution at(pooled, weight);
  const Convolution c = convolution_of(at);
  Tensor z = torch::stable::new_empty(pooled, {at.B, 1, at.H, at.W});
  with_map_type(at.type, [&](auto type) {
    using A = decltype(type);
    const auto *in = static_cast<const A*>(pooled.const_data_ptr()),
               *w = static_cast<const A*>(weight.const_data_ptr());
    auto* out = static_cast<A*>(z.mutable_data_ptr());
    parallel(units_of(c), [&](int64_t begin, int64_t end) {
      passes<ConvolvePasses<A>>().convolve(c, 2, 1, in, w, out, begin, end);
    });
  });
  return z;
}

std::tuple<Tensor, Tensor> convolve_backward(const Tensor& grad_z, const Tensor& pooled, const Tensor& weight) {
  const aia::MapConvolution at(pooled, weight);
  aia::check_contiguous(grad_z, {at.B, 1, at.H, at.W}, at.type, pooled, "grad_z");
  const Convolution c = convolution_of(at);
  Tensor grad_pooled = torch::stable::new_empty(pooled, {at.B, 2, at.H, at.W});
  Tensor grad_weight = torch::stable::new_empty(pooled, {1, 2, at.k, at.k});
  with_map_type(at.type, [&](auto type) {
    using A = decltype(type);
    const auto *grad = static_cast<const A*>(grad_z.const_data_ptr()),
               *in = static_cast<const A*>(pooled.const_data_ptr()),
               *w = static_cast<const A*>(weight.const_data_ptr());
    // The transpose of a convolution is one by the turned weight.
    std::vector<A> turned(2 * c.taps()), partial(units_of(c) * 2 * c.taps());
    for (int64_t q = 0; q < 2; ++q)
      std::reverse_copy(w + q * c.taps(), w + (q + 1) * c.taps(), turned.begin() + q * c.taps());
    auto* out = static_cast<A*>(grad_pooled.mutable_data_ptr());
    parallel(units_of(c), [&](int64_t begin, int64_t end) {
      passes<ConvolvePasses<A>>().convolve(c, 1, 2, grad, turned.data(), out, begin, end);
      passes<ConvolvePasses<A>>().weight_gradient(c, 2, in, grad, partial.data(), begin, end);
    });
    auto* sums = static_cast<A*>(grad_weight.mutable_data_ptr());
    for (int64_t t = 0; t < 2 * c.taps(); ++t) {
      double total = 0;
      for (int64_t unit = 0; unit < units_of(c); ++unit) total += partial[unit * 2 * c.taps() + t];
      sums[t] = static_cast<A>(total);
    }
  });
  return {grad_pooled, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CPU, m) {
  m.impl("cbam_pool_positions", TORCH_BOX(&pool_positions));
  m.impl("cbam_pool_channels", TORCH_BOX(&pool_channels));
  m.impl("cbam_recalibrate", TORCH_BOX(&recalibrate));
  m.impl("cbam_recalibrate_reduce", TORCH_BOX(&recalibrate_reduce));
  m.impl("cbam_unpool_reduce", TORCH_BOX(&unpool_reduce));
  m.impl("cbam_unpool", TORCH_BOX(&unpool));
  m.impl("cbam_convolve", TORCH_BOX(&convolve));
  m.impl("cbam_convolve_backward", TORCH_BOX(&convolve_backward));
}
