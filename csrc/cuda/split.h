// Divisions of what depends on nothing but sizes: by numbers that are known on the host, and of a reduction's rows into
// chunks, for blocks of their own.
#pragma once

#include <algorithm>

#include "../common/scalar.h"
#include "passes.h"

namespace aia::cuda {

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Division of numbers below 2^31 by a number that is known on the host: a product and a shift.
struct Divisor {
  int divisor = 1;
  uint32_t factor = 1;
  int shift = 0;

  Divisor() = default;
  explicit Divisor(int divisor) : divisor(divisor) {
    while ((int64_t{1} << shift) < divisor) ++shift;
    factor = static_cast<uint32_t>(((((uint64_t{1} << shift) - divisor) << 32) / divisor) + 1);
  }
  // The quotient; leaves the rest in n.
  AIA_HOST_DEVICE int divide(int& n) const {
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * factor >> 32);
    const int quotient = static_cast<int>((high + static_cast<uint32_t>(n)) >> shift);
    n -= quotient * divisor;
    return quotient;
  }
};

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
