// The temporal shift on the CPU: checks, allocation and the split over threads. The work is in cpu/shift.h.
#include <torch/csrc/stable/library.h>

#include "../cpu/shift.h"
#include "cpu.h"

namespace {

using torch::stable::Tensor;

Tensor temporal_shift(const Tensor& x, int64_t fold, bool reverse) {
  const aia::Activation a = aia::activation_of(x, "x");
  aia::check_fold(fold, a);
  const aia::cpu::Volume v = aia::cpu::volume_of(a);
  Tensor y = aia::cpu::output_like(x);
  const auto* data = static_cast<const char*>(x.const_data_ptr());
  auto* out = static_cast<char*>(y.mutable_data_ptr());
  aia::cpu::parallel(aia::cpu::shift_units(v), [&](int64_t begin, int64_t end) {
    aia::cpu::temporal_shift(v, x.element_size(), data, fold, reverse ? -1 : 1, out, begin, end);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CPU, m) { m.impl("temporal_shift", TORCH_BOX(&temporal_shift)); }
