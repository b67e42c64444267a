// What the files that register CUDA operators share: the device and the stream of a launch, the geometry of an
// activation, and the workspace in which the blocks of a gate pass meet.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "../cuda/passes.h"
#include "checks_attention_in_attention.h"

namespace aia::cuda {

// Writes torch's current stream of a device; 0 is success.
using StreamOf = int32_t (*)(int32_t device, void** stream);
// Null where this torch has none: it is looked up, as the library must load beside a torch without CUDA too.
StreamOf stream_of_device();
// The most blocks that wait for one another, by the variable AIA_KERNELS_GATE_BLOCKS: for a device that is shared, or
// compute-sanitizer, for which they are slow. 0 where that is no number from kFewestGateBlocks on.
int most_gate_blocks();

// Kernels count within one clip in 32 bits.
constexpr int64_t kLimit = int64_t{1} << 30;

// The device of x made current, its stream, and the check that follows a launch. Checks of arguments come before.
class Launch {
 public:
  explicit Launch(const Tensor& x) : guard_(device_of(x)) {
    const StreamOf stream_of = stream_of_device();
    AIA_CHECK(stream_of != nullptr, "torch's current CUDA stream was not found");
    const int32_t error = stream_of(x.get_device_index(), &stream_);
    AIA_CHECK(error == 0, "no current CUDA stream on device ", x.get_device_index());
  }
  void* stream() const { return stream_; }
  void check(int error) const { AIA_CHECK(error == 0, "CUDA launch failed: ", error_string(error)); }

 private:
  static int32_t device_of(const Tensor& x) {
    AIA_CHECK(x.is_cuda(), "the first argument must be on a CUDA device");
    return x.get_device_index();
  }

  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// An activation as the shift sees it.
inline Shape shape_of(const Activation& a, const char* name) {
  AIA_CHECK(a.T * a.C * a.H * a.W < kLimit, "one clip of ", name, " must hold fewer than 2^30 elements");
  return {a.B,     static_cast<int>(a.T), static_cast<int>(a.C), static_cast<int>(a.H), static_cast<int>(a.W), a.order,
          a.scalar};
}

// And as the passes of Attention in Attention see it, with its maps.
inline Shape shape_of_unit(const Activation& a, const char* name) {
  AIA_CHECK(a.packed(kSpacetime) < kLimit, "the packed maps of one clip of ", name,
            " must hold fewer than 2^30 elements");
  return shape_of(a, name);
}

// The workspace of a gate pass on the current device.
class GateWorkspace {
 public:
  GateWorkspace(const Tensor& like, int per_block) : blocks_(std::min(gate_blocks_together(), most_gate_blocks())) {
    AIA_CHECK(blocks_ > 0, "AIA_KERNELS_GATE_BLOCKS must be a number from ", kFewestGateBlocks, " on");
    data_ = torch::stable::new_empty(like, {blocks_, per_block}, ScalarType::Double);
  }
  operator Workspace() const { return {static_cast<double*>(data_.mutable_data_ptr()), blocks_}; }

 private:
  int blocks_;
  Tensor data_;
};

}  // namespace aia::cuda
