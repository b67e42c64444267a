// The CPU implementations of the operators of CBAM that aia_kernels/schemas.py defines: checks, allocation, choice of
// the instruction level, and the split over threads. The work itself is in cpu/cbam.cpp.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu_cbam_steps.h"

namespace {

using aia::FeatureMaps;
using aia::maps_of;
using aia::Matrix;
using aia::matrix_of;
using aia::new_numbers;
using aia::cpu::Convolution;
using aia::cpu::mutable_numbers;
using aia::cpu::numbers;
using aia::cpu::output_like;
using aia::cpu::with_type;
using torch::stable::Tensor;

// As pool_into, of tensors.
void pool(const Matrix& m, const Tensor& x, bool over_columns, const void* gate, Tensor& pooled, Tensor& argmax) {
  aia::cpu::pool_into(m, x, x.const_data_ptr(), over_columns, gate, pooled.mutable_data_ptr(),
                      argmax.mutable_data_ptr());
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
  aia::cpu::recalibrate_into(m, data, gates.of_rows(m), gates.of_columns(m), y, rest);
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
  Tensor grad_channel = new_numbers(x, {at.B, at.C}), grad_spatial = new_numbers(x, {at.B, 1, at.H, at.W});
  void *of_channels = grad_channel.mutable_data_ptr(), *of_positions = grad_spatial.mutable_data_ptr();
  if (!m.rows_are_channels) std::swap(of_channels, of_positions);
  aia::cpu::recalibrate_reduce_into(m, x, grad_y.const_data_ptr(), confounder, x.const_data_ptr(), gates.of_rows(m),
                                    gates.of_columns(m), of_channels, of_positions);
  return {grad_channel, grad_spatial};
}

Tensor unpool_reduce(const Tensor& x, const Tensor& grad_spatial, const Tensor& spatial_argmax) {
  const FeatureMaps at = maps_of(x, "x");
  const Matrix m = matrix_of(at);
  const aia::MapFeatures from = aia::MapFeatures::of_positions(grad_spatial, spatial_argmax, at, x);
  Tensor grad_channel = new_numbers(x, {at.B, at.C});
  aia::cpu::unpool_reduce_into(m, x, x.const_data_ptr(), {nullptr, from.grad, from.argmax},
                               grad_channel.mutable_data_ptr());
  return grad_channel;
}

Tensor unpool(const Tensor& grad_y, std::optional<Tensor> grad_confounder, std::optional<Tensor> channel,
              std::optional<Tensor> grad_channel, std::optional<Tensor> channel_argmax, std::optional<Tensor> spatial,
              std::optional<Tensor> grad_spatial, std::optional<Tensor> spatial_argmax) {
  const aia::UnpoolMaps given(grad_y, grad_confounder, channel, grad_channel, channel_argmax, spatial, grad_spatial,
                              spatial_argmax);
  const Matrix m = matrix_of(given.at);
  Tensor grad_x = output_like(grad_y);
  aia::cpu::unpool_into(m, grad_y.const_data_ptr(), given.grad_confounder, given.of_channels(), given.of_positions(),
                        grad_x.mutable_data_ptr());
  return grad_x;
}

Convolution convolution_of(const aia::MapConvolution& at) { return {at.B, at.H, at.W, at.k}; }

Tensor convolve(const Tensor& pooled, const Tensor& weight) {
  const aia::MapConvolution at(pooled, weight);
  const Convolution c = convolution_of(at);
  Tensor z = torch::stable::new_empty(pooled, {at.B, 1, at.H, at.W});
  with_type(pooled, [&](auto zero) {
    using A = decltype(zero);
    aia::cpu::convolve_into<A>(c, numbers<A>(pooled), numbers<A>(weight), mutable_numbers<A>(z));
  });
  return z;
}

std::tuple<Tensor, Tensor> convolve_backward(const Tensor& grad_z, const Tensor& pooled, const Tensor& weight) {
  const aia::MapConvolution at(pooled, weight);
  aia::check_contiguous(grad_z, {at.B, 1, at.H, at.W}, at.type, pooled, "grad_z");
  const Convolution c = convolution_of(at);
  Tensor grad_pooled = torch::stable::new_empty(pooled, {at.B, 2, at.H, at.W});
  Tensor grad_weight = torch::stable::new_empty(pooled, {1, 2, at.k, at.k});
  with_type(pooled, [&](auto zero) {
    using A = decltype(zero);
    aia::cpu::convolve_back_into<A>(c, numbers<A>(grad_z), numbers<A>(pooled), numbers<A>(weight),
                                    mutable_numbers<A>(grad_pooled), mutable_numbers<A>(grad_weight));
  });
  return {grad_pooled, grad_weight};
}

std::tuple<Tensor, Tensor> spatial_gate(const Tensor& z, std::optional<Tensor> scale, std::optional<Tensor> shift,
                                        std::optional<Tensor> mean, std::optional<Tensor> var, double eps, bool batch) {
  const aia::SpatialMaps at(z);
  aia::GateParameters of{};
  aia::set_norm(of, z, scale, shift, mean, var, eps, batch);
  Tensor gate = new_numbers(z, {at.B, 1, at.H, at.W}), statistics = new_numbers(z, {1, 3});
  with_type(z, [&](auto zero) {
    using A = decltype(zero);
    A norm[4];
    aia::cpu::norm_into(of, at.B, at.positions(), numbers<A>(z), norm, mutable_numbers<A>(statistics));
    aia::cpu::activate_into<A>(at.B, at.positions(), numbers<A>(z), norm, mutable_numbers<A>(gate));
  });
  return {gate, statistics};
}

std::tuple<Tensor, Tensor, Tensor> spatial_gate_backward(const Tensor& grad, const Tensor& z, const Tensor& gate,
                                                         const Tensor& statistics, std::optional<Tensor> scale,
                                                         double eps) {
  const aia::SpatialMaps at(z);
  const auto type = z.scalar_type();
  aia::check_contiguous(grad, {at.B, 1, at.H, at.W}, type, z, "grad");
  aia::check_contiguous(gate, {at.B, 1, at.H, at.W}, type, z, "spatial");
  aia::check_contiguous(statistics, {1, 3}, type, z, "statistics");
  aia::GateParameters of{};
  aia::set_norm(of, z, scale, std::nullopt, std::nullopt, std::nullopt, eps, false);
  Tensor grad_z = new_numbers(z, {at.B, 1, at.H, at.W}), grad_scale = new_numbers(z, {1}),
         grad_shift = new_numbers(z, {1});
  with_type(z, [&](auto zero) {
    using A = decltype(zero);
    const A* known = numbers<A>(statistics);
    const aia::Scalar scalar = aia::scalar_of(z, "z");
    of.mean = {const_cast<A*>(known), scalar}, of.var = {const_cast<A*>(known + 1), scalar};
    A norm[4], own[3];
    aia::finish_norm(of, 0, 0, 1, norm, own);
    std::copy_n(numbers<A>(grad), at.B * at.positions(), mutable_numbers<A>(grad_z));
    aia::cpu::norm_back_into<A>(at.B, at.positions(), numbers<A>(z), numbers<A>(gate), norm, known,
                                mutable_numbers<A>(grad_z), mutable_numbers<A>(grad_scale),
                                mutable_numbers<A>(grad_shift));
  });
  return {grad_z, grad_scale, grad_shift};
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
  m.impl("cbam_spatial_gate", TORCH_BOX(&spatial_gate));
  m.impl("cbam_spatial_gate_backward", TORCH_BOX(&spatial_gate_backward));
}
