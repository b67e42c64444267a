// What the MLP of a channel gate on the CPU looks like from outside; see passes.h.
#pragma once

#include <cstdint>

namespace aia::cpu {

// A product [rows, depth] x [depth, columns], of which rows or depth are few: those of a batch. Its operands are as
// large as the weights, and met once or twice.
struct SmallProduct {
  int64_t rows, depth, columns;

  int64_t multiply_adds() const { return rows * depth * columns; }
};

// Numbers are of type A, float or double. Each result is one sum over the depth, of which no other thread has a part.
template <class A>
struct PerceptronPasses {
  static const PerceptronPasses base, v3, v4;

  // out [rows, columns], of a [rows, depth] and the transpose of b [columns, depth]. Units: blocks of dot_columns.
  int64_t dot_columns;
  void (*times_transposed)(const SmallProduct&, const A* a, const A* b, A* out, int64_t begin, int64_t end);
  // out [rows, columns], of a, whose element (i, k) is a[i * row_step + k * depth_step], and b [depth, columns]. Units:
  // blocks of block_columns.
  int64_t block_columns;
  void (*times)(const SmallProduct&, const A* a, int64_t row_step, int64_t depth_step, const A* b, A* out,
                int64_t begin, int64_t end);
  // x = sigmoid(x), of n elements.
  void (*sigmoid)(int64_t n, A* x);
};

}  // namespace aia::cpu
