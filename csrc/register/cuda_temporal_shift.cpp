// The temporal shift on CUDA devices: checks, allocation, device and stream. The work is in cuda/shift.cu.
#include <torch/csrc/stable/library.h>

#include "cuda.h"

namespace {

using torch::stable::Tensor;

Tensor temporal_shift(const Tensor& x, int64_t fold, bool reverse) {
  const aia::Activation a = aia::activation_of(x, "x");
  aia::check_fold(fold, a);
  const aia::cuda::Shape s = aia::cuda::shape_of(a, "x");
  const aia::cuda::Launch launch(x);
  Tensor y = aia::new_like(x);
  launch.check(aia::cuda::temporal_shift(s, x.const_data_ptr(), static_cast<int>(fold), reverse, y.mutable_data_ptr(),
                                         launch.stream()));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CUDA, m) { m.impl("temporal_shift", TORCH_BOX(&temporal_shift)); }
