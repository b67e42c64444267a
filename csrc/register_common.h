// Checks of arguments that are the same on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>
#include <vector>

#include "common/packed.h"

namespace aia {

inline Scalar scalar_of(const torch::stable::Tensor& x, const char* name = "x") {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return Scalar::kFloat32;
    case ScalarType::Double: return Scalar::kFloat64;
    case ScalarType::BFloat16: return Scalar::kBFloat16;
    case ScalarType::Half: return Scalar::kFloat16;
    default: STD_TORCH_CHECK(false, name, " must be float16, bfloat16, float32 or float64");
  }
}

// The accumulation type of x.
inline torch::headeronly::ScalarType accumulate_type(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_same(const torch::stable::Tensor& a, const torch::stable::Tensor& b, const char* names) {
  bool same = a.dim() == b.dim() && a.scalar_type() == b.scalar_type();
  for (int64_t i = 0; same && i < a.dim(); ++i)
    same = a.size(i) == b.size(i) && (a.size(i) == 1 || a.stride(i) == b.stride(i));
  STD_TORCH_CHECK(same, names, " must agree in shape, strides and dtype");
}

inline void check_context(int64_t context, const char* name) {
  STD_TORCH_CHECK(context == kChannel || context == kSpacetime, name, " must be 1 (channel) or 3 (spacetime), got ",
                  context);
}

// The smallest integer type that holds an index along an axis of this length (maps.index_dtype).
inline torch::headeronly::ScalarType index_type(int64_t longest) {
  using torch::headeronly::ScalarType;
  return longest <= 256 ? ScalarType::Byte : longest <= 32768 ? ScalarType::Short : ScalarType::Int;
}

// The maps that dims describe, as they lie in a packed tensor.
inline PackedDims dims_of(const std::vector<int64_t>& dims, const torch::stable::Tensor& map, const char* name) {
  using torch::headeronly::ScalarType;
  const size_t n = dims.size() / 3;
  STD_TORCH_CHECK((n == 1 || n == 3) && dims.size() == 3 * n,
                  "dims must hold three lengths for each of 1 or 3 maps, got ", dims.size(), " numbers");
  STD_TORCH_CHECK(map.dim() >= 2, name, " must be a packed map, got ", map.dim(), " axes");
  PackedDims packed{map.size(0), static_cast<int>(n), {}};
  for (size_t i = 0; i < dims.size(); ++i) packed.dims[i / 3][i % 3] = dims[i];
  STD_TORCH_CHECK(map.is_contiguous() && map.size(map.dim() - 1) == packed.packed() && map.numel() > 0, name,
                  " must be contiguous, not empty, and as long as dims say");
  STD_TORCH_CHECK(map.scalar_type() == ScalarType::Float || map.scalar_type() == ScalarType::Double, name,
                  " must be float32 or float64, as packed maps are");
  return packed;
}

// `per_map` numbers for each of n maps, in the type of the maps.
inline void check_parameters(const torch::stable::Tensor& parameters, const torch::stable::Tensor& map, int64_t n,
                             int64_t per_map, const char* name) {
  STD_TORCH_CHECK(
      parameters.is_contiguous() && parameters.numel() == n * per_map && parameters.scalar_type() == map.scalar_type(),
      name, " must be contiguous, of the type of the maps, with ", per_map, " values for each map");
}

inline Parameter parameter_of(const torch::stable::Tensor& t, const char* name) {
  return {const_cast<void*>(t.const_data_ptr()), scalar_of(t, name)};
}

// The weights of n gates, each [1, 2, 3, 3, 3] with any strides.
inline std::array<GateParameters, 3> weights_of(const std::vector<torch::stable::Tensor>& weight, int n) {
  STD_TORCH_CHECK(static_cast<int>(weight.size()) == n, "weight must hold a tensor for each of ", n, " maps, got ",
                  weight.size());
  std::array<GateParameters, 3> gates{};
  for (int i = 0; i < n; ++i) {
    const torch::stable::Tensor& w = weight[i];
    bool fits = w.dim() == 5 && w.size(0) == 1 && w.size(1) == 2;
    for (int axis = 2; fits && axis < 5; ++axis) fits = w.size(axis) == 3;
    STD_TORCH_CHECK(fits, "each weight must be [1, 2, 3, 3, 3]");
    gates[i].weight = parameter_of(w, "weight");
    for (int axis = 0; axis < 4; ++axis) gates[i].stride[axis] = w.stride(axis + 1);
  }
  return gates;
}

// Running statistics of BNs, [C], their numbers of batches, if any, and new statistics [C, 3].
inline void check_running(const std::vector<torch::stable::Tensor>& mean, const std::vector<torch::stable::Tensor>& var,
                          const std::vector<torch::stable::Tensor>& tracked,
                          const std::vector<torch::stable::Tensor>& statistics) {
  STD_TORCH_CHECK(mean.size() == var.size() && mean.size() == statistics.size(),
                  "mean, var and statistics must hold a tensor for each BN");
  for (size_t i = 0; i < mean.size(); ++i) {
    const torch::stable::Tensor& latest = statistics[i];
    const bool fits = mean[i].is_contiguous() && var[i].is_contiguous() && latest.is_contiguous() &&
                      var[i].numel() == mean[i].numel() && latest.numel() == 3 * mean[i].numel();
    STD_TORCH_CHECK(fits, "running statistics must be [C] and the new ones [C, 3], all contiguous");
    STD_TORCH_CHECK(
        latest.scalar_type() == accumulate_type(latest) && latest.scalar_type() == statistics[0].scalar_type(),
        "statistics must be of one type, float32 or float64");
  }
  for (const torch::stable::Tensor& number : tracked)
    STD_TORCH_CHECK(number.numel() == 1 && number.scalar_type() == torch::headeronly::ScalarType::Long,
                    "a number of batches must be one int64");
}

// Adds what n gates are normalised by: lists of n numbers, which may be absent.
inline void add_norms(std::array<GateParameters, 3>& gates, int n,
                      const std::vector<std::optional<torch::stable::Tensor>>& scale,
                      const std::vector<std::optional<torch::stable::Tensor>>& shift,
                      const std::vector<std::optional<torch::stable::Tensor>>& mean,
                      const std::vector<std::optional<torch::stable::Tensor>>& var, const std::vector<double>& eps,
                      const std::vector<bool>& batch) {
  const auto number = [&](const auto& list, int i, const char* name) -> Parameter {
    STD_TORCH_CHECK(static_cast<int>(list.size()) == n, name, " must hold an entry for each of ", n, " maps");
    if (!list[i]) return {};
    STD_TORCH_CHECK(list[i]->numel() == 1, name, " must hold one number for each map");
    return parameter_of(*list[i], name);
  };
  STD_TORCH_CHECK(static_cast<int>(eps.size()) == n && static_cast<int>(batch.size()) == n,
                  "eps and batch must hold an entry for each of ", n, " maps");
  for (int i = 0; i < n; ++i) {
    gates[i].scale = number(scale, i, "scale"), gates[i].shift = number(shift, i, "shift");
    gates[i].mean = number(mean, i, "mean"), gates[i].var = number(var, i, "var");
    gates[i].eps = eps[i], gates[i].batch = batch[i];
  }
}

}  // namespace aia
