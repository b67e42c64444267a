// What the operators check of their arguments, the same on every device, so that a kernel reads and writes only where
// it may: whatever it assumes is checked here, and what it cannot do is refused by name. The checks of a family of
// operators stand in checks_attention_in_attention.h and checks_external_attention.h.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/packed.h"

namespace aia {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// Raises what follows the condition, unless that holds.
#define AIA_CHECK(condition, ...)  \
  do {                             \
    if (!(condition)) [[unlikely]] \
      aia::refuse(__VA_ARGS__);    \
  } while (false)

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(type);
  }
}

template <class Numbers>
std::string listed(const Numbers& numbers) {
  std::ostringstream text;
  for (const auto number : numbers) text << (text.tellp() ? ", " : "") << number;
  return "[" + text.str() + "]";
}

// What came, for a message.
inline std::string described(const Tensor& t) {
  return std::string(name_of(t.scalar_type())) + " " + listed(t.sizes()) + " with strides " + listed(t.strides());
}

// Sizes and strides of a tensor. Each question to the framework costs a call, so they are asked for once.
struct Layout {
  int64_t dim, *sizes, *strides, numel = 1;

  explicit Layout(const Tensor& t) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
    for (int64_t axis = 0; axis < dim; ++axis) numel *= sizes[axis];
  }

  // Whether an axis has a stride that matters, and it is another one.
  bool differs(int64_t axis, int64_t stride) const { return numel && sizes[axis] != 1 && strides[axis] != stride; }
};

inline bool on_same_device(const Tensor& a, const Tensor& b) {
  if (a.get() == b.get()) return true;
  int32_t of_a, of_b;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.get(), &of_a));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(b.get(), &of_b));
  return of_a == of_b && a.get_device_index() == b.get_device_index();
}

// Of any operand: it is a tensor on the device of the first one, and its elements lie inside its storage, which may
// have been shrunk since, at addresses that their type allows.
inline Layout check_operand(const Tensor& t, const Tensor& first, const char* name) {
  AIA_CHECK(t.defined(), name, " must be a tensor, got None");
  AIA_CHECK(on_same_device(t, first), name, " must be on the device of the first argument");
  const Layout at(t);
  if (at.numel == 0) return at;
  int64_t last = t.storage_offset(), bytes = 0, part = 0;
  bool overflow = false;
  for (int64_t axis = 0; axis < at.dim; ++axis) {
    overflow |= __builtin_mul_overflow(at.sizes[axis] - 1, at.strides[axis], &part);
    overflow |= __builtin_add_overflow(last, part, &last);
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const auto itemsize = static_cast<int64_t>(t.element_size());
  AIA_CHECK(!overflow && last < bytes / itemsize, name, " must lie inside its storage of ", bytes, " bytes, got ",
            described(t), " from element ", t.storage_offset(), " on");
  AIA_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % itemsize == 0, name,
            " must begin at an address that is a multiple of its ", itemsize, " bytes per element");
  return at;
}

// An operand that is contiguous, of these sizes and this type.
inline void check_contiguous(const Tensor& t, std::initializer_list<int64_t> sizes, ScalarType type,
                             const Tensor& first, const char* name) {
  const Layout at = check_operand(t, first, name);
  bool fits = std::equal(at.sizes, at.sizes + at.dim, sizes.begin(), sizes.end()) && t.scalar_type() == type;
  int64_t expected = 1;
  for (int64_t axis = at.dim - 1; axis >= 0; --axis) {
    fits = fits && !at.differs(axis, expected);
    expected *= at.sizes[axis];
  }
  AIA_CHECK(fits, name, " must be contiguous ", name_of(type), " ", listed(sizes), ", got ", described(t));
}

// An operand that is stored as another one: its type, sizes, and the strides that matter.
inline void check_same(const Tensor& t, const Tensor& other, const char* name, const char* other_name) {
  const Layout at = check_operand(t, other, name), wanted(other);
  bool same = std::equal(at.sizes, at.sizes + at.dim, wanted.sizes, wanted.sizes + wanted.dim);
  for (int64_t axis = 0; same && axis < at.dim; ++axis) same = !at.differs(axis, wanted.strides[axis]);
  AIA_CHECK(same && t.scalar_type() == other.scalar_type(), name, " and ", other_name,
            " must agree in shape, strides and dtype, got ", described(t), " and ", described(other));
}

// The bytes of a dense operand.
struct Span {
  uintptr_t begin, end;
  const char* name;

  Span(const Tensor& t, const char* name, bool written = false)
      : begin(reinterpret_cast<uintptr_t>(written ? t.mutable_data_ptr() : t.const_data_ptr())),
        end(begin + static_cast<uintptr_t>(t.numel()) * t.element_size()),
        name(name) {}
};

// What is written shares no memory with what else is given. `written` comes first: asking for it to write may move it,
// where the framework copies on write.
inline void check_apart(const Span& written, std::initializer_list<Span> others) {
  for (const Span& other : others)
    AIA_CHECK(written.end <= other.begin || other.end <= written.begin, written.name,
              " is written, and must share no memory with ", other.name);
}

inline Scalar scalar_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Scalar::kFloat32;
    case ScalarType::Double: return Scalar::kFloat64;
    case ScalarType::BFloat16: return Scalar::kBFloat16;
    case ScalarType::Half: return Scalar::kFloat16;
    default: refuse(name, " must be float16, bfloat16, float32 or float64, got ", name_of(x.scalar_type()));
  }
}

// The accumulation type of x.
inline ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return 1;
    case ScalarType::Short:
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    default: return 4;
  }
}
inline int64_t bytes_of(Scalar scalar) { return scalar == Scalar::kFloat64 ? 8 : scalar == Scalar::kFloat32 ? 4 : 2; }

// A new tensor on the device of x. Not by way of the dispatcher, which takes some microseconds.
inline Tensor new_strided(const Tensor& x, int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t type) {
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, type, device, x.get_device_index(), &made));
  return Tensor(made);
}
inline Tensor new_tensor(const Tensor& x, const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0; stride *= std::max<int64_t>(1, sizes[axis])) strides[axis] = stride;
  return new_strided(x, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), static_cast<int32_t>(type));
}
// Of numbers for x, contiguous.
inline Tensor new_numbers(const Tensor& x, const std::vector<int64_t>& sizes) {
  return new_tensor(x, sizes, accumulate_type(x));
}
// Stored as x, which is dense.
inline Tensor new_like(const Tensor& x) {
  const Layout at(x);
  return new_strided(x, at.dim, at.sizes, at.strides, static_cast<int32_t>(x.scalar_type()));
}

inline void check_eps(double eps) {
  AIA_CHECK(eps >= 0 && std::isfinite(eps), "eps must not be negative, infinite or NaN, got ", eps);
}

// An activation [B, T, C, H, W], which is not empty, and the order in which it is stored densely: the first of
// maps.ORDERS that fits, as maps.storage_order has it. Strides of axes of length one are arbitrary.
struct Activation {
  int64_t B, T, C, H, W;
  Order order;
  Scalar scalar;

  // M, the elements per clip of the packed maps of a context.
  int64_t packed(int64_t context) const {
    return context == kChannel ? T * H * W : context == kSpacetime ? H * W * C + T * W * C + T * H * C : 0;
  }
};

inline Activation activation_of(const Tensor& x, const char* name) {
  const Layout at = check_operand(x, x, name);
  AIA_CHECK(at.dim == 5, name, " must be [B, T, C, H, W], got ", described(x));
  AIA_CHECK(at.numel > 0, name, " must not be empty, got ", described(x));
  // Kernels count along an axis in 32 bits, with room for a block beyond its end.
  for (int axis = 1; axis < 5; ++axis)
    AIA_CHECK(at.sizes[axis] < int64_t{1} << 30, name, " must have axes shorter than 2^30, got ", described(x));
  const Scalar scalar = scalar_of(x, name);
  constexpr int kAxes[3][5] = {{0, 1, 2, 3, 4}, {0, 1, 3, 4, 2}, {0, 2, 1, 3, 4}};
  for (int order = 0; order < 3; ++order) {
    int64_t expected = 1;
    bool dense = true;
    for (int k = 4; k >= 0; --k) {
      const int axis = kAxes[order][k];
      dense = dense && !at.differs(axis, expected);
      expected *= at.sizes[axis];
    }
    if (dense)
      return {at.sizes[0], at.sizes[1], at.sizes[2], at.sizes[3], at.sizes[4], static_cast<Order>(order), scalar};
  }
  refuse(name, " must be stored densely in an order of maps.ORDERS, got ", described(x));
}

// Of the temporal shift.
inline void check_fold(int64_t fold, const Activation& x) {
  AIA_CHECK(0 <= fold && fold <= x.C / 2, "fold must be between 0 and half of the ", x.C, " channels, got ", fold);
}

}  // namespace aia
