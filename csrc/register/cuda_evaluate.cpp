// The CUDA implementation of a whole unit with fixed statistics (evaluate of aia_kernels/schemas.py): checks,
// allocation, device and stream. The work itself is in cuda/.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "../cuda/evaluate.h"
#include "cuda.h"

namespace {

using aia::Numbers;
using aia::cuda::Launch;
using aia::cuda::Shape;
using aia::cuda::UnitGates;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor evaluate(const Tensor& x, std::vector<Tensor> weight, Numbers scale, Numbers shift, Numbers mean, Numbers var,
                std::vector<double> eps, int64_t inner, int64_t outer) {
  const Shape s = aia::cuda::shape_of_unit(aia::activation_of(x, "x"), "x");
  const aia::UnitArguments gates(x, weight, scale, shift, mean, var, eps, inner, outer);
  const UnitGates unit{static_cast<int>(inner), static_cast<int>(outer), gates.inner.data(), gates.outer.data()};

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
