// What turns the z of a convolution into a gate, g = sigmoid(weight * xhat + bias) with xhat = (z - mean) * rstd, and
// its derivatives. V is A itself or a vector of A.
#pragma once

#include <cmath>

#include "packed.h"
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

// Element i of a parameter.
template <class A>
AIA_HOST_DEVICE A read(const Parameter& p, int64_t i) {
  switch (p.scalar) {
    case Scalar::kFloat64: return static_cast<A>(static_cast<const double*>(p.data)[i]);
    case Scalar::kBFloat16: return widen(static_cast<const BFloat16*>(p.data)[i]);
    case Scalar::kFloat16: return widen(static_cast<const Float16*>(p.data)[i]);
    default: return static_cast<const float*>(p.data)[i];
  }
}

template <class A>
AIA_HOST_DEVICE void write(const Parameter& p, int64_t i, A value) {
  switch (p.scalar) {
    case Scalar::kFloat64: static_cast<double*>(p.data)[i] = value; break;
    case Scalar::kBFloat16: static_cast<BFloat16*>(p.data)[i] = narrow<BFloat16>(static_cast<float>(value)); break;
    case Scalar::kFloat16: static_cast<Float16*>(p.data)[i] = narrow<Float16>(static_cast<float>(value)); break;
    default: static_cast<float*>(p.data)[i] = static_cast<float>(value);
  }
}

// Where tap k of 27 of a feature lies in the weight of a gate.
AIA_HOST_DEVICE int64_t tap_offset(const GateParameters& gate, int feature, int k) {
  return feature * gate.stride[0] + k / 9 * gate.stride[1] + k / 3 % 3 * gate.stride[2] + k % 3 * gate.stride[3];
}

// What one gate is normalized by, from the moments of its z over `count` elements, which it may not use: norm [4] is
// mean, rstd, scale and shift, statistics [3] mean, variance and the share of one element in them.
template <class A>
AIA_HOST_DEVICE void finish_norm(const GateParameters& p, double mean, double var, double count, A* norm,
                                 A* statistics) {
  const auto value = [](const Parameter& number, A absent) { return number.data ? read<A>(number, 0) : absent; };
  norm[0] = statistics[0] = p.batch ? static_cast<A>(mean) : value(p.mean, 0);
  statistics[1] = p.batch ? static_cast<A>(var) : value(p.var, 1);
  statistics[2] = p.batch ? static_cast<A>(1 / count) : A(0);
  norm[1] = static_cast<A>(1 / std::sqrt(static_cast<double>(statistics[1]) + p.eps));
  norm[2] = value(p.scale, 1);
  norm[3] = value(p.shift, 0);
}

// The mean over the batch from its sum; 0 where the statistics are not the batch's, whatever the sum: a NaN in one clip
// must not reach the others through statistics that they do not share.
template <class A>
AIA_HOST_DEVICE A mean_of(A sum, A share) {
  return share > A(0) ? sum * share : A(0);
}

// Element c of a running mean and variance moved toward the statistics [3] of a batch, as torch's lerp does. The
// running variance is unbiased.
template <class A>
AIA_HOST_DEVICE void move_statistics(const A* statistics, A momentum, const Parameter& running_mean,
                                     const Parameter& running_var, int64_t c) {
  const auto move = [&](const Parameter& running, A latest) {
    const A before = read<A>(running, c), change = latest - before;
    write(running, c, momentum < A(0.5) ? before + momentum * change : latest - change * (A(1) - momentum));
  };
  move(running_mean, statistics[0]);
  move(running_var, statistics[1] / (A(1) - statistics[2]));
}

}  // namespace aia
