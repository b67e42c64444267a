// The fields that channel maps span over x, on the planes of a tile: the gate field G and the unpooled field U. A
// channel map lies along the planes, and is met as x is.
#pragma once

#include "planes.h"

namespace aia::cpu::AIA_CPU_LEVEL {

// A channel gate, or none, on the runs of a tile.
template <class A>
struct GateRun {
  const A* map;

  GateRun(const Volume& x, const Gate& gate, const Planes& at)
      : map(gate.context == kNone ? nullptr
                                  : static_cast<const A*>(gate.maps) + at.b * x.packed(kChannel) + offset_c(x, at)) {}

  template <class Lanes>
  AIA_INLINE Vec<A> operator()(int64_t i, Lanes n) const {
    return load(map + i, n);
  }
};

// U on the k-th run of a tile, or none.
template <class A>
struct UnpooledRun {
  const A *peak = nullptr, *mean = nullptr;
  const char* argmax = nullptr;
  int index_bytes = 0;
  A share = 0;
  IVec<A> here{};

  UnpooledRun(const Volume& x, const Unpooled& from, const Planes& at, int64_t k) {
    if (from.context == kNone) return;
    const int64_t packed = x.packed(kChannel), offset = offset_c(x, at);
    index_bytes = from.index_bytes;
    peak = static_cast<const A*>(from.grad) + at.b * 2 * packed + offset;
    mean = peak + packed;
    argmax = static_cast<const char*>(from.argmax) + (at.b * packed + offset) * index_bytes;
    share = A(1) / static_cast<A>(x.C);
    here = splat_index<A>(at.c + k);
  }

  template <class Lanes>
  AIA_INLINE Vec<A> operator()(int64_t i, Lanes n) const {
    const IVec<A> where = load_index<A>(argmax + i * index_bytes, index_bytes, n);
    return add_where<A>(where == here, load(mean + i, n) * share, load(peak + i, n));
  }
};

}  // namespace aia::cpu::AIA_CPU_LEVEL
