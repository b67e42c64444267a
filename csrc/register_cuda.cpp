// The CUDA implementations of the operators of Attention in Attention that aia_kernels/ops.py defines: checks,
// allocation, device and stream. The work itself is in cuda/.
#include "register_cuda.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using aia::accumulate_type;
using aia::check_context;
using aia::check_parameters;
using aia::check_same;
using aia::dims_of;
using aia::Gate;
using aia::index_type;
using aia::PackedDims;
using aia::Scalar;
using aia::scalar_of;
using aia::Unpooled;
using aia::cuda::check_beside;
using aia::cuda::Launch;
using aia::cuda::packed;
using aia::cuda::Shape;
using aia::cuda::shape_of_unit;
using aia::cuda::workspace_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A contiguous [B, M], or [B, 2, M] for features, beside x.
void check_map(const Tensor& map, int64_t features, ScalarType type, const Shape& s, int64_t context, const Tensor& x,
               const char* name) {
  const int64_t axes = features == 1 ? 2 : 3;
  const bool fits = map.dim() == axes && map.is_contiguous() && map.size(0) == s.B &&
                    (features == 1 || map.size(1) == features) && map.size(axes - 1) == packed(s, context);
  STD_TORCH_CHECK(fits, name, " must be a contiguous packed map of its context");
  STD_TORCH_CHECK(map.scalar_type() == type, name, " has the wrong dtype for this x");
  check_beside(map, x, name);
}

ScalarType index_type_of(const Shape& s, int64_t context) {
  return index_type(context == aia::kChannel ? s.C : std::max({s.T, s.H, s.W}));
}

Gate gate_of(const std::optional<Tensor>& gate, int64_t context, const Shape& s, const Tensor& x, const char* name) {
  if (!gate) return {nullptr, aia::kNone};
  check_context(context, "the context of a gate");
  check_map(*gate, 1, accumulate_type(x), s, context, x, name);
  return {gate->const_data_ptr(), static_cast<int>(context)};
}

Unpooled unpooled_of(const std::optional<Tensor>& grad, const std::optional<Tensor>& argmax, int64_t context,
                     const Shape& s, const Tensor& x, const char* grad_name, const char* argmax_name) {
  STD_TORCH_CHECK(grad.has_value() == argmax.has_value(), grad_name, " and ", argmax_name, " come together or not");
  if (!grad) return {nullptr, nullptr, 1, aia::kNone};
  check_context(context, "the context of pooled features");
  check_map(*grad, 2, accumulate_type(x), s, context, x, grad_name);
  check_map(*argmax, 1, index_type_of(s, context), s, context, x, argmax_name);
  return {grad->const_data_ptr(), argmax->const_data_ptr(), static_cast<int>(argmax->element_size()),
          static_cast<int>(context)};
}

std::tuple<Tensor, Tensor> pool(const Tensor& x, int64_t context, std::optional<Tensor> gate, int64_t gate_context) {
  const Shape s = shape_of_unit(x, "x");
  check_context(context, "context");
  const Gate inner = gate_of(gate, gate_context, s, x, "gate");
  const Launch launch(x);
  Tensor pooled = torch::stable::new_empty(x, {s.B, 2, packed(s, context)}, accumulate_type(x));
  Tensor argmax = torch::stable::new_empty(x, {s.B, packed(s, context)}, index_type_of(s, context));
  launch.check(aia::cuda::pool(s, x.const_data_ptr(), static_cast<int>(context), inner, pooled.mutable_data_ptr(),
                               argmax.mutable_data_ptr(), static_cast<int>(argmax.element_size()), launch.stream()));
  return {pooled, argmax};
}

Tensor unpool(const Tensor& grad_y, const Tensor& gate, const Tensor& grad_pooled, const Tensor& argmax,
              int64_t context, std::optional<Tensor> inner_gate, int64_t inner_gate_context,
              std::optional<Tensor> inner_grad_pooled, std::optional<Tensor> inner_argmax, int64_t inner_context) {
  const Shape s = shape_of_unit(grad_y, "grad_y");
  const Gate outer_gate = gate_of(gate, context, s, grad_y, "gate");
  const Unpooled outer = unpooled_of(grad_pooled, argmax, context, s, grad_y, "grad_pooled", "argmax");
  const Gate inside = gate_of(inner_gate, inner_gate_context, s, grad_y, "inner_gate");
  const Unpooled inner =
      unpooled_of(inner_grad_pooled, inner_argmax, inner_context, s, grad_y, "inner_grad_pooled", "inner_argmax");
  const Launch launch(grad_y);
  Tensor grad_x = torch::stable::empty_like(grad_y);
  launch.check(aia::cuda::unpool(s, grad_y.const_data_ptr(), outer_gate, outer, inside, inner,
                                 grad_x.mutable_data_ptr(), launch.stream()));
  return grad_x;
}

Tensor unpool_reduce(const Tensor& x, const Tensor& grad_pooled, const Tensor& argmax, int64_t context,
                     int64_t gate_context) {
  const Shape s = shape_of_unit(x, "x");
  check_context(gate_context, "gate_context");
  const Unpooled unpooled = unpooled_of(grad_pooled, argmax, context, s, x, "grad_pooled", "argmax");
  const Launch launch(x);
  Tensor grad_gate = torch::stable::new_empty(x, {s.B, packed(s, gate_context)}, accumulate_type(x));
  launch.check(aia::cuda::unpool_reduce(s, x.const_data_ptr(), unpooled, static_cast<int>(gate_context),
                                        grad_gate.mutable_data_ptr(), launch.stream()));
  return grad_gate;
}

Tensor recalibrate(const Tensor& x, const Tensor& gate, int64_t context) {
  const Shape s = shape_of_unit(x, "x");
  const Gate outer = gate_of(gate, context, s, x, "gate");
  const Launch launch(x);
  Tensor y = torch::stable::empty_like(x);
  launch.check(aia::cuda::recalibrate(s, x.const_data_ptr(), outer, y.mutable_data_ptr(), launch.stream()));
  return y;
}

Tensor recalibrate_reduce(const Tensor& grad_y, const Tensor& x, int64_t context) {
  const Shape s = shape_of_unit(x, "x");
  check_context(context, "context");
  check_same(grad_y, x, "grad_y and x");
  check_beside(x, grad_y, "x");
  const Launch launch(x);
  Tensor grad_gate = torch::stable::new_empty(x, {s.B, packed(s, context)}, accumulate_type(x));
  launch.check(aia::cuda::recalibrate_reduce(s, grad_y.const_data_ptr(), x.const_data_ptr(), static_cast<int>(context),
                                             grad_gate.mutable_data_ptr(), launch.stream()));
  return grad_gate;
}

// Maps that a CUDA kernel can address.
PackedDims gate_dims(const std::vector<int64_t>& dims, const Tensor& map, const char* name) {
  const PackedDims d = dims_of(dims, map, name);
  STD_TORCH_CHECK(d.packed() < int64_t{1} << 30, name, " must hold fewer than 2^30 elements of one clip");
  return d;
}

double* doubles(Tensor& workspace) { return static_cast<double*>(workspace.mutable_data_ptr()); }

using Numbers = std::vector<std::optional<Tensor>>;
using Gates = std::array<aia::GateParameters, 3>;

void check_all_beside(const std::vector<Tensor>& tensors, const Tensor& x, const char* name) {
  for (const Tensor& t : tensors) check_beside(t, x, name);
}

PackedDims pooled_dims(const std::vector<int64_t>& dims, const Tensor& pooled) {
  STD_TORCH_CHECK(pooled.dim() == 3 && pooled.size(1) == 2, "pooled must be [B, 2, M]");
  return gate_dims(dims, pooled, "pooled");
}

std::tuple<Tensor, Tensor, Tensor> gate(const Tensor& pooled, std::vector<Tensor> weight, Numbers scale, Numbers shift,
                                        Numbers mean, Numbers var, std::vector<double> eps, std::vector<bool> batch,
                                        std::vector<int64_t> dims) {
  const PackedDims d = pooled_dims(dims, pooled);
  Gates gates = aia::weights_of(weight, d.n);
  aia::add_norms(gates, d.n, scale, shift, mean, var, eps, batch);
  check_all_beside(weight, pooled, "weight");
  for (const Numbers* list : {&scale, &shift, &mean, &var})
    for (const std::optional<Tensor>& number : *list)
      if (number) check_beside(*number, pooled, "scale, shift, mean and var");
  const Launch launch(pooled);
  Tensor gate = torch::stable::new_empty(pooled, {d.B, d.packed()});
  Tensor norm = torch::stable::new_empty(pooled, {d.n, 4});
  Tensor statistics = torch::stable::new_empty(pooled, {d.n, 3});
  Tensor workspace = workspace_of(pooled, aia::cuda::kMomentPartials);
  launch.check(aia::cuda::gate(d, scalar_of(pooled), gates.data(), pooled.const_data_ptr(), gate.mutable_data_ptr(),
                               norm.mutable_data_ptr(), statistics.mutable_data_ptr(), doubles(workspace),
                               launch.stream()));
  return {gate, norm, statistics};
}

std::tuple<Tensor, Tensor> gate_again(const Tensor& pooled, std::vector<Tensor> weight, const Tensor& norm,
                                      std::vector<int64_t> dims) {
  const PackedDims d = pooled_dims(dims, pooled);
  const Gates gates = aia::weights_of(weight, d.n);
  check_parameters(norm, pooled, d.n, 4, "norm");
  check_all_beside(weight, pooled, "weight");
  check_beside(norm, pooled, "norm");
  const Launch launch(pooled);
  Tensor gate = torch::stable::new_empty(pooled, {d.B, d.packed()});
  Tensor z = torch::stable::empty_like(gate);
  launch.check(aia::cuda::gate_again(d, scalar_of(pooled), gates.data(), pooled.const_data_ptr(), norm.const_data_ptr(),
                                     gate.mutable_data_ptr(), z.mutable_data_ptr(), launch.stream()));
  return {gate, z};
}

Tensor gate_backward_reduce(const Tensor& grad_gate, const Tensor& z, const Tensor& norm, std::vector<int64_t> dims) {
  const PackedDims d = gate_dims(dims, z, "z");
  check_same(grad_gate, z, "grad_gate and z");
  check_parameters(norm, z, d.n, 4, "norm");
  check_beside(grad_gate, z, "grad_gate");
  check_beside(norm, z, "norm");
  const Launch launch(z);
  Tensor sums = torch::stable::new_empty(z, {d.n, 2});
  Tensor workspace = workspace_of(z, aia::cuda::kNormPartials);
  launch.check(aia::cuda::gate_backward_reduce(d, scalar_of(z), grad_gate.const_data_ptr(), z.const_data_ptr(),
                                               norm.const_data_ptr(), sums.mutable_data_ptr(), doubles(workspace),
                                               launch.stream()));
  return sums;
}

std::tuple<Tensor, std::vector<Tensor>, Tensor> gate_backward(const Tensor& grad_gate, const Tensor& z,
                                                              const Tensor& norm, std::optional<Tensor> sums,
                                                              const Tensor& statistics, const Tensor& pooled,
                                                              std::vector<Tensor> weight, std::vector<int64_t> dims) {
  const PackedDims d = gate_dims(dims, z, "z");
  const Gates gates = aia::weights_of(weight, d.n);
  check_same(grad_gate, z, "grad_gate and z");
  check_parameters(norm, z, d.n, 4, "norm");
  check_parameters(statistics, z, d.n, 3, "statistics");
  STD_TORCH_CHECK(pooled.is_contiguous() && pooled.numel() == 2 * z.numel() && pooled.scalar_type() == z.scalar_type(),
                  "pooled must be [B, 2, M], of the type of z");
  if (sums) {
    check_parameters(*sums, z, d.n, 2, "sums");
    check_beside(*sums, z, "sums");
  }
  check_beside(grad_gate, z, "grad_gate");
  check_beside(norm, z, "norm");
  check_beside(statistics, z, "statistics");
  check_beside(pooled, z, "pooled");
  check_all_beside(weight, z, "weight");
  const Launch launch(z);
  Tensor grad_pooled = torch::stable::empty_like(pooled);
  Tensor grad_affine = torch::stable::new_empty(weight[0], {d.n, 2});
  std::vector<Tensor> grad_weight;
  for (const Tensor& w : weight) grad_weight.push_back(torch::stable::empty_like(w));
  const Gates grads = aia::weights_of(grad_weight, d.n);
  Tensor workspace = workspace_of(z, aia::cuda::kWeightPartials);
  launch.check(aia::cuda::gate_backward(
      d, scalar_of(z), gates.data(), grads.data(), grad_gate.const_data_ptr(), z.const_data_ptr(),
      norm.const_data_ptr(), sums ? sums->const_data_ptr() : nullptr, aia::parameter_of(grad_affine, "grad_affine"),
      statistics.const_data_ptr(), pooled.const_data_ptr(), grad_pooled.mutable_data_ptr(), doubles(workspace),
      launch.stream()));
  return {grad_pooled, grad_weight, grad_affine};
}

void move_statistics(std::vector<Tensor> mean, std::vector<Tensor> var, std::vector<Tensor> tracked,
                     std::vector<Tensor> statistics, double momentum) {
  aia::check_running(mean, var, tracked, statistics);
  if (mean.empty() && tracked.empty()) return;
  const Tensor& first = mean.empty() ? tracked[0] : mean[0];
  for (const auto* tensors : {&mean, &var, &tracked, &statistics})
    check_all_beside(*tensors, first, "mean, var, tracked and statistics");
  const Launch launch(first);
  using aia::cuda::Running;
  for (size_t begin = 0; begin < std::max(mean.size(), tracked.size()); begin += Running::kMost) {
    Running running{};
    for (size_t i = begin; i < std::min(mean.size(), begin + Running::kMost); ++i) {
      running.mean[running.norms] = aia::parameter_of(mean[i], "mean");
      running.var[running.norms] = aia::parameter_of(var[i], "var");
      running.statistics[running.norms] = statistics[i].const_data_ptr();
      running.channels[running.norms++] = mean[i].numel();
    }
    for (size_t i = begin; i < std::min(tracked.size(), begin + Running::kMost); ++i)
      running.tracked[running.numbers++] = static_cast<int64_t*>(tracked[i].mutable_data_ptr());
    const aia::Scalar scalar = mean.empty() ? aia::Scalar::kFloat32 : scalar_of(statistics[0]);
    launch.check(aia::cuda::move_statistics(running, scalar, momentum, launch.stream()));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CUDA, m) {
  m.impl("pool", TORCH_BOX(&pool));
  m.impl("unpool", TORCH_BOX(&unpool));
  m.impl("unpool_reduce", TORCH_BOX(&unpool_reduce));
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("gate_again", TORCH_BOX(&gate_again));
  m.impl("gate_backward_reduce", TORCH_BOX(&gate_backward_reduce));
  m.impl("gate_backward", TORCH_BOX(&gate_backward));
  m.impl("recalibrate", TORCH_BOX(&recalibrate));
  m.impl("recalibrate_reduce", TORCH_BOX(&recalibrate_reduce));
  m.impl("move_statistics_", TORCH_BOX(&move_statistics));
}
