// Count, mean and sum of squared deviations of a sample, joined with another's by Chan's formula: no cancellation,
// whatever the mean.
#pragma once

#include "scalar.h"

namespace aia {

struct Moments {
  double count, mean, squares;

  static AIA_HOST_DEVICE Moments none() { return {0, 0, 0}; }

  AIA_HOST_DEVICE void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, share = other.count / total, delta = other.mean - mean;
    mean += delta * share;
    squares += other.squares + delta * delta * count * share;
    count = total;
  }
};

}  // namespace aia
