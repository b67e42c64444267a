// The temporal shift (aia_kernels/schemas.py has its definition): a copy whose source lies a frame ahead, a frame
// behind or in place, by channel. Bits move, whatever they stand for.
//
//   temporal_shift   reads 1 |X|, writes 1 |X|
#include "passes.h"
#include "vector.cuh"

namespace aia::cuda {
namespace {

constexpr int kShiftThreads = 256;

// Where the elements of a clip of y come from. Their channels are told by their place in a cycle of the channels, in
// elements, so that one comparison serves all orders.
struct Moves {
  int size, T, stride_t;  // elements of a clip, frames, elements between frames
  int cycle, fold, step;  // elements after which the channels begin anew, and of the first fold; 1 or -1 frame
  Divisor by_cycle, by_stride, by_T;

  Moves(const Shape& s, int channels, bool reverse)
      : size(s.T * s.C * s.H * s.W),
        T(s.T),
        stride_t(s.order == Order::kCTHW ? s.H * s.W : s.C * s.H * s.W),
        cycle(s.order == Order::kTCHW   ? stride_t
              : s.order == Order::kTHWC ? s.C
                                        : size),
        fold(cycle / s.C * channels),
        step(reverse ? -1 : 1),
        by_cycle(cycle),
        by_stride(stride_t),
        by_T(T) {}

  // The source of an element, and how many elements from there on follow one another in y too.
  struct Source {
    int from, run;
    bool exists;  // or y is 0
  };
  __device__ __forceinline__ Source source(int e) const {
    int place = e;
    by_cycle.divide(place);
    if (place >= 2 * fold) return {e, cycle - place, true};
    int in_frame = e, t = by_stride.divide(in_frame);
    by_T.divide(t);
    const bool first = place < fold;
    const int by = first ? step : -step;
    return {e + by * stride_t, min(first ? fold - place : 2 * fold - place, stride_t - in_frame),
            static_cast<unsigned>(t + by) < static_cast<unsigned>(T)};
  }
};

// V elements as they are kept until they are stored.
template <class E, int V>
using Held = std::conditional_t<V == 1, Vector<E, V>, Words<E, V>>;

// V elements of y from e on. A vector is read as one where its source is a vector too.
template <int V, class E>
__device__ __forceinline__ Held<E, V> gather(const Moves& moves, const E* x, int e) {
  const Moves::Source source = moves.source(e);
  if (source.run >= V && source.from % V == 0) {
    Held<E, V> whole{};
    if (source.exists) whole = *reinterpret_cast<const Held<E, V>*>(x + source.from);
    return whole;
  }
  Vector<E, V> pieces{};
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const Moves::Source one = moves.source(e + k);
    if (one.exists) pieces.at[k] = x[one.from];
  }
  return bits_as<Held<E, V>>(pieces);
}

template <class E, int V, int kVectors>
__global__ void __launch_bounds__(kShiftThreads, 1)
    temporal_shift_kernel(Moves moves,
                          const E* __restrict__ x,  // [B, T, C, H, W] in its order of storage
                          E* __restrict__ y) {      // as x
  constexpr int kStep = kShiftThreads * V;
  const int blocks = (moves.size + kVectors * kStep - 1) / (kVectors * kStep);
  const int64_t clip = static_cast<int64_t>(blockIdx.x / blocks) * moves.size;
  const int first = blockIdx.x % blocks * kVectors * kStep + threadIdx.x * V;
  x += clip;
  y += clip;
  Held<E, V> held[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k)
    if (first + k * kStep < moves.size) held[k] = gather<V>(moves, x, first + k * kStep);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int e = first + k * kStep;
    if (e < moves.size) *reinterpret_cast<Held<E, V>*>(y + e) = held[k];
  }
}

// For elements of the size of E.
template <class E>
int shift(const Shape& shape, const void* x, int fold, bool reverse, void* y, void* stream) {
  constexpr int kWide = 16 / sizeof(E), kVectors = 4;
  const Moves moves(shape, fold, reverse);
  const auto run = [&](auto kernel, int elements) {
    const int64_t blocks = shape.B * ceil_div(moves.size, kShiftThreads * elements);
    return launch(kernel, blocks, kShiftThreads, stream, moves, static_cast<const E*>(x), static_cast<E*>(y));
  };
  return are_aligned({x, y}) && moves.size % kWide == 0
             ? run(temporal_shift_kernel<E, kWide, kVectors>, kWide * kVectors)
             : run(temporal_shift_kernel<E, 1, kVectors>, kVectors);
}

}  // namespace

int temporal_shift(const Shape& shape, const void* x, int fold, bool reverse, void* y, void* stream) {
  switch (shape.scalar) {
    case Scalar::kFloat32: return shift<uint32_t>(shape, x, fold, reverse, y, stream);
    case Scalar::kFloat64: return shift<uint64_t>(shape, x, fold, reverse, y, stream);
    default: return shift<uint16_t>(shape, x, fold, reverse, y, stream);
  }
}

}  // namespace aia::cuda
