// The maximum along an axis and its index, as torch.max(dim) defines them: the first index wins ties, NaN wins over
// numbers, and the first NaN over later ones.
#pragma once

#include <cmath>

#include "scalar.h"

namespace aia {

template <class A>
struct MaxFirst {
  A value;
  int index;

  // Nothing seen yet, of a run of elements whose lowest index is `first`.
  static AIA_HOST_DEVICE MaxFirst starting_at(int first) { return {static_cast<A>(-INFINITY), first}; }

  // The next element; indices must come in increasing order.
  AIA_HOST_DEVICE void add(A next, int next_index) {
    if (!(next <= value) && value == value) {
      value = next;
      index = next_index;
    }
  }

  // Another run, whichever comes first.
  AIA_HOST_DEVICE void merge(const MaxFirst& other) {
    const bool nan = value != value, other_nan = other.value != other.value;
    const bool tie = nan ? other_nan : other.value == value;
    if (tie ? other.index < index : !nan && (other_nan || other.value > value)) *this = other;
  }
};

}  // namespace aia
