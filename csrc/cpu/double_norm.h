// What the CPU passes of the double normalization look like from outside; see passes.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "passes.h"

namespace aia::cpu {

// Logits, A or their gradients: [B, N, M], contiguous, the M columns in groups. padding [B, N] is 1 where a token takes
// no part, or null.
struct Tokens {
  int64_t B, N, M, group;
  Scalar scalar;
  const uint8_t* padding;

  int64_t groups() const { return M / group; }
};

// How a reduction over tokens is split: whole groups of columns, side by side about so wide, and chunks of tokens. The
// partial results of the chunks are reduced once more, in their order.
struct Split {
  int64_t columns, blocks, tokens, chunks;

  Split(const Tokens& at, int64_t width) {
    constexpr int64_t kElements = 32768, kChunks = 64;
    columns = std::min(at.M, std::max<int64_t>(1, width / at.group) * at.group);
    blocks = (at.M + columns - 1) / columns;
    tokens = std::max({(at.N + kChunks - 1) / kChunks, kElements / columns, int64_t{1}});
    chunks = std::max<int64_t>(1, (at.N + tokens - 1) / tokens);
  }
  int64_t units(const Tokens& at) const { return at.B * chunks * blocks; }
};

// Statistics keep a few tokens of a block in the L1 cache, the more the better; sums only themselves.
inline Split statistics_split(const Tokens& at) { return Split(at, 512); }
inline Split sums_split(const Tokens& at) { return Split(at, 2048); }

// Units of the passes that change tokens one by one: so many rows of all samples together.
inline int64_t unit_tokens(const Tokens& at) { return std::max<int64_t>(1, 16384 / at.M); }
inline int64_t token_units(const Tokens& at) { return (at.B * at.N + unit_tokens(at) - 1) / unit_tokens(at); }

// Elements of a sample whose exponentials stay in a core's own cache.
constexpr int64_t kSampleElements = 65536;

// All but logits, attention and grad have the type in which these accumulate. statistics [B, 2, M] holds maximum and
// sum; sums, lse and reduced are [B, M], mass is [B, N, groups]. partial has an axis of chunks behind B; where there is
// one chunk it is the result. The passes that join partial results, and log_sum_exp, have samples for units. What is
// made of logits and of grad may be written over them.
struct DoubleNormPasses {
  static const DoubleNormPasses base[kScalars], v3[kScalars], v4[kScalars];

  void (*column_statistics)(const Tokens&, const void* logits, void* partial, int64_t begin, int64_t end);
  void (*join_statistics)(const Tokens&, const void* partial, void* statistics, int64_t begin, int64_t end);
  void (*log_sum_exp)(const Tokens&, const void* statistics, void* lse, int64_t begin, int64_t end);
  void (*double_norm)(const Tokens&, const void* logits, const void* lse, double eps, void* attention, void* mass,
                      int64_t begin, int64_t end);
  // From the logits at once, without padding, where a sample has at most kSampleElements. Units are samples.
  void (*whole)(const Tokens&, const void* logits, double eps, void* attention, void* mass, int64_t begin, int64_t end);
  void (*backward_reduce)(const Tokens&, const void* grad, const void* attention, void* partial, int64_t begin,
                          int64_t end);
  void (*join_sums)(const Tokens&, const void* partial, void* sums, int64_t begin, int64_t end);
  void (*backward)(const Tokens&, const void* grad, const void* attention, const void* mass, const void* reduced,
                   void* grad_logits, int64_t begin, int64_t end);
};

}  // namespace aia::cpu
