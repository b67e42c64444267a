// The vocabulary of the passes that the compiled backends share: plain types and sizes, no torch header
// (aia_kernels/common/maps.py has the geometry).
#pragma once

#include <cstdint>

namespace aia {

// The value of a context is the number of its maps.
enum Context : int { kNone = 0, kChannel = 1, kSpacetime = 3 };
enum class Scalar : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
// In which an activation [B, T, C, H, W] is stored densely (maps.ORDERS).
enum class Order : int { kTCHW, kTHWC, kCTHW };

// A packed gate [B, M], or none.
struct Gate {
  const void* maps;
  int context;
};

// Numbers of any scalar type, or none.
struct Parameter {
  void* data;
  Scalar scalar;
};

// What a gate is computed with, as the network keeps it: the weight of its convolution, [2, 3, 3, 3] in the map's
// stored order of axes with strides in elements, and of its normalization scale and shift (1 and 0 where absent), eps,
// and either the statistics of the batch or fixed ones (mean 0 and variance 1 where absent).
struct GateParameters {
  Parameter weight;
  int64_t stride[4];
  Parameter scale, shift, mean, var;
  double eps;
  bool batch;
};

// Packed gradients of pooled features [B, 2, M] (maximum, mean) with the index of the maximum [B, M], or none.
struct Unpooled {
  const void* grad;
  const void* argmax;
  int index_bytes;
  int context;
};

// Up to three maps [D0, D1, D2] packed in each clip, as the gate passes see them.
struct PackedDims {
  int64_t B;
  int n;
  int64_t dims[3][3];

  int64_t numel(int map) const { return dims[map][0] * dims[map][1] * dims[map][2]; }
  int64_t offset(int map) const {
    int64_t sum = 0;
    for (int i = 0; i < map; ++i) sum += numel(i);
    return sum;
  }
  int64_t packed() const { return offset(n); }
};

}  // namespace aia
