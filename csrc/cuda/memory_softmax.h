// The softmax over tokens of the keys of attention by a memory per sample; see memory.h, whose passes these are for
// that feature map.
#pragma once

#include "../common/memory.h"

namespace aia::cuda {

int64_t softmax_partials(const Memory&, bool known);
int softmax_over_tokens(const Memory&, const void* logits, const void* statistics, void* rows, int64_t pitch,
                        void* partial, void* sums, void* stream);
int64_t softmax_backward_partials(const Memory&);
int softmax_over_tokens_backward(const Memory&, const void* reached, const void* grad_sums, const void* reduced,
                                 void* rows, void* partial, void* stream);

}  // namespace aia::cuda
