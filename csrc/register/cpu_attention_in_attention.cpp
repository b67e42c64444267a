// The CPU implementations of the operators of Attention in Attention that aia_kernels/schemas.py defines: checks,
// and allocation. Whole units are in cpu_unit.cpp, the choice of the instruction level and the split over threads in
// cpu_unit_steps.h, and the work itself in cpu/.
#include <torch/csrc/stable/library.h>

#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "cpu_products.h"
#include "cpu_running_statistics.h"
#include "cpu_unit_steps.h"

// Makes a level of csrc/register/cpu.h the one in force, or without a name that of AIA_KERNELS_CPU_LEVEL, which may
// have changed. Returns null, or why it cannot.
extern "C" [[gnu::visibility("default")]] const char* aia_kernels_cpu_level(const char* name) {
  static thread_local std::string reason;
  try {
    aia::cpu::set_level(name);
    return nullptr;
  } catch (const std::exception& error) {
    reason = error.what();
    return reason.c_str();
  }
}

namespace {

using aia::accumulate_type;
using aia::Activation;
using aia::activation_of;
using aia::check_context;
using aia::check_same;
using aia::dims_of;
using aia::Gate;
using aia::gate_of;
using aia::Gates;
using aia::index_type;
using aia::Numbers;
using aia::PackedDims;
using aia::Unpooled;
using aia::unpooled_of;
using aia::cpu::mutable_numbers;
using aia::cpu::numbers;
using aia::cpu::output_like;
using aia::cpu::Shared;
using aia::cpu::with_large_pages;
using aia::cpu::with_type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A packed map [B, M] or [B, 2, M] of a context of x.
Tensor new_map(const Tensor& x, std::vector<int64_t> lead, const Activation& a, int64_t context, ScalarType type) {
  lead.push_back(a.packed(context));
  return with_large_pages(torch::stable::new_empty(x, lead, type));
}

// Of an averaged gate. Maps of x in CTHW are stored as those of TCHW here.
Activation averaged_of(const Tensor& map, const std::vector<int64_t>& sizes, int64_t order, bool back,
                       const char* name) {
  const Activation a = aia::averaged_of(map, sizes, order, back, name);
  AIA_CHECK(a.order != aia::Order::kCTHW, "order must be that in which the CPU stores maps, got ", order);
  return a;
}

Tensor average_gate(const Tensor& gate, std::vector<int64_t> sizes, int64_t order) {
  const Activation a = averaged_of(gate, sizes, order, false, "gate");
  Tensor averaged = new_map(gate, {a.B}, a, aia::kChannel, gate.scalar_type());
  with_type(gate, [&](auto zero) {
    using A = decltype(zero);
    aia::cpu::average_into(a, numbers<A>(gate), mutable_numbers<A>(averaged));
  });
  return averaged;
}

Tensor average_gate_back(const Tensor& grad, std::vector<int64_t> sizes, int64_t order) {
  const Activation a = averaged_of(grad, sizes, order, true, "grad");
  Tensor grad_gate = new_map(grad, {a.B}, a, aia::kSpacetime, grad.scalar_type());
  with_type(grad, [&](auto zero) {
    using A = decltype(zero);
    aia::cpu::spread_into(a, numbers<A>(grad), mutable_numbers<A>(grad_gate));
  });
  return grad_gate;
}

std::tuple<Tensor, Tensor> pool(const Tensor& x, int64_t context, std::optional<Tensor> gate, int64_t gate_context) {
  const Activation a = activation_of(x, "x");
  check_context(context, "context");
  const Gate inner = gate_of(gate, gate_context, "gate_context", a, x, "gate");
  Tensor pooled = new_map(x, {a.B, 2}, a, context, accumulate_type(x));
  Tensor argmax = new_map(x, {a.B}, a, context, index_type(a, context));
  aia::cpu::pool_into(a, x.const_data_ptr(), inner, static_cast<int>(context), pooled.mutable_data_ptr(),
                      argmax.mutable_data_ptr(), static_cast<int>(argmax.element_size()));
  return {pooled, argmax};
}

Tensor unpool(const Tensor& grad_y, const Tensor& gate, const Tensor& grad_pooled, const Tensor& argmax,
              int64_t context, std::optional<Tensor> inner_gate, int64_t inner_gate_context,
              std::optional<Tensor> inner_grad_pooled, std::optional<Tensor> inner_argmax, int64_t inner_context) {
  const aia::UnpoolArguments given(grad_y, gate, grad_pooled, argmax, context, inner_gate, inner_gate_context,
                                   inner_grad_pooled, inner_argmax, inner_context);
  Tensor grad_x = output_like(grad_y);
  aia::cpu::unpool_into(given.grad_y, grad_y.const_data_ptr(), given.gate, given.outer, given.inner_gate, given.inner,
                        grad_x.mutable_data_ptr());
  return grad_x;
}

Tensor unpool_reduce(const Tensor& x, const Tensor& grad_pooled, const Tensor& argmax, int64_t context,
                     int64_t gate_context) {
  const Activation a = activation_of(x, "x");
  const Unpooled from = unpooled_of(grad_pooled, argmax, context, "context", a, x, "grad_pooled", "argmax");
  check_context(gate_context, "gate_context");
  Tensor grad_gate = new_map(x, {a.B}, a, gate_context, accumulate_type(x));
  aia::cpu::unpool_reduce_into(a, x.const_data_ptr(), from, static_cast<int>(gate_context),
                               grad_gate.mutable_data_ptr());
  return grad_gate;
}

Tensor recalibrate(const Tensor& x, const Tensor& gate, int64_t context) {
  const Activation a = activation_of(x, "x");
  const Gate outer = gate_of(gate, context, "context", a, x, "gate");
  Tensor y = output_like(x);
  aia::cpu::recalibrate_into(a, x.const_data_ptr(), outer, y.mutable_data_ptr());
  return y;
}

Tensor recalibrate_reduce(const Tensor& grad_y, const Tensor& x, int64_t context) {
  const Activation a = activation_of(x, "x");
  check_same(grad_y, x, "grad_y", "x");
  check_context(context, "context");
  Tensor grad_gate = new_map(x, {a.B}, a, context, accumulate_type(x));
  aia::cpu::recalibrate_reduce_into(a, grad_y.const_data_ptr(), x.const_data_ptr(), static_cast<int>(context),
                                    grad_gate.mutable_data_ptr());
  return grad_gate;
}

std::tuple<Tensor, Tensor, Tensor> gate(const Tensor& pooled, std::vector<Tensor> weight, Numbers scale, Numbers shift,
                                        Numbers mean, Numbers var, std::vector<double> eps, std::vector<bool> batch,
                                        std::vector<int64_t> dims) {
  const PackedDims d = dims_of(dims, pooled, true, "pooled");
  Gates gates = aia::weights_of(weight, d.n, pooled);
  aia::add_norms(gates, d.n, scale, shift, mean, var, eps, batch, pooled);
  Tensor gate = with_large_pages(torch::stable::new_empty(pooled, {d.B, d.packed()}));
  Tensor norm = torch::stable::new_empty(pooled, {d.n, 4});
  Tensor statistics = torch::stable::new_empty(pooled, {d.n, 3});
  with_type(pooled, [&](auto zero) {
    using A = decltype(zero);
    aia::cpu::GatesForward<A> made(d, gates, numbers<A>(pooled), mutable_numbers<A>(gate), mutable_numbers<A>(norm),
                                   mutable_numbers<A>(statistics));
    made.convolve(0, d.B, Shared{});
    made.finish();
    made.activate(0, d.B, Shared{});
  });
  return {gate, norm, statistics};
}

std::tuple<Tensor, Tensor> gate_again(const Tensor& pooled, std::vector<Tensor> weight, const Tensor& norm,
                                      std::vector<int64_t> dims) {
  const PackedDims d = dims_of(dims, pooled, true, "pooled");
  const Gates gates = aia::weights_of(weight, d.n, pooled);
  aia::check_contiguous(norm, {d.n, 4}, pooled.scalar_type(), pooled, "norm");
  Tensor gate = with_large_pages(torch::stable::new_empty(pooled, {d.B, d.packed()}));
  Tensor z = output_like(gate);
  with_type(pooled, [&](auto zero) {
    using A = decltype(zero);
    aia::cpu::gate_again_into(d, aia::cpu::contiguous_weights<A>(gates, d.n).data(), numbers<A>(pooled),
                              numbers<A>(norm), mutable_numbers<A>(z), mutable_numbers<A>(gate), Shared{});
  });
  return {gate, z};
}

Tensor gate_backward_reduce(const Tensor& grad_gate, const Tensor& z, const Tensor& norm, std::vector<int64_t> dims) {
  const PackedDims d = aia::dims_of_gradient(grad_gate, z, norm, dims);
  Tensor sums = torch::stable::new_empty(z, {d.n, 2});
  with_type(z, [&](auto zero) {
    using A = decltype(zero);
    const A* gates = nullptr;
    A* grad = nullptr;
    aia::cpu::NormsBackward<A> norms(d, numbers<A>(norm), mutable_numbers<A>(sums));
    norms.reduce(0, d.B, numbers<A>(grad_gate), numbers<A>(z), gates, grad, Shared{});
    norms.finish();
  });
  return sums;
}

std::tuple<Tensor, std::vector<Tensor>, Tensor> gate_backward(const Tensor& grad_gate, const Tensor& z,
                                                              const Tensor& norm, std::optional<Tensor> sums,
                                                              const Tensor& statistics, const Tensor& pooled,
                                                              std::vector<Tensor> weight, std::vector<int64_t> dims) {
  if (!sums) sums = gate_backward_reduce(grad_gate, z, norm, dims);
  const PackedDims d = aia::dims_of_gradient(grad_gate, z, norm, sums, statistics, pooled, dims);
  const Gates gates = aia::weights_of(weight, d.n, z);
  Tensor grad_pooled = output_like(pooled);
  Tensor grad_affine = torch::stable::new_empty(weight[0], {d.n, 2});
  std::vector<Tensor> grad_weight;
  for (const Tensor& w : weight) grad_weight.push_back(torch::stable::empty_like(w));
  const Gates grads = aia::weights_of(grad_weight, d.n, z);
  const aia::Parameter affine = aia::parameter_of(grad_affine, z, "grad_affine");
  with_type(z, [&](auto zero) {
    using A = decltype(zero);
    const A* of_norm = numbers<A>(*sums);
    for (int i = 0; i < 2 * d.n; ++i) aia::write(affine, i, of_norm[i]);
    aia::cpu::ConvolutionsBackward<A> convolutions(
        d, gates, {numbers<A>(pooled), numbers<A>(norm), numbers<A>(statistics)}, of_norm);
    convolutions.convolve(0, d.B, numbers<A>(grad_gate), true, numbers<A>(z), mutable_numbers<A>(grad_pooled),
                          Shared{});
    convolutions.finish(grads);
  });
  return {grad_pooled, grad_weight, grad_affine};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CPU, m) {
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
  m.impl("move_statistics_", TORCH_BOX(&aia::cpu::move_statistics));
}
