// The CUDA implementations of the operators that aia_kernels/ops.py defines, as far as there are any: checks,
// allocation, device and stream. The work itself is in cuda/.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/passes.h"

// Only torch builds with CUDA define it; the library must load beside the others too.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace {

using aia::cuda::Gate;
using aia::cuda::Order;
using aia::cuda::Scalar;
using aia::cuda::Shape;
using aia::cuda::Unpooled;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The device of x made current, its stream, and the check that follows a launch.
class Launch {
 public:
  explicit Launch(const Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    const int32_t error = aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_);
    STD_TORCH_CHECK(error == 0, "no current CUDA stream on device ", x.get_device_index());
  }
  void* stream() const { return stream_; }
  void check(int error) const { STD_TORCH_CHECK(error == 0, "CUDA launch failed: ", aia::cuda::error_string(error)); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

Scalar scalar_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Scalar::kFloat32;
    case ScalarType::Double: return Scalar::kFloat64;
    case ScalarType::BFloat16: return Scalar::kBFloat16;
    case ScalarType::Half: return Scalar::kFloat16;
    default: STD_TORCH_CHECK(false, name, " must be float16, bfloat16, float32 or float64");
  }
}

ScalarType map_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The order in which x is stored densely: the first of maps.ORDERS that fits, as maps.storage_order has it.
Order order_of(const Tensor& x, const char* name) {
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

int64_t packed(const Shape& s, int64_t context) {
  const int64_t T = s.T, C = s.C, H = s.H, W = s.W;
  return context == aia::cuda::kChannel ? T * H * W : H * W * C + T * W * C + T * H * C;
}

Shape shape_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 5, name, " must be [B, T, C, H, W], got ", x.dim(), " axes");
  STD_TORCH_CHECK(x.numel() > 0, name, " must not be empty");
  constexpr int64_t kLimit = int64_t{1} << 30;
  bool fits = x.numel() / x.size(0) < kLimit;
  for (int axis = 1; axis < 5; ++axis) fits = fits && x.size(axis) < kLimit;
  const Shape shape{x.size(0),
                    static_cast<int>(x.size(1)),
                    static_cast<int>(x.size(2)),
                    static_cast<int>(x.size(3)),
                    static_cast<int>(x.size(4)),
                    order_of(x, name),
                    scalar_of(x, name)};
  STD_TORCH_CHECK(fits && packed(shape, aia::cuda::kSpacetime) < kLimit, "one clip of ", name,
                  " and its packed maps must hold fewer than 2^30 elements each");
  return shape;
}

void check_context(int64_t context, const char* name) {
  STD_TORCH_CHECK(context == aia::cuda::kChannel || context == aia::cuda::kSpacetime, name,
                  " must be 1 (channel) or 3 (spacetime), got ", context);
}

// A contiguous [B, M], or [B, 2, M] for features, beside x.
void check_map(const Tensor& map, int64_t features, ScalarType type, const Shape& s, int64_t context, const Tensor& x,
               const char* name) {
  const int64_t axes = features == 1 ? 2 : 3;
  const bool fits = map.dim() == axes && map.is_contiguous() && map.size(0) == s.B &&
                    (features == 1 || map.size(1) == features) && map.size(axes - 1) == packed(s, context);
  STD_TORCH_CHECK(fits, name, " must be a contiguous packed map of its context");
  STD_TORCH_CHECK(map.scalar_type() == type, name, " has the wrong dtype for this x");
  STD_TORCH_CHECK(map.is_cuda() && map.get_device_index() == x.get_device_index(), name, " must be on the device of x");
}

ScalarType index_type(const Shape& s, int64_t context) {
  const int longest = context == aia::cuda::kChannel ? s.C : std::max({s.T, s.H, s.W});
  return longest <= 256 ? ScalarType::Byte : longest <= 32768 ? ScalarType::Short : ScalarType::Int;
}

Gate gate_of(const std::optional<Tensor>& gate, int64_t context, const Shape& s, const Tensor& x, const char* name) {
  if (!gate) return {nullptr, aia::cuda::kNone};
  check_context(context, "the context of a gate");
  check_map(*gate, 1, map_type(x), s, context, x, name);
  return {gate->const_data_ptr(), static_cast<int>(context)};
}

Unpooled unpooled_of(const std::optional<Tensor>& grad, const std::optional<Tensor>& argmax, int64_t context,
                     const Shape& s, const Tensor& x, const char* grad_name, const char* argmax_name) {
  STD_TORCH_CHECK(grad.has_value() == argmax.has_value(), grad_name, " and ", argmax_name, " come together or not");
  if (!grad) return {nullptr, nullptr, 1, aia::cuda::kNone};
  check_context(context, "the context of pooled features");
  check_map(*grad, 2, map_type(x), s, context, x, grad_name);
  check_map(*argmax, 1, index_type(s, context), s, context, x, argmax_name);
  return {grad->const_data_ptr(), argmax->const_data_ptr(), static_cast<int>(argmax->element_size()),
          static_cast<int>(context)};
}

std::tuple<Tensor, Tensor> pool(const Tensor& x, int64_t context, std::optional<Tensor> gate, int64_t gate_context) {
  const Shape s = shape_of(x, "x");
  check_context(context, "context");
  const Gate inner = gate_of(gate, gate_context, s, x, "gate");
  const Launch launch(x);
  Tensor pooled = torch::stable::new_empty(x, {s.B, 2, packed(s, context)}, map_type(x));
  Tensor argmax = torch::stable::new_empty(x, {s.B, packed(s, context)}, index_type(s, context));
  launch.check(aia::cuda::pool(s, x.const_data_ptr(), static_cast<int>(context), inner, pooled.mutable_data_ptr(),
                               argmax.mutable_data_ptr(), static_cast<int>(argmax.element_size()), launch.stream()));
  return {pooled, argmax};
}

Tensor unpool(const Tensor& grad_y, const Tensor& gate, const Tensor& grad_pooled, const Tensor& argmax,
              int64_t context, std::optional<Tensor> inner_gate, int64_t inner_gate_context,
              std::optional<Tensor> inner_grad_pooled, std::optional<Tensor> inner_argmax, int64_t inner_context) {
  const Shape s = shape_of(grad_y, "grad_y");
  const Gate outer_gate = gate_of(gate, context, s, grad_y, "gate");
  const Unpooled outer = unpooled_of(grad_pooled, argmax, context, s, grad_y, "grad_pooled", "argmax");
  const Gate inside = gate_of(inner_gate, inner_gate_context, s, grad_y, "inner_gate");
  const Unpooled inner =
      unpooled_of(inner_grad_pooled, inner_argmax, inner_context, s, grad_y, "inner_grad_pooled", "inner_argmax");
  const Launch launch(grad_y);
  Tensor grad_x = torch::stable::empty_like(grad_y);
  launch.check(aia::cuda::unpool(s, grad_y.const_data_ptr(), outer_gate, outer, inside, inner,
                                 grad_x.mutable_data_ptr(), launch.stream()));
  return grad_x;
}

Tensor unpool_reduce(const Tensor& x, const Tensor& grad_pooled, const Tensor& argmax, int64_t context,
                     int64_t gate_context) {
  const Shape s = shape_of(x, "x");
  check_context(gate_context, "gate_context");
  const Unpooled unpooled = unpooled_of(grad_pooled, argmax, context, s, x, "grad_pooled", "argmax");
  const Launch launch(x);
  Tensor grad_gate = torch::stable::new_empty(x, {s.B, packed(s, gate_context)}, map_type(x));
  launch.check(aia::cuda::unpool_reduce(s, x.const_data_ptr(), unpooled, static_cast<int>(gate_context),
                                        grad_gate.mutable_data_ptr(), launch.stream()));
  return grad_gate;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CUDA, m) {
  m.impl("pool", TORCH_BOX(&pool));
  m.impl("unpool", TORCH_BOX(&unpool));
  m.impl("unpool_reduce", TORCH_BOX(&unpool_reduce));
}
