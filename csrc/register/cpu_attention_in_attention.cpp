// The CPU implementations of the operators of Attention in Attention that aia_kernels/schemas.py defines: checks,
// allocation, choice of the instruction level, and the split over threads. The work itself is in cpu/.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/moments.h"
#include "cpu.h"
#include "cpu_gates.h"
#include "cpu_products.h"
#include "cpu_running_statistics.h"

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
using aia::kNone;
using aia::kSpacetime;
using aia::Moments;
using aia::Numbers;
using aia::PackedDims;
using aia::Unpooled;
using aia::unpooled_of;
using aia::cpu::contiguous_weights;
using aia::cpu::gate_units;
using aia::cpu::GatePasses;
using aia::cpu::output_like;
using aia::cpu::parallel;
using aia::cpu::passes;
using aia::cpu::PoolPasses;
using aia::cpu::RecalibratePasses;
using aia::cpu::Volume;
using aia::cpu::volume_of;
using aia::cpu::with_large_pages;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A packed map [B, M] or [B, 2, M] of a context of x.
Tensor new_map(const Tensor& x, std::vector<int64_t> lead, const Activation& a, int64_t context, ScalarType type) {
  lead.push_back(a.packed(context));
  return with_large_pages(torch::stable::new_empty(x, lead, type));
}

std::tuple<Tensor, Tensor> pool(const Tensor& x, int64_t context, std::optional<Tensor> gate, int64_t gate_context) {
  const Activation a = activation_of(x, "x");
  check_context(context, "context");
  const Gate inner = gate_of(gate, gate_context, "gate_context", a, x, "gate");
  const PoolPasses& pass = passes<PoolPasses>(a.scalar);
  const Volume v = volume_of(a, pass.lanes);
  Tensor pooled = new_map(x, {a.B, 2}, a, context, accumulate_type(x));
  Tensor argmax = new_map(x, {a.B}, a, context, index_type(a, context));
  const auto index_bytes = static_cast<int>(argmax.element_size());
  const void* data = x.const_data_ptr();
  void *out = pooled.mutable_data_ptr(), *arg = argmax.mutable_data_ptr();
  parallel(aia::cpu::reduction_units(v, static_cast<int>(context)), [&](int64_t begin, int64_t end) {
    pass.pool(v, data, inner, static_cast<int>(context), out, arg, index_bytes, begin, end);
  });
  return {pooled, argmax};
}

Tensor unpool(const Tensor& grad_y, const Tensor& gate, const Tensor& grad_pooled, const Tensor& argmax,
              int64_t context, std::optional<Tensor> inner_gate, int64_t inner_gate_context,
              std::optional<Tensor> inner_grad_pooled, std::optional<Tensor> inner_argmax, int64_t inner_context) {
  const aia::UnpoolArguments given(grad_y, gate, grad_pooled, argmax, context, inner_gate, inner_gate_context,
                                   inner_grad_pooled, inner_argmax, inner_context);
  const PoolPasses& pass = passes<PoolPasses>(given.grad_y.scalar);
  const Volume v = volume_of(given.grad_y, pass.lanes);
  Tensor grad_x = output_like(grad_y);
  const void* data = grad_y.const_data_ptr();
  void* out = grad_x.mutable_data_ptr();
  const int highest =
      std::max({given.gate.context, given.outer.context, given.inner_gate.context, given.inner.context});
  parallel(aia::cpu::elementwise_units(v, highest), [&](int64_t begin, int64_t end) {
    pass.unpool(v, data, given.gate, given.outer, given.inner_gate, given.inner, out, begin, end);
  });
  return grad_x;
}

Tensor unpool_reduce(const Tensor& x, const Tensor& grad_pooled, const Tensor& argmax, int64_t context,
                     int64_t gate_context) {
  const Activation a = activation_of(x, "x");
  const Unpooled from = unpooled_of(grad_pooled, argmax, context, "context", a, x, "grad_pooled", "argmax");
  check_context(gate_context, "gate_context");
  const PoolPasses& pass = passes<PoolPasses>(a.scalar);
  const Volume v = volume_of(a, pass.lanes);
  Tensor grad_gate = new_map(x, {a.B}, a, gate_context, accumulate_type(x));
  const void* data = x.const_data_ptr();
  void* out = grad_gate.mutable_data_ptr();
  parallel(aia::cpu::reduction_units(v, static_cast<int>(gate_context)), [&](int64_t begin, int64_t end) {
    pass.unpool_reduce(v, data, from, static_cast<int>(gate_context), out, begin, end);
  });
  return grad_gate;
}

Tensor recalibrate(const Tensor& x, const Tensor& gate, int64_t context) {
  const Activation a = activation_of(x, "x");
  const Gate outer = gate_of(gate, context, "context", a, x, "gate");
  const RecalibratePasses& pass = passes<RecalibratePasses>(a.scalar);
  const Volume v = volume_of(a, pass.lanes);
  Tensor y = output_like(x);
  const void* data = x.const_data_ptr();
  void* out = y.mutable_data_ptr();
  parallel(aia::cpu::elementwise_units(v, outer.context),
           [&](int64_t begin, int64_t end) { pass.recalibrate(v, data, outer, out, begin, end); });
  return y;
}

Tensor recalibrate_reduce(const Tensor& grad_y, const Tensor& x, int64_t context) {
  const Activation a = activation_of(x, "x");
  check_same(grad_y, x, "grad_y", "x");
  check_context(context, "context");
  const RecalibratePasses& pass = passes<RecalibratePasses>(a.scalar);
  const Volume v = volume_of(a, pass.lanes);
  Tensor grad_gate = new_map(x, {a.B}, a, context, accumulate_type(x));
  const void *data = x.const_data_ptr(), *grad = grad_y.const_data_ptr();
  void* out = grad_gate.mutable_data_ptr();
  const auto to = static_cast<int>(context);
  parallel(aia::cpu::reduction_units(v, to),
           [&](int64_t begin, int64_t end) { pass.recalibrate_reduce(v, grad, data, to, out, begin, end); });
  return grad_gate;
}

// Calls body with a value of the type of the maps.
template <class Body>
void with_map_type(const Tensor& map, Body&& body) {
  return map.scalar_type() == ScalarType::Double ? body(double{}) : body(float{});
}

template <class A>
const A* data(const Tensor& t) {
  return static_cast<const A*>(t.const_data_ptr());
}
template <class A>
A* mutable_data(Tensor& t) {
  return static_cast<A*>(t.mutable_data_ptr());
}

// Calls add(map, values) for the partial results of every unit, in a fixed order.
template <class Add>
void for_partials(const PackedDims& d, const std::vector<double>& partial, int per_unit, Add&& add) {
  const double* values = partial.data();
  for (int map = 0; map < d.n; ++map)
    for (int64_t i = 0; i < d.B * aia::cpu::map_units(d, map); ++i, values += per_unit) add(map, values);
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
  with_map_type(pooled, [&](auto type) {
    using A = decltype(type);
    const std::vector<A> w = contiguous_weights<A>(gates, d.n);
    const A* in = data<A>(pooled);
    A *out = mutable_data<A>(gate), *bn = mutable_data<A>(norm), *found = mutable_data<A>(statistics);
    Moments total[3] = {Moments::none(), Moments::none(), Moments::none()};
    const bool of_batch = std::any_of(batch.begin(), batch.end(), [](bool used) { return used; });
    if (of_batch) {
      std::vector<double> partial(gate_units(d) * aia::cpu::kMomentPartials);
      parallel(gate_units(d), [&](int64_t begin, int64_t end) {
        passes<GatePasses<A>>().conv(d, in, w.data(), out, partial.data(), begin, end);
      });
      for_partials(d, partial, aia::cpu::kMomentPartials,
                   [&](int map, const double* p) { total[map].merge({p[0], p[1], p[2]}); });
    }
    for (int i = 0; i < d.n; ++i)
      aia::finish_norm(gates[i], total[i].mean, total[i].squares / total[i].count, total[i].count, bn + 4 * i,
                       found + 3 * i);
    parallel(gate_units(d), [&](int64_t begin, int64_t end) {
      if (of_batch)
        passes<GatePasses<A>>().activate(d, out, bn, out, begin, end);
      else
        passes<GatePasses<A>>().conv_activate(d, in, w.data(), bn, out, out, begin, end);
    });
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
  with_map_type(pooled, [&](auto type) {
    using A = decltype(type);
    const std::vector<A> w = contiguous_weights<A>(gates, d.n);
    const A *in = data<A>(pooled), *bn = data<A>(norm);
    A *out = mutable_data<A>(gate), *before = mutable_data<A>(z);
    parallel(gate_units(d), [&](int64_t begin, int64_t end) {
      passes<GatePasses<A>>().conv_activate(d, in, w.data(), bn, before, out, begin, end);
    });
  });
  return {gate, z};
}

// Gradients of the shift and the scale of each gate, [n, 2]. Where the gates of z are known, the gradient of the
// sigmoids' arguments is written to grad, which may be grad_gate.
Tensor sums_of(const Tensor& grad_gate, const Tensor& z, const Tensor* gate, const Tensor& norm,
               const std::vector<int64_t>& dims, Tensor* grad) {
  const PackedDims d = aia::dims_of_gradient(grad_gate, z, norm, dims);
  Tensor sums = torch::stable::new_empty(z, {d.n, 2});
  with_map_type(z, [&](auto type) {
    using A = decltype(type);
    const A *given = data<A>(grad_gate), *in = data<A>(z), *bn = data<A>(norm);
    const A* known = gate ? data<A>(*gate) : nullptr;
    A *out = grad ? mutable_data<A>(*grad) : nullptr, *of_n = mutable_data<A>(sums);
    std::vector<double> partial(gate_units(d) * aia::cpu::kNormPartials);
    parallel(gate_units(d), [&](int64_t begin, int64_t end) {
      passes<GatePasses<A>>().backward_reduce(d, given, in, known, bn, out, partial.data(), begin, end);
    });
    double total[3][2] = {};
    for_partials(d, partial, aia::cpu::kNormPartials,
                 [&](int map, const double* p) { total[map][0] += p[0], total[map][1] += p[1]; });
    for (int i = 0; i < 2 * d.n; ++i) of_n[i] = static_cast<A>(total[i / 2][i % 2]);
  });
  return sums;
}

Tensor gate_backward_reduce(const Tensor& grad_gate, const Tensor& z, const Tensor& norm, std::vector<int64_t> dims) {
  return sums_of(grad_gate, z, nullptr, norm, dims, nullptr);
}

// gate_backward behind its sums, from the gradient of the gates (of_gate) or from that of the sigmoids' arguments.
std::tuple<Tensor, std::vector<Tensor>, Tensor> back_through_convolution(
    const Tensor& grad, bool of_gate, const Tensor& z, const Tensor& norm, const Tensor& sums, const Tensor& statistics,
    const Tensor& pooled, const std::vector<Tensor>& weight, const std::vector<int64_t>& dims) {
  const PackedDims d = aia::dims_of_gradient(grad, z, norm, sums, statistics, pooled, dims);
  const Gates gates = aia::weights_of(weight, d.n, z);
  Tensor grad_pooled = output_like(pooled);
  Tensor grad_affine = torch::stable::new_empty(weight[0], {d.n, 2});
  std::vector<Tensor> grad_weight;
  for (const Tensor& w : weight) grad_weight.push_back(torch::stable::empty_like(w));
  const Gates grads = aia::weights_of(grad_weight, d.n, z);
  const aia::Parameter affine = aia::parameter_of(grad_affine, z, "grad_affine");
  with_map_type(z, [&](auto type) {
    using A = decltype(type);
    const A *given = data<A>(grad), *in = data<A>(z), *bn = data<A>(norm), *features = data<A>(pooled);
    A mean[6];
    for (int i = 0; i < 2 * d.n; ++i) {
      mean[i] = aia::mean_of(data<A>(sums)[i], data<A>(statistics)[i / 2 * 3 + 2]);
      aia::write(affine, i, data<A>(sums)[i]);
    }
    const std::vector<A> w = contiguous_weights<A>(gates, d.n);
    A* out = mutable_data<A>(grad_pooled);
    std::vector<double> partial(gate_units(d) * aia::cpu::kWeightPartials);
    parallel(gate_units(d), [&](int64_t begin, int64_t end) {
      passes<GatePasses<A>>().backward(d, given, of_gate, in, bn, mean, features, w.data(), out, partial.data(), begin,
                                       end);
    });
    double total[3][54] = {};
    for_partials(d, partial, aia::cpu::kWeightPartials, [&](int map, const double* p) {
      for (int i = 0; i < 54; ++i) total[map][i] += p[i];
    });
    for (int i = 0; i < d.n * 54; ++i) {
      const aia::GateParameters& grad_of = grads[i / 54];
      aia::write(grad_of.weight, aia::tap_offset(grad_of, i / 27 % 2, i % 27), total[i / 54][i % 54]);
    }
  });
  return {grad_pooled, grad_weight, grad_affine};
}

std::tuple<Tensor, std::vector<Tensor>, Tensor> gate_backward(const Tensor& grad_gate, const Tensor& z,
                                                              const Tensor& norm, std::optional<Tensor> sums,
                                                              const Tensor& statistics, const Tensor& pooled,
                                                              std::vector<Tensor> weight, std::vector<int64_t> dims) {
  if (!sums) sums = sums_of(grad_gate, z, nullptr, norm, dims, nullptr);
  return back_through_convolution(grad_gate, true, z, norm, *sums, statistics, pooled, weight, dims);
}

// Where the gates of a context of a unit begin in its lists: that over C comes first, where there is one.
int64_t first_of(int64_t context, int64_t other) { return context == kSpacetime && other != kNone ? 1 : 0; }

template <class List>
List of_context(const List& list, int64_t context, int64_t other) {
  const auto first = list.begin() + first_of(context, other);
  return List(first, first + context);  // a context is the number of its gates
}

// The lengths of the maps of a context of x, three each, as the gate passes take them.
std::vector<int64_t> lengths_of(const Activation& x, int64_t context) {
  const PackedDims maps = aia::cpu::maps_of(volume_of(x), static_cast<int>(context));
  std::vector<int64_t> lengths;
  for (int i = 0; i < maps.n; ++i) lengths.insert(lengths.end(), maps.dims[i], maps.dims[i] + 3);
  return lengths;
}

std::vector<Tensor> propagate(const Tensor& x, std::vector<Tensor> weight, Numbers scale, Numbers shift, Numbers mean,
                              Numbers var, std::vector<double> eps, std::vector<bool> batch, int64_t inner,
                              int64_t outer) {
  aia::check_unit(inner, outer,
                  {weight.size(), scale.size(), shift.size(), mean.size(), var.size(), eps.size(), batch.size()});
  const Activation a = activation_of(x, "x");
  std::vector<Tensor> results;
  const auto gates_of = [&](int64_t context, int64_t other, const std::optional<Tensor>& guide, int64_t guide_context) {
    const auto own = [&](const auto& list) { return of_context(list, context, other); };
    const auto [pooled, argmax] = pool(x, context, guide, guide_context);
    const auto [gates, norm, statistics] = gate(pooled, own(weight), own(scale), own(shift), own(mean), own(var),
                                                own(eps), own(batch), lengths_of(a, context));
    results.insert(results.end(), {pooled, argmax, norm, statistics});
    return gates;
  };
  std::optional<Tensor> guide;
  if (inner) guide = gates_of(inner, outer, std::nullopt, kNone);
  const Tensor recalibration = gates_of(outer, inner, guide, inner);
  results.insert(results.begin(), recalibrate(x, recalibration, outer));
  return results;
}

std::vector<Tensor> propagate_back(const Tensor& grad_y, const Tensor& x, std::vector<Tensor> weight,
                                   std::vector<Tensor> kept, int64_t inner, int64_t outer, bool needs_x) {
  aia::check_unit(inner, outer, {weight.size()});
  const size_t n = weight.size(), contexts = inner ? 2 : 1;
  AIA_CHECK(kept.size() == 4 * contexts, "kept must hold four tensors for each of ", contexts, " contexts, got ",
            kept.size());
  const Activation a = activation_of(x, "x");
  check_same(grad_y, x, "grad_y", "x");
  std::vector<Tensor> results(n + contexts);
  // Of one context and what it keeps: its gates again, and the gradient of its pooled features from that of its gates.
  const auto through = [&](int64_t context, int64_t other, const Tensor* of, const auto& gradient_of_gates) {
    const std::vector<Tensor> own = of_context(weight, context, other);
    const std::vector<int64_t> lengths = lengths_of(a, context);
    const auto [gates, z] = gate_again(of[0], own, of[2], lengths);
    Tensor grad = gradient_of_gates();
    const Tensor sums = sums_of(grad, z, &gates, of[2], lengths, &grad);
    auto [grad_pooled, grad_weight, grad_affine] =
        back_through_convolution(grad, false, z, of[2], sums, of[3], of[0], own, lengths);
    const int64_t first = first_of(context, other);
    std::copy(grad_weight.begin(), grad_weight.end(), results.begin() + first);
    results[n + (first ? 1 : 0)] = grad_affine;
    return std::pair{gates, grad_pooled};
  };
  const Tensor* of_outer = kept.data() + (inner ? 4 : 0);
  const auto [recalibration, grad_outer] =
      through(outer, inner, of_outer, [&] { return recalibrate_reduce(grad_y, x, outer); });
  std::optional<Tensor> guide, grad_inner, inner_argmax;
  if (inner) {
    std::tie(guide, grad_inner) =
        through(inner, outer, kept.data(), [&] { return unpool_reduce(x, grad_outer, of_outer[1], outer, inner); });
    inner_argmax = kept[1];
  }
  if (needs_x)
    results.push_back(
        unpool(grad_y, recalibration, grad_outer, of_outer[1], outer, guide, inner, grad_inner, inner_argmax, inner));
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CPU, m) {
  m.impl("pool", TORCH_BOX(&pool));
  m.impl("unpool", TORCH_BOX(&unpool));
  m.impl("unpool_reduce", TORCH_BOX(&unpool_reduce));
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("gate_again", TORCH_BOX(&gate_again));
  m.impl("gate_backward_reduce", TORCH_BOX(&gate_backward_reduce));
  m.impl("gate_backward", TORCH_BOX(&gate_backward));
  m.impl("recalibrate", TORCH_BOX(&recalibrate));
  m.impl("recalibrate_reduce", TORCH_BOX(&recalibrate_reduce));
  m.impl("propagate", TORCH_BOX(&propagate));
  m.impl("propagate_back", TORCH_BOX(&propagate_back));
  m.impl("move_statistics_", TORCH_BOX(&aia::cpu::move_statistics));
}
