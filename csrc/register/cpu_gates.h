// The weights of gates as the gate passes of the CPU take them.
#pragma once

#include <vector>

#include "../common/norm.h"
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

}  // namespace aia::cpu
