// What the files that register CUDA operators share: the device and the stream of a launch, the geometry of an
// activation, and the room in which the blocks of a gate pass meet.
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

// The order in which x is stored densely: the first of maps.ORDERS that fits, as maps.storage_order has it.
inline Order order_of(const torch::stable::Tensor& x, const char* name) {
  constexpr int kAxes[3][5] = {{0, 1, 2, 3, 4}, {0, 1, 3, 4, 2}, {0, 2, 1, 3, 4}};
  for (int order = 0; order < 3; ++order) {
    int64_t expected = 1;
    bool dense = true;
    for (int k = 4; k >= 0; --k) {
      const int64_t size = x.size(kAxes[order][k]);
      dense = dense && (size == 1 || x.stride(kAxes[order][k]) == expected);
      expected *= size;
    }
    if (dense) return static_cast<Order>(order);
  }
  STD_TORCH_CHECK(false, name, " must be stored densely in an order of maps.ORDERS");
}

// x as the shift sees it.
inline Shape shape_of(const torch::stable::Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 5, name, " must be [B, T, C, H, W], got ", x.dim(), " axes");
  STD_TORCH_CHECK(x.numel() > 0, name, " must not be empty");
  constexpr int64_t kLimit = int64_t{1} << 30;
  bool fits = x.numel() / x.size(0) < kLimit;
  for (int axis = 1; axis < 5; ++axis) fits = fits && x.size(axis) < kLimit;
  STD_TORCH_CHECK(fits, "one clip of ", name, " must hold fewer than 2^30 elements");
  return {x.size(0),
          static_cast<int>(x.size(1)),
          static_cast<int>(x.size(2)),
          static_cast<int>(x.size(3)),
          static_cast<int>(x.size(4)),
          order_of(x, name),
          scalar_of(x, name)};
}

inline int64_t packed(const Shape& s, int64_t context) {
  const int64_t T = s.T, C = s.C, H = s.H, W = s.W;
  return context == kChannel ? T * H * W : H * W * C + T * W * C + T * H * C;
}

// x as the passes of Attention in Attention see it, with its maps.
inline Shape shape_of_unit(const torch::stable::Tensor& x, const char* name) {
  const Shape shape = shape_of(x, name);
  STD_TORCH_CHECK(packed(shape, kSpacetime) < int64_t{1} << 30, "the packed maps of one clip of ", name,
                  " must hold fewer than 2^30 elements");
  return shape;
}

// Room for the sums of each block of a gate pass.
inline torch::stable::Tensor workspace_of(const torch::stable::Tensor& like, int per_block) {
  return torch::stable::new_empty(like, {kGateBlocks, per_block}, torch::headeronly::ScalarType::Double);
}

}  // namespace aia::cuda
