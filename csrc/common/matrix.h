// CBAM's x as its passes see it (aia_kernels/schemas.py has these): plain sizes and pointers, no torch header.
#pragma once

#include <cstdint>

#include "packed.h"

namespace aia {

// x [B, C, H, W] in the order of storage: each sample is a matrix, of channels by positions or, in channels_last, of
// positions by channels. What CBAM does to channels and to positions is then done to rows and to columns, or the other
// way round, and one source serves both layouts.
struct Matrix {
  int64_t B, rows, columns;
  bool rows_are_channels;
  Scalar scalar;

  int64_t size() const { return rows * columns; }
  int64_t channels() const { return rows_are_channels ? rows : columns; }
  int64_t positions() const { return rows_are_channels ? columns : rows; }
};

// A gate of the rows or of the columns [B, n], or null for ones; of the gradient of pooled features [B, 2, n] the
// maximum and the mean, and the index [B, n] of each maximum, or all null.
struct Side {
  const void *gate, *grad;
  const int32_t* argmax;
};

}  // namespace aia
