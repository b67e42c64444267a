// What the passes of attention by a memory per sample are about, the same on every device.
#pragma once

#include <cstdint>

#include "packed.h"

namespace aia {

// The feature map phi, in the order of reference.FEATURES in aia_kernels/reference/linear_attention.py.
enum class Feature { kL2, kSoftplus, kSoftmax };

// Logits [B, 2 H d, N]: of each sample the d rows of each head's keys, then those of its queries, tokens contiguous.
// padding [B, N] is 1 where a token takes no part, or null. Rows of features, and what comes of them, are [B, p, N].
struct Memory {
  int64_t B, H, d, N;
  Feature feature;
  Scalar scalar;
  const uint8_t* padding;

  // Rows of phi of a head: l2 has a constant 1 before the features.
  int64_t R() const { return d + (feature == Feature::kL2 ? 1 : 0); }
  int64_t heads() const { return B * H; }
};

}  // namespace aia
