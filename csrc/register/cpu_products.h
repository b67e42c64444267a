// What the CPU operators share that are made of PyTorch's products and of passes: products, views, and loops over the
// numbers of small tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "../cpu/convert.h"
#include "../cpu/perceptron.h"
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

// Bytes in which numbers lie: a tensor of bytes, or a copy of one that begins where no number may.
inline Tensor aligned(const Tensor& bytes) {
  if (reinterpret_cast<uintptr_t>(bytes.const_data_ptr()) % sizeof(double) == 0) return bytes;
  Tensor own = new_tensor(bytes, {bytes.numel()}, ScalarType::Byte);
  std::memcpy(own.mutable_data_ptr(), bytes.const_data_ptr(), bytes.numel());
  return own;
}

// A matrix, or one for each sample: element (i, j) of sample s is data[s * sample_step + i * row_step + j *
// column_step].
template <class A>
struct Strided {
  A* data;
  int64_t rows, columns, row_step, column_step, samples = 1, sample_step = 0;

  Strided(A* data, const Layout& at) : data(data) {
    const int64_t first = at.dim - 2;
    rows = at.sizes[first], columns = at.sizes[first + 1];
    row_step = at.strides[first], column_step = at.strides[first + 1];
    if (first) samples = at.sizes[0], sample_step = at.strides[0];
    // Steps along axes of one are arbitrary.
    if (rows == 1) row_step = columns * column_step;
    if (columns == 1) column_step = row_step == 1 ? rows : 1;
  }
  Strided turned() const {
    Strided t = *this;
    std::swap(t.rows, t.columns), std::swap(t.row_step, t.column_step);
    return t;
  }
  // Whether a sample is its rows, one after the other.
  bool dense() const { return column_step == 1 && row_step == columns; }
};

// A product of PyTorch takes some 2.5 us whatever its size, between other operators twice that. In as long the loops of
// a channel gate's MLP do so many multiply-adds; an operand that must be turned first costs as eight for each number.
constexpr int64_t kSmallProduct = 1 << 14, kTurnedNumber = 8;

// The product of small matrices, out = a b; false, and nothing is written, where they are not small or not stored so.
template <class A>
bool multiply_small(Strided<A> out, Strided<const A> a, Strided<const A> b) {
  if (!out.dense()) {
    const Strided<const A> other = a.turned();
    out = out.turned(), a = b.turned(), b = other;
    if (!out.dense()) return false;
  }
  const SmallProduct p{out.rows, a.columns, out.columns};
  const PerceptronPasses<A>& pass = passes<PerceptronPasses<A>>();
  const bool transposed = !b.dense() && b.turned().dense() && a.dense();
  const int64_t turned = b.dense() || transposed ? 0 : p.depth * p.columns;
  if (out.samples * (p.multiply_adds() + kTurnedNumber * turned) > kSmallProduct) return false;
  A in_order[kSmallProduct / kTurnedNumber];
  for (int64_t s = 0; s < out.samples; ++s) {
    const A *of_a = a.data + s * a.sample_step, *of_b = b.data + s * b.sample_step;
    A* to = out.data + s * out.sample_step;
    if (transposed) {
      pass.times_transposed(p, of_a, of_b, to, 0, (p.columns + pass.dot_columns - 1) / pass.dot_columns);
      continue;
    }
    if (turned) {
      for (int64_t i = 0; i < p.depth; ++i)
        for (int64_t j = 0; j < p.columns; ++j) in_order[i * p.columns + j] = of_b[i * b.row_step + j * b.column_step];
      of_b = in_order;
    }
    pass.times(p, of_a, a.row_step, a.column_step, of_b, to, 0,
               (p.columns + pass.block_columns - 1) / pass.block_columns);
  }
  return true;
}
inline bool multiply_small(const Tensor& out, const Tensor& a, const Tensor& b) {
  const Layout of_out(out), of_a(a), of_b(b);
  if (of_out.numel * of_a.sizes[of_a.dim - 1] > kSmallProduct) return false;
  const auto multiplied = [&](auto zero) {
    using A = decltype(zero);
    return multiply_small<A>({static_cast<A*>(out.mutable_data_ptr()), of_out},
                             {static_cast<const A*>(a.const_data_ptr()), of_a},
                             {static_cast<const A*>(b.const_data_ptr()), of_b});
  };
  switch (out.scalar_type()) {
    case ScalarType::Float: return multiplied(float{});
    case ScalarType::Double: return multiplied(double{});
    default: return false;
  }
}

// Of matrices [p, q] and [q, r] for each sample.
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
