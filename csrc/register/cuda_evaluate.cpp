// The CUDA implementation of a whole unit with fixed statistics (evaluate of aia_kernels/schemas.py): checks,
// allocation, device and stream. The work itself is in cuda/.
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <vector>

#include "../cuda/evaluate.h"
#include "cuda.h"

namespace {

using aia::GateParameters;
using aia::Numbers;
using aia::cuda::Launch;
using aia::cuda::Shape;
using aia::cuda::UnitGates;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The lists of evaluate, and its first argument.
struct Parameters {
  const Tensor& x;
  const std::vector<Tensor>& weight;
  const Numbers &scale, &shift, &mean, &var;
  const std::vector<double>& eps;

  // Those of `count` gates from `first` on.
  std::array<GateParameters, 3> gates(int first, int count) const {
    const auto some = [&](const auto& list) {
      return std::decay_t<decltype(list)>(list.begin() + first, list.begin() + first + count);
    };
    auto found = aia::weights_of(some(weight), count, x);
    const std::vector<bool> batch(count);
    aia::add_norms(found, count, some(scale), some(shift), some(mean), some(var), some(eps), batch, x);
    return found;
  }
};

Tensor evaluate(const Tensor& x, std::vector<Tensor> weight, Numbers scale, Numbers shift, Numbers mean, Numbers var,
                std::vector<double> eps, int64_t inner, int64_t outer) {
  const Shape s = aia::cuda::shape_of_unit(aia::activation_of(x, "x"), "x");
  aia::check_context(outer, "outer");
  AIA_CHECK(inner == aia::kNone || inner + outer == aia::kChannel + aia::kSpacetime,
            "inner must be 0 or the context that outer is not, got ", inner, " and ", outer);
  const size_t n = static_cast<size_t>(inner + outer);  // the value of a context is the number of its gates
  for (const size_t size : {weight.size(), scale.size(), shift.size(), mean.size(), var.size(), eps.size()})
    AIA_CHECK(size == n, "every list must hold an entry for each of ", n, " gates, got ", size);
  const Parameters parameters{x, weight, scale, shift, mean, var, eps};
  const auto gates_of = [&](int64_t context) {
    const int first = context == aia::kSpacetime && inner != aia::kNone ? 1 : 0;
    return parameters.gates(first, static_cast<int>(context));
  };
  const auto inner_gates = gates_of(inner), outer_gates = gates_of(outer);
  const UnitGates unit{static_cast<int>(inner), static_cast<int>(outer), inner_gates.data(), outer_gates.data()};

  const Launch launch(x);
  Tensor y = aia::new_like(x);
  int cluster = 0;
  launch.check(aia::cuda::cluster_size(s, unit.inner, unit.outer, &cluster));
  if (cluster > 0) {
    launch.check(
        aia::cuda::evaluate_in_clusters(s, x.const_data_ptr(), unit, y.mutable_data_ptr(), cluster, launch.stream()));
    return y;
  }
  const int64_t clips = aia::cuda::clips_in_cache(s);
  Tensor workspace = torch::stable::new_empty(x, {aia::cuda::group_bytes(s, clips)}, ScalarType::Byte);
  launch.check(aia::cuda::evaluate_in_groups(s, x.const_data_ptr(), unit, y.mutable_data_ptr(), clips,
                                             workspace.mutable_data_ptr(), launch.stream()));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CUDA, m) { m.impl("evaluate", TORCH_BOX(&evaluate)); }
