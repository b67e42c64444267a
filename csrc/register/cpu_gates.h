// The weights of gates and the lengths of their maps as the gate passes of the CPU take them.
#pragma once

#include <vector>

#include "../common/norm.h"
#include "../cpu/passes.h"
#include "checks_attention_in_attention.h"

namespace aia::cpu {

// Of n gates, [n, 54] contiguous.
template <class A>
std::vector<A> contiguous_weights(const Gates& gates, int n) {
  std::vector<A> weights(n * 54);
  for (int i = 0; i < n * 54; ++i) {
    const GateParameters& gate = gates[i / 54];
    weights[i] = read<A>(gate.weight, tap_offset(gate, i / 27 % 2, i % 27));
  }
  return weights;
}

// The maps of a context in the order in which they are packed, of one clip.
inline PackedDims maps_of(const Volume& x, int context) {
  if (context != kSpacetime) return {1, 1, {{x.T, x.H, x.W}}};
  if (channels_side_by_side(x)) return {1, 3, {{x.H, x.W, x.C}, {x.T, x.W, x.C}, {x.T, x.H, x.C}}};
  return {1, 3, {{x.C, x.H, x.W}, {x.T, x.C, x.W}, {x.T, x.C, x.H}}};
}

}  // namespace aia::cpu
