// What the CUDA passes look like from outside: plain pointers and sizes, no torch header, no CUDA header. Each queues
// its kernel on the given stream of the current device and returns the error code of the launch, 0 on success.
#pragma once

#include <cstdint>

namespace aia::cuda {

enum Context : int { kNone = 0, kChannel = 1, kSpacetime = 3 };
enum class Scalar : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class Order : int { kTCHW, kTHWC, kCTHW };

// x [B, T, C, H, W], stored densely in an order. Map order: that of x with the pooled letter struck out. A clip and its
// packed maps hold fewer than 2^30 elements each, so offsets are 64-bit between clips and 32-bit within one.
struct Shape {
  int64_t B;
  int T, C, H, W;
  Order order;
  Scalar scalar;
};

// A packed gate [B, M], or none.
struct Gate {
  const void* maps;
  int context;
};

// Packed gradients of pooled features [B, 2, M] (maximum, mean) with the index of the maximum [B, M], or none.
struct Unpooled {
  const void* grad;
  const void* argmax;
  int index_bytes;
  int context;
};

int pool(const Shape&, const void* x, int context, Gate, void* pooled, void* argmax, int index_bytes, void* stream);
int unpool(const Shape&, const void* grad_y, Gate, Unpooled, Gate inner_gate, Unpooled inner, void* grad_x,
           void* stream);
int unpool_reduce(const Shape&, const void* x, Unpooled, int gate_context, void* grad_gate, void* stream);

// The words of the CUDA runtime for an error code.
const char* error_string(int error);

}  // namespace aia::cuda
