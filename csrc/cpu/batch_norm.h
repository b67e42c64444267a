// What the CPU passes of a small block's batch norm look like from outside; see passes.h.
#pragma once

#include "residual.h"

namespace aia::cpu {

// On z, x, y and gradients as Rows says, of type A, float or double; mean, var, factor and the other numbers of the
// channels are [C]. For calls that are small: one thread does all of it, and all sums are of doubles.
template <class A>
struct BatchNormPasses {
  static const BatchNormPasses base, v3, v4;

  // Mean and biased variance over batch and tokens.
  void (*moments)(const Rows&, const A* z, A* mean, A* var);
  // y = relu((z - mean) * factor + shift + x)
  void (*apply)(const Rows&, const A* z, const A* x, const A* mean, const A* factor, const A* shift, A* y);
  // g = grad_y where y is positive or NaN, elsewhere 0, its sums over batch and tokens, and those of g * (z - mean).
  void (*backward_reduce)(const Rows&, const A* grad_y, const A* y, const A* z, const A* mean, A* g, A* sums,
                          A* products);
  // grad_z = g * factor + (z - mean) * slope + constant
  void (*backward)(const Rows&, const A* g, const A* z, const A* mean, const A* factor, const A* slope,
                   const A* constant, A* grad_z);
  // The sums of g over batch and tokens.
  void (*sums)(const Rows&, const A* g, A* sums);
  // z += shift
  void (*add)(const Rows&, const A* shift, A* z);
};

}  // namespace aia::cpu
