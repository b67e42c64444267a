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
  // The gradient of z, given that of the sigmoid's argument and its means (of itself, and times xhat) over the batch. A
  // product with zero is left out: an infinite z would make a NaN of it.
  template <class V>
  AIA_HOST_DEVICE V grad_z(V grad, V xhat, A mean_grad, A mean_grad_xhat) const {
    const V corrected = mean_grad_xhat == A(0) ? grad - mean_grad : grad - mean_grad - xhat * mean_grad_xhat;
    return corrected * (weight * rstd);
  }
};

}  // namespace aia
