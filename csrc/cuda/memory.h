// What the CUDA passes of attention by a memory per sample look like from outside; see passes.h.
#pragma once

#include "../common/memory.h"
#include "passes.h"

namespace aia::cuda {

// rows [B, pitch, N] and query [B, H R, N] are bfloat16 where logits are, else in their accumulation type, as all but
// logits, reached and gamma is; a bfloat16 is what the products take. `partial` is a workspace of as many numbers of
// that type as the function before tells, and unused where it tells 0. R and d are of the order of hundreds, and N is
// below 2^30.

// statistics [B, 2, H d] of a softmax, where known, or null.
int64_t memory_keys_partials(const Memory&, bool known);
int memory_keys(const Memory&, const void* logits, const void* statistics, void* rows, int64_t pitch, void* partial,
                void* sums, void* stream);

int memory_queries(const Memory&, const void* logits, const void* sums, const void* gamma, double eps, void* query,
                   void* stream);

// What a backward writes beside the gradients of queries, which have their place in rows.
struct QueryGradients {
  void *rows, *query, *grad_sums, *grad_gamma;
};
int64_t memory_queries_backward_partials(const Memory&);
int memory_queries_backward(const Memory&, const void* logits, const void* sums, const void* gamma, double eps,
                            const void* reached, const QueryGradients&, void* partial, void* stream);

// reduced [B, H d] of a softmax, where known, or null.
int64_t memory_keys_backward_partials(const Memory&, bool known);
int memory_keys_backward(const Memory&, const void* logits, const void* reached, const void* grad_sums,
                         const void* reduced, void* rows, void* partial, void* stream);

}  // namespace aia::cuda
