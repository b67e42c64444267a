// What unpool_reduce over C by bricks looks like from outside; see passes.h.
#pragma once

#include "passes.h"

namespace aia::cuda {

// unpool_reduce over C, of what is unpooled over T, H and W; -1, with nothing queued, where x has no such bricks.
int unpool_reduce_by_bricks(const Shape&, const void* x, Unpooled, void* grad_gate, void* stream);

}  // namespace aia::cuda
