// The passes of Attention in Attention on memory that somebody has checked and allocated: the choice of the instruction
// level, the split over threads, and what is summed up between them. The work itself is in cpu/.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "../common/moments.h"
#include "../cpu/average.h"
#include "cpu.h"
#include "cpu_gates.h"

namespace aia::cpu {

// An element of a map takes a gate 54 multiply-adds.
constexpr int64_t kCostOfGate = 8;
inline int64_t elements_of(const Activation& a) { return a.B * a.T * a.C * a.H * a.W; }
template <class Body>
void split_gates(const PackedDims& d, const Body& body) {
  split(gate_units(d), kCostOfGate * d.B * d.packed(), body);
}

inline void pool_into(const Activation& a, const void* x, const Gate& guide, int context, void* pooled, void* argmax,
                      int index_bytes) {
  const PoolPasses& pass = passes<PoolPasses>(a.scalar);
  const Volume v = volume_of(a, pass.lanes);
  split(reduction_units(v, context), elements_of(a),
        [&](int64_t begin, int64_t end) { pass.pool(v, x, guide, context, pooled, argmax, index_bytes, begin, end); });
}

inline void unpool_into(const Activation& a, const void* grad_y, const Gate& gate, const Unpooled& outer,
                        const Gate& inner_gate, const Unpooled& inner, void* grad_x) {
  const PoolPasses& pass = passes<PoolPasses>(a.scalar);
  const Volume v = volume_of(a, pass.lanes);
  const int highest = std::max({gate.context, outer.context, inner_gate.context, inner.context});
  split(elementwise_units(v, highest), elements_of(a), [&](int64_t begin, int64_t end) {
    pass.unpool(v, grad_y, gate, outer, inner_gate, inner, grad_x, begin, end);
  });
}

inline void unpool_reduce_into(const Activation& a, const void* x, const Unpooled& from, int gate_context,
                               void* grad_gate) {
  const PoolPasses& pass = passes<PoolPasses>(a.scalar);
  const Volume v = volume_of(a, pass.lanes);
  split(reduction_units(v, gate_context), elements_of(a),
        [&](int64_t begin, int64_t end) { pass.unpool_reduce(v, x, from, gate_context, grad_gate, begin, end); });
}

// Of packed spacetime gates [B, M] the average over channels [B, T * H * W], and the transpose.
template <class A>
void average_into(const Activation& a, const A* gate, A* averaged) {
  const Volume v = volume_of(a);
  split(a.B, a.B * a.packed(kSpacetime),
        [&](int64_t begin, int64_t end) { passes<AveragePasses<A>>().average(v, gate, averaged, begin, end); });
}
template <class A>
void spread_into(const Activation& a, const A* grad, A* grad_gate) {
  const Volume v = volume_of(a);
  split(a.B, a.B * a.packed(kSpacetime),
        [&](int64_t begin, int64_t end) { passes<AveragePasses<A>>().spread(v, grad, grad_gate, begin, end); });
}

inline void recalibrate_into(const Activation& a, const void* x, const Gate& gate, void* y) {
  const RecalibratePasses& pass = passes<RecalibratePasses>(a.scalar);
  const Volume v = volume_of(a, pass.lanes);
  split(elementwise_units(v, gate.context), elements_of(a),
        [&](int64_t begin, int64_t end) { pass.recalibrate(v, x, gate, y, begin, end); });
}

inline void recalibrate_reduce_into(const Activation& a, const void* grad_y, const void* x, int context,
                                    void* grad_gate) {
  const RecalibratePasses& pass = passes<RecalibratePasses>(a.scalar);
  const Volume v = volume_of(a, pass.lanes);
  split(reduction_units(v, context), elements_of(a),
        [&](int64_t begin, int64_t end) { pass.recalibrate_reduce(v, grad_y, x, context, grad_gate, begin, end); });
}

// Calls add(map, values) for the partial results of every unit, in a fixed order.
template <class Add>
void for_partials(const PackedDims& d, const std::vector<double>& partial, int per_unit, Add&& add) {
  const double* values = partial.data();
  for (int map = 0; map < d.n; ++map)
    for (int64_t i = 0; i < d.B * map_units(d, map); ++i, values += per_unit) add(map, values);
}

// Of pooled [B, 2, M]: gate [B, M], norm [n, 4] and statistics [n, 3].
template <class A>
void gate_into(const PackedDims& d, const Gates& gates, const A* pooled, A* gate, A* norm, A* statistics) {
  const std::vector<A> w = contiguous_weights<A>(gates, d.n);
  const GatePasses<A>& pass = passes<GatePasses<A>>();
  Moments total[3] = {Moments::none(), Moments::none(), Moments::none()};
  const bool of_batch = std::any_of(gates.begin(), gates.begin() + d.n, [](const auto& of) { return of.batch; });
  if (of_batch) {
    std::vector<double> partial(gate_units(d) * kMomentPartials);
    parallel(gate_units(d),
             [&](int64_t begin, int64_t end) { pass.conv(d, pooled, w.data(), gate, partial.data(), begin, end); });
    for_partials(d, partial, kMomentPartials, [&](int map, const double* p) { total[map].merge({p[0], p[1], p[2]}); });
  }
  for (int i = 0; i < d.n; ++i)
    finish_norm(gates[i], total[i].mean, total[i].squares / total[i].count, total[i].count, norm + 4 * i,
                statistics + 3 * i);
  split_gates(d, [&](int64_t begin, int64_t end) {
    if (of_batch)
      pass.activate(d, gate, norm, gate, begin, end);
    else
      pass.conv_activate(d, pooled, w.data(), norm, gate, gate, begin, end);
  });
}

template <class A>
void gate_again_into(const PackedDims& d, const Gates& gates, const A* pooled, const A* norm, A* z, A* gate) {
  const std::vector<A> w = contiguous_weights<A>(gates, d.n);
  split_gates(d, [&](int64_t begin, int64_t end) {
    passes<GatePasses<A>>().conv_activate(d, pooled, w.data(), norm, z, gate, begin, end);
  });
}

// Gradients of the shift and the scale of each gate, sums [n, 2]. Where the gates of z are known, the gradient of the
// sigmoids' arguments is written to grad, which may be grad_gate.
template <class A>
void sums_into(const PackedDims& d, const A* grad_gate, const A* z, const A* known, const A* norm, A* grad, A* sums) {
  std::vector<double> partial(gate_units(d) * kNormPartials);
  split_gates(d, [&](int64_t begin, int64_t end) {
    passes<GatePasses<A>>().backward_reduce(d, grad_gate, z, known, norm, grad, partial.data(), begin, end);
  });
  double total[3][2] = {};
  for_partials(d, partial, kNormPartials,
               [&](int map, const double* p) { total[map][0] += p[0], total[map][1] += p[1]; });
  for (int i = 0; i < 2 * d.n; ++i) sums[i] = static_cast<A>(total[i / 2][i % 2]);
}

// What the forward of a context knows of z [B, M]: norm [n, 4] and statistics [n, 3], and the pooled features [B, 2, M]
// that it was made of.
template <class A>
struct MadeOf {
  const A *z, *norm, *statistics, *pooled;
};

// The gradient of pooled features, from that of the gates (of_gate) or of the sigmoids' arguments, and those of the
// weights, each into the weight of grads, if that is there.
template <class A>
void back_through_convolution_into(const PackedDims& d, const Gates& gates, const A* grad, bool of_gate,
                                   const MadeOf<A>& of, const A* sums, A* grad_pooled, const Gates& grads) {
  A mean[6];
  for (int i = 0; i < 2 * d.n; ++i) mean[i] = mean_of(sums[i], of.statistics[i / 2 * 3 + 2]);
  const std::vector<A> w = contiguous_weights<A>(gates, d.n);
  std::vector<double> partial(gate_units(d) * kWeightPartials);
  split_gates(d, [&](int64_t begin, int64_t end) {
    passes<GatePasses<A>>().backward(d, grad, of_gate, of.z, of.norm, mean, of.pooled, w.data(), grad_pooled,
                                     partial.data(), begin, end);
  });
  double total[3][54] = {};
  for_partials(d, partial, kWeightPartials, [&](int map, const double* p) {
    for (int i = 0; i < 54; ++i) total[map][i] += p[i];
  });
  for (int i = 0; i < d.n; ++i)
    if (const Parameter& weight = grads[i].weight; weight.data)
      for_taps(grads[i], [&](int tap, int64_t offset) { write(weight, offset, total[i][tap]); });
}

}  // namespace aia::cpu
