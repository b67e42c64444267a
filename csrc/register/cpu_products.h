// What the CPU operators share that are made of PyTorch's products and of passes: products, views, and loops over the
// numbers of small tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <initializer_list>

#include "../cpu/convert.h"
#include "cpu.h"

namespace aia::cpu {

// The same elements with other sizes and strides, from so many elements on.
inline Tensor view_of(const Tensor& t, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                      int64_t first = 0) {
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                        strides.begin(), first, &view));
  return Tensor(view);
}

// Of matrices [p, q] and [q, r], and of as many of them as there are samples.
inline void multiply_matrices(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_bmm_out(out.get(), a.get(), b.get()));
}
// beta times what is added, plus alpha times the product.
inline void multiply_added(const Tensor& out, const Tensor& added, const Tensor& a, const Tensor& b, double beta = 1,
                           double alpha = 1) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_baddbmm_out(out.get(), added.get(), a.get(), b.get(), beta, alpha));
}

inline bool is_narrow(const Tensor& t) { return t.scalar_type() != accumulate_type(t); }

// A tensor [.., .., .., ..] whose axes lie in memory as those of channels_last.
inline bool is_channels_last(const Layout& at) {
  if (at.dim != 4) return false;
  const int64_t C = at.sizes[1], row = at.sizes[3] * C;
  return !at.differs(1, 1) && !at.differs(3, C) && !at.differs(2, row) && !at.differs(0, at.sizes[2] * row);
}

// A dense tensor in another type, stored alike.
inline Tensor converted(const Tensor& t, ScalarType type, Scalar narrow,
                        void (*ConvertPasses::*pass)(const void*, void*, int64_t)) {
  const Layout at(t);
  const Tensor to = new_strided(t, at.dim, at.sizes, at.strides, static_cast<int32_t>(type));
  (passes<ConvertPasses>(narrow).*pass)(t.const_data_ptr(), to.mutable_data_ptr(), at.numel);
  return to;
}
// A tensor of 16 bits in float32. One that is wide, or has gaps, stays as it is: whoever takes it refuses gaps.
inline Tensor widened(const Tensor& t, const char* name) {
  const Layout at = check_operand(t, t, name);
  const Scalar scalar = scalar_of(t, name);
  if (!is_narrow(t) || !(t.is_contiguous() || is_channels_last(at))) return t;
  return converted(t, ScalarType::Float, scalar, &ConvertPasses::widen);
}
// The same of a list, all of one type.
inline std::vector<std::optional<Tensor>> widened(std::vector<std::optional<Tensor>> list, ScalarType type,
                                                  const char* name) {
  for (std::optional<Tensor>& t : list) {
    if (!t) continue;
    AIA_CHECK(t->scalar_type() == type, name, " must be of the type of x, ", name_of(type), ", got ", described(*t));
    t = widened(*t, name);
  }
  return list;
}
// A dense float32 tensor in the type of another one, itself if that is wide.
inline Tensor narrowed(const Tensor& t, const Tensor& like) {
  if (!is_narrow(like)) return t;
  return converted(t, like.scalar_type(), scalar_of(like, "x"), &ConvertPasses::narrow);
}

// Calls body with a zero of the type of t, float or double.
template <class Body>
void with_type(const Tensor& t, Body&& body) {
  if (t.scalar_type() == torch::headeronly::ScalarType::Double)
    body(double{});
  else
    body(float{});
}
template <class A>
const A* numbers(const Tensor& t) {
  return static_cast<const A*>(t.const_data_ptr());
}
template <class A>
A* mutable_numbers(const Tensor& t) {
  return static_cast<A*>(t.mutable_data_ptr());
}

// Calls each(number, i) for the numbers of a contiguous tensor, which it may change.
template <class Each>
void for_numbers(const Tensor& t, Each&& each) {
  with_type(t, [&](auto zero) {
    auto* data = static_cast<decltype(zero)*>(t.mutable_data_ptr());
    for (int64_t i = 0, n = t.numel(); i < n; ++i) each(data[i], i);
  });
}

}  // namespace aia::cpu
