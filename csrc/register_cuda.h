// What the files that register CUDA operators share: the device and the stream of a launch.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda/passes.h"
#include "register_common.h"

// Only torch builds with CUDA define it; the library must load beside the others too.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace aia::cuda {

// The device of x made current, its stream, and the check that follows a launch.
class Launch {
 public:
  explicit Launch(const torch::stable::Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    const int32_t error = aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_);
    STD_TORCH_CHECK(error == 0, "no current CUDA stream on device ", x.get_device_index());
  }
  void* stream() const { return stream_; }
  void check(int error) const { STD_TORCH_CHECK(error == 0, "CUDA launch failed: ", error_string(error)); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline void check_beside(const torch::stable::Tensor& t, const torch::stable::Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), name, " must be on the device of ",
                  "the first argument");
}

}  // namespace aia::cuda
