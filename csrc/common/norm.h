// What turns the z of a convolution into a gate, g = sigmoid(weight * xhat + bias) with xhat = (z - mean) * rstd, and
// its derivatives. V is A itself or a vector of A.
#pragma once

#include "scalar.h"

namespace aia {

template <class A>
struct Norm {
  A mean, rstd, weight, bias;

  template <class V>
  AIA_HOST_DEVICE V normalized(V z) const {
    return (z - mean) * rstd;
  }
  // exponential: the exponential function of V; its infinity is a gate of 0.
  template <class V, class Exponential>
  AIA_HOST_DEVICE V gate(V xhat, Exponential&& exponential) const {
    return A(1) / (A(1) + exponential(-(xhat * weight + bias)));
  }
  // The gradient of z, given that of the sigmoid's argument and its means (of itself, and times xhat) over the batch.
  template <class V>
  AIA_HOST_DEVICE V grad_z(V grad, V xhat, A mean_grad, A mean_grad_xhat) const {
    return (grad - mean_grad - xhat * mean_grad_xhat) * (weight * rstd);
  }
};

}  // namespace aia
