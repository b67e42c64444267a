// What the CPU passes of the external attention block's residual look like from outside; see passes.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "passes.h"

namespace aia::cpu {

// z, x, y or a gradient, [B, N, C], in the order of storage: rows of `length` elements, tokens with their C features
// or, of maps, features with their N tokens.
struct Rows {
  int64_t B, N, C;
  bool maps;
  Scalar scalar;

  int64_t numel() const { return B * N * C; }
  int64_t length() const { return maps ? N : C; }
};

// Elements of one unit, a multiple of every vector's and of a byte of signs', which no two units share.
inline int64_t unit_elements(const Rows& z) {
  constexpr int64_t kElements = 32768, kUnits = 64, kStep = 32;
  return std::max(kElements, ((z.numel() + kUnits - 1) / kUnits + kStep - 1) / kStep * kStep);
}
inline int64_t element_units(const Rows& z) { return (z.numel() + unit_elements(z) - 1) / unit_elements(z); }

// Partial sums of residual_relu_backward: C for each unit of tokens; of maps one for each row's part in a unit, the
// part of row r in unit u at u + r.
inline int64_t partial_sums(const Rows& z) { return z.maps ? element_units(z) + z.B * z.C : element_units(z) * z.C; }

// z, x, grad_y and grad are stored as Rows says. shift and sums [C] and partial [partial_sums] have the type in which z
// accumulates; signs holds one bit per element.
struct ResidualPasses {
  static const ResidualPasses base[kScalars], v3[kScalars], v4[kScalars];

  void (*relu)(const Rows&, void* z, const void* x, const void* shift, void* signs, int64_t begin, int64_t end);
  void (*relu_backward)(const Rows&, const void* grad_y, const void* signs, void* grad, void* partial, int64_t begin,
                        int64_t end);
  void (*join_sums)(const Rows&, const void* partial, void* sums);
};

}  // namespace aia::cpu
