// unpool and recalibrate of planes with rows of odd length.
#pragma once

#include "passes.h"

namespace aia::cuda {

// The fields of a call: those over T, H and W, which are there, and those over C, if any. outer: x meets the gate over
// T, H and W, and what is unpooled over them the gate over C; else the other way around.
struct StagedFields {
  Gate gate;
  Unpooled unpooled;
  Gate channel_gate;
  Unpooled channel_unpooled;
  bool outer;
};

// An error code, or -1 where other kernels must serve the call.
int unpool_staged(const Shape& shape, const void* grad_y, const StagedFields& fields, void* grad_x, void* stream);

}  // namespace aia::cuda
