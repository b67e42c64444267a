// The temporal shift on CUDA devices: checks, allocation, device and stream. The work is in cuda/shift.cu.
#include <torch/csrc/stable/library.h>

#include "register_cuda.h"

namespace {

using torch::stable::Tensor;

Tensor temporal_shift(const Tensor& x, int64_t fold, bool reverse) {
  const aia::cuda::Shape s = aia::cuda::shape_of(x, "x");
  STD_TORCH_CHECK(fold >= 0 && 2 * fold <= s.C, "fold must be between 0 and half of the ", s.C, " channels, got ",
                  fold);
  const aia::cuda::Launch launch(x);
  Tensor y = torch::stable::empty_like(x);
  launch.check(aia::cuda::temporal_shift(s, x.const_data_ptr(), static_cast<int>(fold), reverse, y.mutable_data_ptr(),
                                         launch.stream()));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CUDA, m) { m.impl("temporal_shift", TORCH_BOX(&temporal_shift)); }
