// What the CUDA passes look like from outside: plain pointers and sizes, no torch header, no CUDA header. Each queues
// its kernels on the given stream of the current device and returns the error code of the launch, 0 on success.
#pragma once

#include "../common/packed.h"

namespace aia::cuda {

// x [B, T, C, H, W], stored densely in an order. Map order: that of x with the pooled letter struck out. A clip and its
// packed maps hold fewer than 2^30 elements each, so offsets are 64-bit between clips and 32-bit within one.
struct Shape {
  int64_t B;
  int T, C, H, W;
  Order order;
  Scalar scalar;
};

// x, y and their gradients have this shape, pooled is [B, 2, M], argmax and grad_gate are [B, M].
int pool(const Shape&, const void* x, int context, Gate, void* pooled, void* argmax, int index_bytes, void* stream);
int unpool(const Shape&, const void* grad_y, Gate, Unpooled, Gate inner_gate, Unpooled inner, void* grad_x,
           void* stream);
int unpool_reduce(const Shape&, const void* x, Unpooled, int gate_context, void* grad_gate, void* stream);
int recalibrate(const Shape&, const void* x, Gate, void* y, void* stream);
int recalibrate_reduce(const Shape&, const void* grad_y, const void* x, int context, void* grad_gate, void* stream);

// Of maps, whose scalar (float32 or float64) is that of the shape: gate and spread are [B, M] over T, H and W, averaged
// and grad [B, T, H, W].
int average_gate(const Shape&, const void* gate, void* averaged, void* stream);
int average_gate_back(const Shape&, const void* grad, void* spread, void* stream);

// With 0 <= 2 * fold <= C. y does not overlap x.
int temporal_shift(const Shape&, const void* x, int fold, bool reverse, void* y, void* stream);

#if defined(AIA_EMULATOR)
constexpr int kMultiprocessors = 3;
#else
constexpr int kMultiprocessors = 132;  // of an H200
#endif
// A gate pass has at most so many blocks. Blocks that wait for one another, for sums over the batch, must all run at
// once, and there is at most one for each multiprocessor of the current device: a launch that fills the device could
// not begin before all other work there has ended.
constexpr int kGateBlocks = 4 * kMultiprocessors, kFewestGateBlocks = 3;
int gate_blocks_together();

// The memory through which such blocks exchange sums: [blocks, partials] doubles, with the partials of the pass. There
// are at most so many blocks, and at least one for each map.
constexpr int kMomentPartials = 4, kNormPartials = 2, kWeightPartials = kNormPartials + 54;
struct Workspace {
  double* data;
  int blocks;
};

// The gate passes, on n packed maps of a scalar (float32 or float64) with fewer than 2^30 elements per clip: pooled
// and grad_pooled [B, 2, M]; gate, z and grad_gate [B, M]; norm [n, 4]; statistics [n, 3]; sums [n, 2], or null; gates
// and grads [n]. Of grads only the weight counts: it is written.
int gate(const PackedDims&, Scalar, const GateParameters* gates, const void* pooled, void* gate, void* norm,
         void* statistics, Workspace, void* stream);
int gate_again(const PackedDims&, Scalar, const GateParameters* gates, const void* pooled, const void* norm, void* gate,
               void* z, void* stream);
int gate_backward_reduce(const PackedDims&, Scalar, const void* grad_gate, const void* z, const void* norm, void* sums,
                         Workspace, void* stream);
// What the gradient of the gates needs of the forward pass.
struct GateKept {
  const void *pooled, *z, *norm, *statistics;
};
int gate_backward(const PackedDims&, Scalar, const GateParameters* gates, const GateParameters* grads,
                  Parameter grad_affine, const GateKept&, const void* grad_gate, const void* sums, void* grad_pooled,
                  Workspace, void* stream);

// Running statistics of some BNs, new ones of a scalar (float32 or float64), and their numbers of batches.
struct Running {
  static constexpr int kMost = 8;
  int norms, numbers;
  Parameter mean[kMost], var[kMost];  // [C] each
  const void* statistics[kMost];      // [C, 3]: mean, variance, share of an element
  int64_t channels[kMost];            // C
  int64_t* tracked[kMost];            // a number each
};
int move_statistics(const Running&, Scalar, double momentum, void* stream);

// The words of the CUDA runtime for an error code.
const char* error_string(int error);

}  // namespace aia::cuda
