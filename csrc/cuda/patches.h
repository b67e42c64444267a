// What the passes by patches look like from outside; see passes.h. They return -1, with nothing queued, where planes
// are not made of patches.
#pragma once

#include "passes.h"

namespace aia::cuda {

// Over T, H and W: pool of x or of x times a gate over C; unpool_reduce of what is unpooled over C; recalibrate_reduce.
int pool_by_patches(const Shape&, const void* x, Gate, void* pooled, void* argmax, int index_bytes, void* stream);
int unpool_reduce_by_patches(const Shape&, const void* x, Unpooled, void* grad_gate, void* stream);
int recalibrate_reduce_by_patches(const Shape&, const void* grad_y, const void* x, void* grad_gate, void* stream);

}  // namespace aia::cuda
