// What the operators of Attention in Attention check of their arguments, the same on every device.
#pragma once

#include <array>

#include "checks.h"

namespace aia {

using Numbers = std::vector<std::optional<Tensor>>;
using Gates = std::array<GateParameters, 3>;

inline void check_context(int64_t context, const char* name) {
  AIA_CHECK(context == kChannel || context == kSpacetime, name, " must be 1 (channel) or 3 (spacetime), got ", context);
}

// The type of an index along the pooled axes of a context: the smallest that holds it (maps.index_dtype).
inline ScalarType index_type(const Activation& x, int64_t context) {
  const int64_t longest = context == kChannel ? x.C : std::max({x.T, x.H, x.W});
  return longest <= 256 ? ScalarType::Byte : longest <= 32768 ? ScalarType::Short : ScalarType::Int;
}

// A gate [B, M] for the activation `of`, which is a; one that is absent has context 0.
inline Gate gate_of(const std::optional<Tensor>& gate, int64_t context, const char* context_name, const Activation& a,
                    const Tensor& of, const char* name) {
  if (!gate) {
    AIA_CHECK(context == kNone, context_name, " must be 0, as there is no ", name, ", got ", context);
    return {nullptr, kNone};
  }
  check_context(context, context_name);
  check_contiguous(*gate, {a.B, a.packed(context)}, accumulate_type(of), of, name);
  return {gate->const_data_ptr(), static_cast<int>(context)};
}

// A gradient of pooled features [B, 2, M] and the index of the maximum [B, M]; where both are absent the context is 0.
inline Unpooled unpooled_of(const std::optional<Tensor>& grad, const std::optional<Tensor>& argmax, int64_t context,
                            const char* context_name, const Activation& a, const Tensor& of, const char* grad_name,
                            const char* argmax_name) {
  AIA_CHECK(grad.has_value() == argmax.has_value(), grad_name, " and ", argmax_name, " must come together");
  if (!grad) {
    AIA_CHECK(context == kNone, context_name, " must be 0, as there is no ", grad_name, ", got ", context);
    return {nullptr, nullptr, 1, kNone};
  }
  check_context(context, context_name);
  check_contiguous(*grad, {a.B, 2, a.packed(context)}, accumulate_type(of), of, grad_name);
  check_contiguous(*argmax, {a.B, a.packed(context)}, index_type(a, context), of, argmax_name);
  return {grad->const_data_ptr(), argmax->const_data_ptr(), static_cast<int>(argmax->element_size()),
          static_cast<int>(context)};
}

// The arguments of unpool.
struct UnpoolArguments {
  Activation grad_y;
  Gate gate;
  Unpooled outer;
  Gate inner_gate;
  Unpooled inner;

  UnpoolArguments(const Tensor& grad, const Tensor& outer_gate, const Tensor& grad_pooled, const Tensor& argmax,
                  int64_t context, const std::optional<Tensor>& guide, int64_t guide_context,
                  const std::optional<Tensor>& inner_grad_pooled, const std::optional<Tensor>& inner_argmax,
                  int64_t inner_context)
      : grad_y(activation_of(grad, "grad_y")),
        gate(gate_of(outer_gate, context, "context", grad_y, grad, "gate")),
        outer(unpooled_of(grad_pooled, argmax, context, "context", grad_y, grad, "grad_pooled", "argmax")),
        inner_gate(gate_of(guide, guide_context, "inner_gate_context", grad_y, grad, "inner_gate")),
        inner(unpooled_of(inner_grad_pooled, inner_argmax, inner_context, "inner_context", grad_y, grad,
                          "inner_grad_pooled", "inner_argmax")) {}
};

// The maps that dims describe in a packed [B, M] or, with features, [B, 2, M], which is not empty.
inline PackedDims dims_of(const std::vector<int64_t>& dims, const Tensor& map, bool features, const char* name) {
  check_operand(map, map, name);
  const size_t n = dims.size() / 3;
  AIA_CHECK((n == 1 || n == 3) && dims.size() == 3 * n, "dims must hold three lengths for each of 1 or 3 maps, got ",
            dims.size(), " numbers");
  const auto type = map.scalar_type();
  AIA_CHECK(type == ScalarType::Float || type == ScalarType::Double, name,
            " must be float32 or float64, as packed maps are, got ", name_of(type));
  AIA_CHECK(map.dim() == (features ? 3 : 2) && map.size(0) > 0, name, " must be a packed ",
            features ? "[B, 2, M]" : "[B, M]", " with B > 0, got ", described(map));
  PackedDims packed{map.size(0), static_cast<int>(n), {}};
  int64_t total = 0;
  for (size_t i = 0; i < n; ++i) {
    int64_t product = 1;
    bool fits = true;
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t length = packed.dims[i][axis] = dims[3 * i + axis];
      fits = fits && length > 0 && !__builtin_mul_overflow(product, length, &product);
    }
    AIA_CHECK(fits && !__builtin_add_overflow(total, product, &total), "dims must be positive lengths of maps of ",
              "fewer than 2^63 elements, got ", listed(dims));
  }
  AIA_CHECK(total == map.size(map.dim() - 1), "dims must make up the ", map.size(map.dim() - 1), " elements of ", name,
            ", got ", listed(dims));
  if (features)
    check_contiguous(map, {packed.B, 2, total}, type, map, name);
  else
    check_contiguous(map, {packed.B, total}, type, map, name);
  return packed;
}

// The activation that a map belongs to, from the lengths T, C, H, W and the place of an order in maps.ORDERS. The map
// is packed over T, H and W or, if averaged, has the elements of one over C.
inline Activation averaged_of(const Tensor& map, const std::vector<int64_t>& sizes, int64_t order, bool averaged,
                              const char* name) {
  check_operand(map, map, name);
  AIA_CHECK(map.dim() == 2 && map.size(0) > 0, name, " must be [B, M] with B > 0, got ", described(map));
  const auto type = map.scalar_type();
  AIA_CHECK(type == ScalarType::Float || type == ScalarType::Double, name,
            " must be float32 or float64, as packed maps are, got ", name_of(type));
  AIA_CHECK(0 <= order && order < 3, "order must be a place in maps.ORDERS, got ", order);
  bool fits = sizes.size() == 4;
  for (const int64_t size : sizes) fits = fits && 0 < size && size < int64_t{1} << 20;
  AIA_CHECK(fits, "sizes must be lengths of T, C, H and W from 1 to below 2^20, got ", listed(sizes));
  const Activation a{map.size(0),         sizes[0], sizes[1], sizes[2], sizes[3], static_cast<Order>(order),
                     scalar_of(map, name)};
  check_contiguous(map, {a.B, a.packed(averaged ? kChannel : kSpacetime)}, type, map, name);
  return a;
}

// A number of any type of the framework that a kernel reads (scalar_of).
inline Parameter parameter_of(const Tensor& t, const Tensor& first, const char* name, bool written = false) {
  check_operand(t, first, name);
  const Scalar scalar = scalar_of(t, name);
  return {written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr()), scalar};
}

// The weight [1, 2, 3, 3, 3] of a gate, with any strides.
inline void set_weight(GateParameters& gate, const Tensor& w, const Tensor& first) {
  gate.weight = parameter_of(w, first, "weight");
  constexpr int64_t kSizes[] = {1, 2, 3, 3, 3};
  const Layout at(w);
  AIA_CHECK(std::equal(at.sizes, at.sizes + at.dim, kSizes, kSizes + 5), "each weight must be [1, 2, 3, 3, 3], got ",
            described(w));
  std::copy(at.strides + 1, at.strides + 5, gate.stride);
}

// The weights of n gates.
inline Gates weights_of(const std::vector<Tensor>& weight, int n, const Tensor& first) {
  AIA_CHECK(weight.size() == static_cast<size_t>(n), "weight must hold a tensor for each of ", n, " maps, got ",
            weight.size());
  Gates gates{};
  for (int i = 0; i < n; ++i) set_weight(gates[i], weight[i], first);
  return gates;
}

// A number that may be absent.
inline Parameter number_of(const std::optional<Tensor>& number, const Tensor& first, const char* name) {
  if (!number) return {};
  const Parameter found = parameter_of(*number, first, name);
  AIA_CHECK(number->numel() == 1, name, " must hold one number for each map, got ", described(*number));
  return found;
}

// What a gate is normalized by.
inline void set_norm(GateParameters& gate, const Tensor& first, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& shift, const std::optional<Tensor>& mean,
                     const std::optional<Tensor>& var, double eps, bool batch) {
  check_eps(eps);
  gate.scale = number_of(scale, first, "scale"), gate.shift = number_of(shift, first, "shift");
  gate.mean = number_of(mean, first, "mean"), gate.var = number_of(var, first, "var");
  gate.eps = eps, gate.batch = batch;
}

// Adds what n gates are normalized by: lists of n numbers.
inline void add_norms(Gates& gates, int n, const Numbers& scale, const Numbers& shift, const Numbers& mean,
                      const Numbers& var, const std::vector<double>& eps, const std::vector<bool>& batch,
                      const Tensor& first) {
  const auto check_length = [n](size_t length, const char* name) {
    AIA_CHECK(length == static_cast<size_t>(n), name, " must hold an entry for each of ", n, " maps, got ", length);
  };
  const auto number = [&](const Numbers& list, int i, const char* name) -> Parameter {
    check_length(list.size(), name);
    return number_of(list[i], first, name);
  };
  check_length(eps.size(), "eps");
  check_length(batch.size(), "batch");
  for (int i = 0; i < n; ++i) {
    check_eps(eps[i]);
    gates[i].scale = number(scale, i, "scale"), gates[i].shift = number(shift, i, "shift");
    gates[i].mean = number(mean, i, "mean"), gates[i].var = number(var, i, "var");
    gates[i].eps = eps[i], gates[i].batch = batch[i];
  }
}

// The contexts of a whole unit, and the lengths of the lists that have an entry for each gate.
inline void check_unit(int64_t inner, int64_t outer, std::initializer_list<size_t> sizes) {
  check_context(outer, "outer");
  AIA_CHECK(inner == kNone || inner == kChannel + kSpacetime - outer,
            "inner must be 0 or the context that outer is not, got ", inner, " and ", outer);
  const auto n = static_cast<size_t>(inner + outer);  // a context is the number of its gates
  for (const size_t size : sizes)
    AIA_CHECK(size == n, "every list must hold an entry for each of ", n, " gates, got ", size);
}

// Where the gates of a context of a unit begin in its lists: that over C comes first, where there is one.
inline int first_of(int64_t context, int64_t other) { return context == kSpacetime && other != kNone ? 1 : 0; }

// The gates of the contexts of a whole unit, from the arguments of evaluate or, with batch, of propagate.
struct UnitArguments {
  Gates inner, outer;

  UnitArguments(const Tensor& x, const std::vector<Tensor>& weight, const Numbers& scale, const Numbers& shift,
                const Numbers& mean, const Numbers& var, const std::vector<double>& eps, int64_t inner_context,
                int64_t outer_context, const std::optional<std::vector<bool>>& batch_of = std::nullopt) {
    const std::vector<bool> batch = batch_of.value_or(std::vector<bool>(weight.size()));
    check_unit(inner_context, outer_context,
               {weight.size(), scale.size(), shift.size(), mean.size(), var.size(), eps.size(), batch.size()});
    const auto gates_of = [&](int64_t context, int64_t other) {
      const int first = first_of(context, other), count = static_cast<int>(context);
      const auto some = [&](const auto& list) {
        return std::decay_t<decltype(list)>(list.begin() + first, list.begin() + first + count);
      };
      Gates found = weights_of(some(weight), count, x);
      add_norms(found, count, some(scale), some(shift), some(mean), some(var), some(eps), some(batch), x);
      return found;
    };
    inner = gates_of(inner_context, outer_context), outer = gates_of(outer_context, inner_context);
  }
};

// The maps of gate_backward_reduce, and those of gate_backward.
inline PackedDims dims_of_gradient(const Tensor& grad_gate, const Tensor& z, const Tensor& norm,
                                   const std::vector<int64_t>& dims) {
  const PackedDims d = dims_of(dims, z, false, "z");
  check_same(grad_gate, z, "grad_gate", "z");
  check_contiguous(norm, {d.n, 4}, z.scalar_type(), z, "norm");
  return d;
}

inline PackedDims dims_of_gradient(const Tensor& grad_gate, const Tensor& z, const Tensor& norm,
                                   const std::optional<Tensor>& sums, const Tensor& statistics, const Tensor& pooled,
                                   const std::vector<int64_t>& dims) {
  const PackedDims d = dims_of_gradient(grad_gate, z, norm, dims);
  if (sums) check_contiguous(*sums, {d.n, 2}, z.scalar_type(), z, "sums");
  check_contiguous(statistics, {d.n, 3}, z.scalar_type(), z, "statistics");
  check_contiguous(pooled, {d.B, 2, d.packed()}, z.scalar_type(), z, "pooled");
  return d;
}

// Running statistics of BNs, [C], their numbers of batches, if any, and new statistics [C, 3]. A BN may stand in the
// lists several times, and then moves as often; else no two of them share memory.
inline void check_running(const std::vector<Tensor>& mean, const std::vector<Tensor>& var,
                          const std::vector<Tensor>& tracked, const std::vector<Tensor>& statistics, double momentum) {
  AIA_CHECK(mean.size() == var.size() && mean.size() == statistics.size(),
            "mean, var and statistics must hold a tensor for each BN, got ", mean.size(), ", ", var.size(), " and ",
            statistics.size());
  AIA_CHECK(std::isfinite(momentum), "momentum must be finite, got ", momentum);
  if (mean.empty() && tracked.empty()) return;
  const Tensor& first = mean.empty() ? tracked[0] : mean[0];
  std::vector<Span> written, read;
  for (size_t i = 0; i < mean.size(); ++i) {
    for (const auto* list : {&mean, &var}) {
      const char* name = list == &mean ? "mean" : "var";
      const Tensor& running = (*list)[i];
      check_operand(running, first, name);
      scalar_of(running, name);
      AIA_CHECK(running.dim() == 1, name, " must hold running statistics [C], got ", described(running));
      check_contiguous(running, {mean[i].size(0)}, running.scalar_type(), first, name);
      written.emplace_back(running, name, true);
    }
    check_operand(statistics[i], first, "statistics");
    check_contiguous(statistics[i], {mean[i].size(0), 3}, accumulate_type(statistics[0]), first, "statistics");
    read.emplace_back(statistics[i], "statistics");
  }
  for (const Tensor& number : tracked) {
    check_operand(number, first, "tracked");
    AIA_CHECK(number.numel() == 1 && number.scalar_type() == ScalarType::Long,
              "tracked must hold numbers of batches, one int64 each, got ", described(number));
    written.emplace_back(number, "tracked", true);
  }
  for (size_t i = 0; i < written.size(); ++i) {
    for (size_t j = 0; j < i; ++j)
      if (written[i].begin != written[j].begin || written[i].end != written[j].end ||
          written[i].name != written[j].name)
        check_apart(written[i], {written[j]});
    for (const Span& other : read) check_apart(written[i], {other});
  }
}

}  // namespace aia
