// A whole unit with fixed statistics, on memory that somebody has checked (cpu_evaluate.cpp).
#pragma once

#include "checks_attention_in_attention.h"

namespace aia::cpu {

// The gates of a context, 0 for none, which is the number of them; averaged: over the channels, of an inner context.
struct ContextOfGates {
  const Gates& gates;
  int context;
  bool averaged = false;
};

// y, stored as x is, of x as `a` describes it.
void evaluate_unit(const Activation& a, const ContextOfGates& inner, const ContextOfGates& outer, const void* x,
                   void* y);

}  // namespace aia::cpu
