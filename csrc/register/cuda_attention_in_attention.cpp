// The CUDA implementations of the operators of Attention in Attention that aia_kernels/schemas.py defines: checks,
// allocation, device and stream. The work itself is in cuda/.
#include "cuda.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using aia::accumulate_type;
using aia::Activation;
using aia::activation_of;
using aia::check_context;
using aia::dims_of;
using aia::Gate;
using aia::gate_of;
using aia::Gates;
using aia::index_type;
using aia::new_like;
using aia::Numbers;
using aia::PackedDims;
using aia::Scalar;
using aia::scalar_of;
using aia::Unpooled;
using aia::unpooled_of;
using aia::cuda::GateWorkspace;
using aia::cuda::kLimit;
using aia::cuda::Launch;
using aia::cuda::Shape;
using aia::cuda::shape_of_unit;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> pool(const Tensor& x, int64_t context, std::optional<Tensor> gate, int64_t gate_context) {
  const Activation a = activation_of(x, "x");
  check_context(context, "context");
  const Gate inner = gate_of(gate, gate_context, "gate_context", a, x, "gate");
  const Shape s = shape_of_unit(a, "x");
  const Launch launch(x);
  Tensor pooled = torch::stable::new_empty(x, {a.B, 2, a.packed(context)}, accumulate_type(x));
  Tensor argmax = torch::stable::new_empty(x, {a.B, a.packed(context)}, index_type(a, context));
  launch.check(aia::cuda::pool(s, x.const_data_ptr(), static_cast<int>(context), inner, pooled.mutable_data_ptr(),
                               argmax.mutable_data_ptr(), static_cast<int>(argmax.element_size()), launch.stream()));
  return {pooled, argmax};
}

Tensor unpool(const Tensor& grad_y, const Tensor& gate, const Tensor& grad_pooled, const Tensor& argmax,
              int64_t context, std::optional<Tensor> inner_gate, int64_t inner_gate_context,
              std::optional<Tensor> inner_grad_pooled, std::optional<Tensor> inner_argmax, int64_t inner_context) {
  const aia::UnpoolArguments given(grad_y, gate, grad_pooled, argmax, context, inner_gate, inner_gate_context,
                                   inner_grad_pooled, inner_argmax, inner_context);
  const Shape s = shape_of_unit(given.grad_y, "grad_y");
  const Launch launch(grad_y);
  Tensor grad_x = new_like(grad_y);
  launch.check(aia::cuda::unpool(s, grad_y.const_data_ptr(), given.gate, given.outer, given.inner_gate, given.inner,
                                 grad_x.mutable_data_ptr(), launch.stream()));
  return grad_x;
}

Tensor unpool_reduce(const Tensor& x, const Tensor& grad_pooled, const Tensor& argmax, int64_t context,
                     int64_t gate_context) {
  const Activation a = activation_of(x, "x");
  const Unpooled from = unpooled_of(grad_pooled, argmax, context, "context", a, x, "grad_pooled", "argmax");
  check_context(gate_context, "gate_context");
  const Shape s = shape_of_unit(a, "x");
  const Launch launch(x);
  Tensor grad_gate = torch::stable::new_empty(x, {a.B, a.packed(gate_context)}, accumulate_type(x));
  launch.check(aia::cuda::unpool_reduce(s, x.const_data_ptr(), from, static_cast<int>(gate_context),
                                        grad_gate.mutable_data_ptr(), launch.stream()));
  return grad_gate;
}

Tensor recalibrate(const Tensor& x, const Tensor& gate, int64_t context) {
  const Activation a = activation_of(x, "x");
  const Gate outer = gate_of(gate, context, "context", a, x, "gate");
  const Shape s = shape_of_unit(a, "x");
  const Launch launch(x);
  Tensor y = new_like(x);
  launch.check(aia::cuda::recalibrate(s, x.const_data_ptr(), outer, y.mutable_data_ptr(), launch.stream()));
  return y;
}

Tensor recalibrate_reduce(const Tensor& grad_y, const Tensor& x, int64_t context) {
  const Activation a = activation_of(x, "x");
  aia::check_same(grad_y, x, "grad_y", "x");
  check_context(context, "context");
  const Shape s = shape_of_unit(a, "x");
  const Launch launch(x);
  Tensor grad_gate = torch::stable::new_empty(x, {a.B, a.packed(context)}, accumulate_type(x));
  launch.check(aia::cuda::recalibrate_reduce(s, grad_y.const_data_ptr(), x.const_data_ptr(), static_cast<int>(context),
                                             grad_gate.mutable_data_ptr(), launch.stream()));
  return grad_gate;
}

// Of an averaged gate, as shape_of_unit.
Shape shape_of_maps(const Activation& a, const char* name) {
  AIA_CHECK(a.packed(aia::kSpacetime) < kLimit && a.packed(aia::kChannel) < kLimit, "the packed maps of one clip of ",
            name, " must hold fewer than 2^30 elements");
  return {a.B,     static_cast<int>(a.T), static_cast<int>(a.C), static_cast<int>(a.H), static_cast<int>(a.W), a.order,
          a.scalar};
}

// The average of a gate over T, H and W as one over C; `back`: its transpose.
Tensor averaged(const Tensor& maps, const char* name, const std::vector<int64_t>& sizes, int64_t order, bool back) {
  const Activation a = aia::averaged_of(maps, sizes, order, back, name);
  const Shape s = shape_of_maps(a, name);
  const Launch launch(maps);
  Tensor made = torch::stable::new_empty(maps, {a.B, a.packed(back ? aia::kSpacetime : aia::kChannel)});
  const auto pass = back ? aia::cuda::average_gate_back : aia::cuda::average_gate;
  launch.check(pass(s, maps.const_data_ptr(), made.mutable_data_ptr(), launch.stream()));
  return made;
}

Tensor average_gate(const Tensor& gate, std::vector<int64_t> sizes, int64_t order) {
  return averaged(gate, "gate", sizes, order, false);
}

Tensor average_gate_back(const Tensor& grad, std::vector<int64_t> sizes, int64_t order) {
  return averaged(grad, "grad", sizes, order, true);
}

// Maps that a CUDA kernel can address.
const PackedDims& within_limit(const PackedDims& d) {
  AIA_CHECK(d.packed() < kLimit, "the packed maps of one clip must hold fewer than 2^30 elements, got ", d.packed());
  return d;
}

std::tuple<Tensor, Tensor, Tensor> gate(const Tensor& pooled, std::vector<Tensor> weight, Numbers scale, Numbers shift,
                                        Numbers mean, Numbers var, std::vector<double> eps, std::vector<bool> batch,
                                        std::vector<int64_t> dims) {
  const PackedDims d = within_limit(dims_of(dims, pooled, true, "pooled"));
  Gates gates = aia::weights_of(weight, d.n, pooled);
  aia::add_norms(gates, d.n, scale, shift, mean, var, eps, batch, pooled);
  const Launch launch(pooled);
  Tensor gate = torch::stable::new_empty(pooled, {d.B, d.packed()});
  Tensor norm = torch::stable::new_empty(pooled, {d.n, 4});
  Tensor statistics = torch::stable::new_empty(pooled, {d.n, 3});
  const GateWorkspace workspace(pooled, aia::cuda::kMomentPartials);
  launch.check(aia::cuda::gate(d, scalar_of(pooled, "pooled"), gates.data(), pooled.const_data_ptr(),
                               gate.mutable_data_ptr(), norm.mutable_data_ptr(), statistics.mutable_data_ptr(),
                               workspace, launch.stream()));
  return {gate, norm, statistics};
}

std::tuple<Tensor, Tensor> gate_again(const Tensor& pooled, std::vector<Tensor> weight, const Tensor& norm,
                                      std::vector<int64_t> dims) {
  const PackedDims d = within_limit(dims_of(dims, pooled, true, "pooled"));
  const Gates gates = aia::weights_of(weight, d.n, pooled);
  aia::check_contiguous(norm, {d.n, 4}, pooled.scalar_type(), pooled, "norm");
  const Launch launch(pooled);
  Tensor gate = torch::stable::new_empty(pooled, {d.B, d.packed()});
  Tensor z = torch::stable::empty_like(gate);
  launch.check(aia::cuda::gate_again(d, scalar_of(pooled, "pooled"), gates.data(), pooled.const_data_ptr(),
                                     norm.const_data_ptr(), gate.mutable_data_ptr(), z.mutable_data_ptr(),
                                     launch.stream()));
  return {gate, z};
}

Tensor gate_backward_reduce(const Tensor& grad_gate, const Tensor& z, const Tensor& norm, std::vector<int64_t> dims) {
  const PackedDims d = within_limit(aia::dims_of_gradient(grad_gate, z, norm, dims));
  const Launch launch(z);
  Tensor sums = torch::stable::new_empty(z, {d.n, 2});
  const GateWorkspace workspace(z, aia::cuda::kNormPartials);
  launch.check(aia::cuda::gate_backward_reduce(d, scalar_of(z, "z"), grad_gate.const_data_ptr(), z.const_data_ptr(),
                                               norm.const_data_ptr(), sums.mutable_data_ptr(), workspace,
                                               launch.stream()));
  return sums;
}

std::tuple<Tensor, std::vector<Tensor>, Tensor> gate_backward(const Tensor& grad_gate, const Tensor& z,
                                                              const Tensor& norm, std::optional<Tensor> sums,
                                                              const Tensor& statistics, const Tensor& pooled,
                                                              std::vector<Tensor> weight, std::vector<int64_t> dims) {
  const PackedDims d = within_limit(aia::dims_of_gradient(grad_gate, z, norm, sums, statistics, pooled, dims));
  const Gates gates = aia::weights_of(weight, d.n, z);
  const Launch launch(z);
  Tensor grad_pooled = new_like(pooled);
  Tensor grad_affine = torch::stable::new_empty(weight[0], {d.n, 2});
  std::vector<Tensor> grad_weight;
  for (const Tensor& w : weight) grad_weight.push_back(torch::stable::empty_like(w));
  const Gates grads = aia::weights_of(grad_weight, d.n, z);
  const GateWorkspace workspace(z, aia::cuda::kWeightPartials);
  const aia::cuda::GateKept kept{pooled.const_data_ptr(), z.const_data_ptr(), norm.const_data_ptr(),
                                 statistics.const_data_ptr()};
  launch.check(aia::cuda::gate_backward(d, scalar_of(z, "z"), gates.data(), grads.data(),
                                        aia::parameter_of(grad_affine, z, "grad_affine"), kept,
                                        grad_gate.const_data_ptr(), sums ? sums->const_data_ptr() : nullptr,
                                        grad_pooled.mutable_data_ptr(), workspace, launch.stream()));
  return {grad_pooled, grad_weight, grad_affine};
}

void move_statistics(std::vector<Tensor> mean, std::vector<Tensor> var, std::vector<Tensor> tracked,
                     std::vector<Tensor> statistics, double momentum) {
  aia::check_running(mean, var, tracked, statistics, momentum);
  if (mean.empty() && tracked.empty()) return;
  const Launch launch(mean.empty() ? tracked[0] : mean[0]);
  const Scalar scalar = mean.empty() ? Scalar::kFloat32 : scalar_of(statistics[0], "statistics");
  using aia::cuda::Running;
  size_t norm = 0, number = 0;
  while (norm < mean.size() || number < tracked.size()) {
    // The blocks of a launch run at once: what moves twice does so in two launches.
    Running running{};
    for (; norm < mean.size() && running.norms < Running::kMost; ++norm) {
      const auto moved_by = [&](const aia::Parameter* earlier, const aia::Parameter& p) {
        return std::any_of(earlier, earlier + running.norms, [&](const auto& other) { return other.data == p.data; });
      };
      const aia::Parameter running_mean = aia::parameter_of(mean[norm], mean[norm], "mean", true);
      const aia::Parameter running_var = aia::parameter_of(var[norm], var[norm], "var", true);
      if (moved_by(running.mean, running_mean) || moved_by(running.var, running_var)) break;
      running.mean[running.norms] = running_mean, running.var[running.norms] = running_var;
      running.statistics[running.norms] = statistics[norm].const_data_ptr();
      running.channels[running.norms++] = mean[norm].numel();
    }
    for (; number < tracked.size() && running.numbers < Running::kMost; ++number) {
      int64_t* counter = static_cast<int64_t*>(tracked[number].mutable_data_ptr());
      if (std::count(running.tracked, running.tracked + running.numbers, counter)) break;
      running.tracked[running.numbers++] = counter;
    }
    launch.check(aia::cuda::move_statistics(running, scalar, momentum, launch.stream()));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CUDA, m) {
  m.impl("average_gate", TORCH_BOX(&average_gate));
  m.impl("average_gate_back", TORCH_BOX(&average_gate_back));
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
