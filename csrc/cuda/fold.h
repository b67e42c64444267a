// What the CUDA passes that fold the batch norm of external attention's block into V look like from outside; see
// passes.h.
#pragma once

#include "passes.h"

namespace aia::cuda {

// V [C, M], of a scalar, contiguous; eps is that of the batch norm. What is not V, and no parameter, is in its
// accumulation type.
struct Folding {
  int C, M;
  Scalar scalar;
  double eps;
};

// Sums over the tokens of a batch, of A' = A - origin: origin and total are [M], second is [M, M]. All of them null
// where statistics are fixed.
struct BatchSums {
  const void *origin, *total, *second;
};

// factor * V in the type of V, shift [C], statistics [C, 3], and total / count [M], null where statistics are fixed:
// then mean and var are those. weight and bias may be absent.
struct Folded {
  void *value, *shift, *statistics, *off;
};
int fold(const Folding&, const void* value, Parameter weight, Parameter bias, const BatchSums&, double count,
         Parameter mean, Parameter var, const Folded&, void* stream);

// What the gradients know of the forward pass. off [M] is null where statistics are fixed, and total and second then
// are too; both are here those of the process.
struct FoldKept {
  const void *value, *statistics, *off, *total, *second;
};

// Of the gradient g behind the batch norm, product = g^T A' [C, M], or g^T A: joint [2, C], its sums, which are given,
// and the gradient of weight; and center [C], the mean of z beside V origin.
int fold_sums(const Folding&, const FoldKept&, const void* product, const void* sums, void* joint, void* center,
              void* stream);

// The gradient of V and factor * V, both [C, M] in the type of V; inner [M, M] and constant [M], null where statistics
// are fixed.
struct FoldGradients {
  void *value, *folded, *inner, *constant;
};
int fold_back(const Folding&, const FoldKept&, Parameter weight, const void* product, const void* joint,
              const void* center, const FoldGradients&, void* stream);

}  // namespace aia::cuda
