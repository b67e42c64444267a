// What the passes by strips look like from outside; see passes.h. They return -1, with nothing queued, where x has no
// such strips.
#pragma once

#include "passes.h"

namespace aia::cuda {

// pool over T, H and W, of x or of x times a gate over C.
int pool_by_strips(const Shape&, const void* x, Gate, void* pooled, void* argmax, int index_bytes, void* stream);
// unpool_reduce over T, H and W, of what is unpooled over C.
int unpool_reduce_by_strips(const Shape&, const void* x, Unpooled, void* grad_gate, void* stream);
// recalibrate_reduce over T, H and W.
int recalibrate_reduce_by_strips(const Shape&, const void* grad_y, const void* x, void* grad_gate, void* stream);

}  // namespace aia::cuda
