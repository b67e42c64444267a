// What the CPU passes between types look like from outside; see passes.h.
#pragma once

#include "passes.h"

namespace aia::cpu {

// So many elements, side by side, of a type to the type in which it accumulates, and back.
struct ConvertPasses {
  static const ConvertPasses base[kScalars], v3[kScalars], v4[kScalars];

  void (*widen)(const void* from, void* to, int64_t count);
  void (*narrow)(const void* from, void* to, int64_t count);
};

}  // namespace aia::cpu
