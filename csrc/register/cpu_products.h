// What the CPU operators share that are made of PyTorch's products and of passes: products, views, and loops over the
// numbers of small tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <initializer_list>

#include "checks.h"

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
