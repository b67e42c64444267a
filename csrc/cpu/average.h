// What the CPU passes of STinC2's inner gate look like from outside; see passes.h.
#pragma once

#include "passes.h"

namespace aia::cpu {

// Spacetime gates, averaged over C, as one over C, and the transpose (average_gate and average_gate_back of
// aia_kernels/schemas.py), on numbers of type A, float or double. Units are clips.
template <class A>
struct AveragePasses {
  static const AveragePasses base, v3, v4;

  void (*average)(const Volume&, const A* gate, A* averaged, int64_t begin, int64_t end);
  void (*spread)(const Volume&, const A* grad, A* grad_gate, int64_t begin, int64_t end);
};

}  // namespace aia::cpu
