// How a reduction over rows is split into chunks, for blocks of their own. Depends on nothing but sizes.
#pragma once

#include <algorithm>

#include "passes.h"

namespace aia::cuda {

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

struct Split {
  int64_t length;  // rows of a chunk
  int chunks;

  // `others`: the blocks that there would be with one chunk; `least`: the rows that are worth a block.
  Split(int64_t rows, int64_t others, int64_t least) {
    constexpr int64_t kBlocks = 4 * kMultiprocessors;
    const int64_t wanted = std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, others));
    length = std::max<int64_t>(least, (rows + wanted - 1) / wanted);
    chunks = static_cast<int>(std::max<int64_t>(1, (rows + length - 1) / length));
  }
};

}  // namespace aia::cuda
