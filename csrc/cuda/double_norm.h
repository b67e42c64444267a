// What the CUDA passes of the double normalization look like from outside; see passes.h.
#pragma once

#include "passes.h"
#include "split.h"

namespace aia::cuda {

// Logits, A or their gradients: [B, N, M], contiguous, the M columns in groups. padding [B, N] is 1 where a token takes
// no part, or null.
struct Tokens {
  int64_t B, N;
  int M, group;
  Scalar scalar;
  const uint8_t* padding;

  int groups() const { return M / group; }
};

// How the tokens are split in the reductions over them.
Split token_split(const Tokens&);

// A reduction writes the results of its chunks, [B, chunks, 2, M] and [B, chunks, M], to `partial`, where there are
// several, and a second launch joins them; so long as there is only one, `partial` is not used.
int column_statistics(const Tokens&, const void* logits, void* partial, void* statistics, void* lse, void* stream);
int double_norm(const Tokens&, void* logits, const void* lse, double eps, void* mass, void* stream);
// dots [B, N, M / group] is the workspace of a first launch, where needs_dots.
bool needs_dots(const Tokens&, const void* grad, const void* attention);
int double_norm_backward_reduce(const Tokens&, const void* grad, const void* attention, void* dots, void* partial,
                                void* reduced, void* stream);
int double_norm_backward(const Tokens&, void* grad, const void* attention, const void* mass, const void* reduced,
                         void* stream);

}  // namespace aia::cuda
