// What the CPU passes of attention by a memory per sample look like from outside; see passes.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/memory.h"
#include "passes.h"

namespace aia::cpu {

// Units of the passes that meet all rows of a token at once: so many tokens of one head, which stay in the L2 cache.
inline int64_t tile_tokens(const Memory& at) {
  constexpr int64_t kElements = 16384, kStep = 64, kLeast = 256;
  return std::max(kLeast, kElements / at.d / kStep * kStep);
}
inline int64_t tiles(const Memory& at) { return (at.N + tile_tokens(at) - 1) / tile_tokens(at); }
inline int64_t tile_units(const Memory& at) { return at.heads() * tiles(at); }

// A softmax over tokens meets a row at a time.
inline int64_t key_units(const Memory& at) {
  return at.feature == Feature::kSoftmax ? at.heads() * at.d : tile_units(at);
}
// The parts in which the sums of keys over tokens come.
inline int64_t key_parts(const Memory& at) { return at.feature == Feature::kSoftmax ? 1 : tiles(at); }

// rows [B, pitch, N], query, sums [B, H R] and the like have the type in which logits accumulate; logits, reached and
// gamma are of the type of x. partial [B H, parts, columns] are sums over the tokens of a part; where there is one part
// they are the result.
struct MemoryPasses {
  static const MemoryPasses base[kScalars], v3[kScalars], v4[kScalars];

  void (*keys)(const Memory&, const void* logits, const void* statistics, void* rows, int64_t pitch, void* partial,
               int64_t begin, int64_t end);
  void (*queries)(const Memory&, const void* logits, const void* sums, const void* gamma, double eps, void* query,
                  int64_t begin, int64_t end);
  // columns of partial: R for the sums, one for gamma.
  void (*queries_backward)(const Memory&, const void* logits, const void* sums, const void* gamma, double eps,
                           const void* reached, void* rows, void* query, void* partial, int64_t begin, int64_t end);
  void (*keys_backward)(const Memory&, const void* logits, const void* reached, const void* grad_sums,
                        const void* reduced, void* rows, int64_t begin, int64_t end);
  // Sums over the parts, in their order: `columns` numbers of each head, and the last one of all heads together into
  // `total` where that is not null, which has columns + 1 of them.
  void (*join)(const Memory&, int64_t parts, int64_t columns, const void* partial, void* sums, void* total);
};

}  // namespace aia::cpu
