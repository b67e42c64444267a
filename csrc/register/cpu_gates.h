// The weights of gates and the lengths of their maps as the gate passes of the CPU take them.
#pragma once

#include <vector>

#include "../common/norm.h"
#include "../cpu/passes.h"
#include "checks_attention_in_attention.h"

namespace aia::cpu {

// Calls each(tap, offset) for the 54 taps of a weight, and where each lies in it (tap_offset).
template <class Each>
void for_taps(const GateParameters& gate, const Each& each) {
  int tap = 0;
  for (int feature = 0; feature < 2; ++feature)
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) {
        const int64_t row = feature * gate.stride[0] + i * gate.stride[1] + j * gate.stride[2];
        for (int k = 0; k < 3; ++k) each(tap++, row + k * gate.stride[3]);
      }
}

// Of n gates, [n, 54] contiguous.
template <class A>
std::vector<A> contiguous_weights(const Gates& gates, int n) {
  std::vector<A> weights(n * 54);
  for (int i = 0; i < n; ++i)
    for_taps(gates[i], [&](int tap, int64_t offset) { weights[54 * i + tap] = read<A>(gates[i].weight, offset); });
  return weights;
}

// The maps of a context in the order in which they are packed, of one clip.
inline PackedDims maps_of(const Volume& x, int context) {
  if (context != kSpacetime) return {1, 1, {{x.T, x.H, x.W}}};
  if (channels_side_by_side(x)) return {1, 3, {{x.H, x.W, x.C}, {x.T, x.W, x.C}, {x.T, x.H, x.C}}};
  return {1, 3, {{x.C, x.H, x.W}, {x.T, x.C, x.W}, {x.T, x.C, x.H}}};
}

}  // namespace aia::cpu
