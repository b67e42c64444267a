// What the CUDA passes at the end of external attention's block look like from outside; see passes.h.
#pragma once

#include "passes.h"
#include "split.h"

namespace aia::cuda {

// z, x, y or a gradient, [B, N, C], dense: token by token or, of maps, feature by feature.
struct Features {
  int64_t B, N, C;
  bool maps;
  Scalar scalar;

  int64_t numel() const { return B * N * C; }
};

int residual_relu(const Features&, void* z, const void* x, const void* shift, uint8_t* signs, void* stream);

// Rows of C partial sums that the backward pass needs; one: it needs none.
int64_t residual_partials(const Features&);
int residual_relu_backward(const Features&, const void* grad_y, const uint8_t* signs, void* grad, void* partial,
                           void* sums, void* stream);

}  // namespace aia::cuda
