// What pool by strips looks like from outside; see passes.h.
#pragma once

#include "passes.h"

namespace aia::cuda {

// pool over T, H and W, of x or of x times a gate over C; or -1, with nothing queued, where x has no such strips.
int pool_by_strips(const Shape&, const void* x, Gate, void* pooled, void* argmax, int index_bytes, void* stream);

}  // namespace aia::cuda
