// The CUDA implementations of the operators of CBAM that aia_kernels/schemas.py defines: checks, allocation, device and
// stream. The work itself is in cuda/cbam.cu.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../cuda/cbam.h"
#include "checks_cbam.h"
#include "cuda.h"

namespace {

using aia::FeatureMaps;
using aia::maps_of;
using aia::Matrix;
using aia::matrix_of;
using aia::new_like;
using aia::new_numbers;
using aia::cuda::cbam_split;
using aia::cuda::Launch;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor new_indices(const Tensor& of, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(of, sizes, ScalarType::Int);
}
int32_t* indices(Tensor& of) { return static_cast<int32_t*>(of.mutable_data_ptr()); }

// The parts of a sum [B, n]; none where it is one.
Tensor new_parts(const Tensor& of, const Matrix& m, int count, int64_t n) {
  return new_numbers(of, {count > 1 ? m.B * count * n : 0});
}

// Over the columns or over the rows of x, times a gate of these or null, into pooled [B, 2, ...] and argmax [B, ...].
void pool(const Matrix& m, const Tensor& x, bool over_columns, const void* gate, Tensor& pooled, Tensor& argmax) {
  const Launch launch(x);
  const void* data = x.const_data_ptr();
  if (over_columns) {
    launch.check(
        aia::cuda::cbam_pool_columns(m, data, gate, pooled.mutable_data_ptr(), indices(argmax), launch.stream()));
    return;
  }
  const int64_t chunks = cbam_split(m).chunks;
  Tensor partial = new_parts(x, m, static_cast<int>(chunks), 2 * m.columns);
  Tensor where = new_indices(x, {chunks > 1 ? m.B * chunks * m.columns : 0});
  launch.check(aia::cuda::cbam_pool_rows(m, data, gate, partial.mutable_data_ptr(), indices(where),
                                         pooled.mutable_data_ptr(), indices(argmax), launch.stream()));
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
  const Launch launch(x);
  std::vector<Tensor> results{new_like(x)};
  if (with_confounder) results.push_back(new_like(x));
  launch.check(aia::cuda::cbam_recalibrate(m, x.const_data_ptr(), gates.of_rows(m), gates.of_columns(m),
                                           results[0].mutable_data_ptr(),
                                           with_confounder ? results[1].mutable_data_ptr() : nullptr, launch.stream()));
  return results;
}

std::tuple<Tensor, Tensor> recalibrate_reduce(const Tensor& grad_y, std::optional<Tensor> grad_confounder,
                                              const Tensor& x, std::optional<Tensor> channel,
                                              std::optional<Tensor> spatial) {
  const FeatureMaps at = maps_of(x, "x");
  const Matrix m = matrix_of(at);
  aia::check_same(grad_y, x, "grad_y", "x");
  const void* confounder = aia::confounder_of(grad_confounder, grad_y);
  const aia::MapGates gates(channel, spatial, at, x);
  const Launch launch(x);
  Tensor grad_channel = new_numbers(x, {at.B, at.C}), grad_spatial = new_numbers(x, {at.B, 1, at.H, at.W});
  Tensor &of_rows = m.rows_are_channels ? grad_channel : grad_spatial,
         &of_columns = m.rows_are_channels ? grad_spatial : grad_channel;
  const aia::cuda::CbamGradients given{grad_y.const_data_ptr(), confounder, x.const_data_ptr(), gates.of_rows(m),
                                       gates.of_columns(m)};
  Tensor row_parts = new_parts(x, m, aia::cuda::cbam_reduce_tiles(m, given), m.rows);
  Tensor column_parts = new_parts(x, m, cbam_split(m).chunks, m.columns);
  launch.check(aia::cuda::cbam_recalibrate_reduce(m, given, row_parts.mutable_data_ptr(), of_rows.mutable_data_ptr(),
                                                  column_parts.mutable_data_ptr(), of_columns.mutable_data_ptr(),
                                                  launch.stream()));
  return {grad_channel, grad_spatial};
}

Tensor unpool_reduce(const Tensor& x, const Tensor& grad_spatial, const Tensor& spatial_argmax) {
  const FeatureMaps at = maps_of(x, "x");
  const Matrix m = matrix_of(at);
  const aia::MapFeatures from = aia::MapFeatures::of_positions(grad_spatial, spatial_argmax, at, x);
  const Launch launch(x);
  Tensor grad_channel = new_numbers(x, {at.B, at.C});
  Tensor partial = new_parts(x, m, m.rows_are_channels ? 1 : cbam_split(m).chunks, m.columns);
  launch.check(aia::cuda::cbam_unpool_reduce(m, x.const_data_ptr(), {nullptr, from.grad, from.argmax},
                                             partial.mutable_data_ptr(), grad_channel.mutable_data_ptr(),
                                             launch.stream()));
  return grad_channel;
}

Tensor unpool(const Tensor& grad_y, std::optional<Tensor> grad_confounder, std::optional<Tensor> channel,
              std::optional<Tensor> grad_channel, std::optional<Tensor> channel_argmax, std::optional<Tensor> spatial,
              std::optional<Tensor> grad_spatial, std::optional<Tensor> spatial_argmax) {
  const aia::UnpoolMaps given(grad_y, grad_confounder, channel, grad_channel, channel_argmax, spatial, grad_spatial,
                              spatial_argmax);
  const Matrix m = matrix_of(given.at);
  const aia::Side of_channels = given.of_channels(), of_positions = given.of_positions();
  const Launch launch(grad_y);
  Tensor grad_x = new_like(grad_y);
  launch.check(aia::cuda::cbam_unpool(
      m, grad_y.const_data_ptr(), given.grad_confounder, m.rows_are_channels ? of_channels : of_positions,
      m.rows_are_channels ? of_positions : of_channels, grad_x.mutable_data_ptr(), launch.stream()));
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CUDA, m) {
  m.impl("cbam_pool_positions", TORCH_BOX(&pool_positions));
  m.impl("cbam_pool_channels", TORCH_BOX(&pool_channels));
  m.impl("cbam_recalibrate", TORCH_BOX(&recalibrate));
  m.impl("cbam_recalibrate_reduce", TORCH_BOX(&recalibrate_reduce));
  m.impl("cbam_unpool_reduce", TORCH_BOX(&unpool_reduce));
  m.impl("cbam_unpool", TORCH_BOX(&unpool));
}
