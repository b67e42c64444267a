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

// Threads share the units of every pass.
struct Shared {
  template <class Body>
  void operator()(int64_t units, int64_t elements, const Body& body) const {
    split(units, elements, body);
  }
  int64_t threads() const { return torch::stable::get_num_threads(); }
};
// A thread does all units by itself.
struct Alone {
  template <class Body>
  void operator()(int64_t units, int64_t, const Body& body) const {
    body(int64_t{0}, units);
  }
  int64_t threads() const { return 1; }
};

inline int64_t elements_of(const Activation& a) { return a.B * a.T * a.C * a.H * a.W; }

// Whether threads take clips of their own: where all get as many, or nearly so. What a pass leaves in cache the next
// one then finds there, and no thread waits for another in between.
inline bool takes_own_clips(const Activation& a) {
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  return threads == 1 || (elements_of(a) >= kElementsAlone && (a.B % threads == 0 || a.B >= 4 * threads));
}

// Calls body(first, count, way) for clips [first, first + count), which go through a few passes together.
template <class Body>
void for_clips(const Activation& a, const Body& body) {
  if (!takes_own_clips(a)) return body(int64_t{0}, a.B, Shared{});
  parallel(a.B, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b, int64_t{1}, Alone{});
  });
}

// An element of a map takes a gate 54 multiply-adds.
constexpr int64_t kCostOfGate = 8;
template <class Body, class Way>
void split_gates(const PackedDims& d, const Way& way, const Body& body) {
  way(gate_units(d), kCostOfGate * d.B * d.packed(), body);
}

template <class Way = Shared>
void pool_into(const Activation& a, const void* x, const Gate& guide, int context, void* pooled, void* argmax,
               int index_bytes, const Way& way = {}) {
  const PoolPasses& pass = passes<PoolPasses>(a.scalar);
  const Volume v = volume_of(a, way.threads(), pass.lanes);
  way(reduction_units(v, context), elements_of(a),
      [&](int64_t begin, int64_t end) { pass.pool(v, x, guide, context, pooled, argmax, index_bytes, begin, end); });
}

template <class Way = Shared>
void unpool_into(const Activation& a, const void* grad_y, const Gate& gate, const Unpooled& outer,
                 const Gate& inner_gate, const Unpooled& inner, void* grad_x, const Way& way = {}) {
  const PoolPasses& pass = passes<PoolPasses>(a.scalar);
  const Volume v = volume_of(a, way.threads(), pass.lanes);
  const int highest = std::max({gate.context, outer.context, inner_gate.context, inner.context});
  way(elementwise_units(v, highest), elements_of(a),
      [&](int64_t begin, int64_t end) { pass.unpool(v, grad_y, gate, outer, inner_gate, inner, grad_x, begin, end); });
}

template <class Way = Shared>
void unpool_reduce_into(const Activation& a, const void* x, const Unpooled& from, int gate_context, void* grad_gate,
                        const Way& way = {}) {
  const PoolPasses& pass = passes<PoolPasses>(a.scalar);
  const Volume v = volume_of(a, way.threads(), pass.lanes);
  way(reduction_units(v, gate_context), elements_of(a),
      [&](int64_t begin, int64_t end) { pass.unpool_reduce(v, x, from, gate_context, grad_gate, begin, end); });
}

// Of packed spacetime gates [B, M] the average over channels [B, T * H * W], and the transpose.
template <class A, class Way = Shared>
void average_into(const Activation& a, const A* gate, A* averaged, const Way& way = {}) {
  const Volume v = volume_of(a, way.threads());
  way(a.B, a.B * a.packed(kSpacetime),
      [&](int64_t begin, int64_t end) { passes<AveragePasses<A>>().average(v, gate, averaged, begin, end); });
}
template <class A, class Way = Shared>
void spread_into(const Activation& a, const A* grad, A* grad_gate, const Way& way = {}) {
  const Volume v = volume_of(a, way.threads());
  way(a.B, a.B * a.packed(kSpacetime),
      [&](int64_t begin, int64_t end) { passes<AveragePasses<A>>().spread(v, grad, grad_gate, begin, end); });
}

template <class Way = Shared>
void recalibrate_into(const Activation& a, const void* x, const Gate& gate, void* y, const Way& way = {}) {
  const RecalibratePasses& pass = passes<RecalibratePasses>(a.scalar);
  const Volume v = volume_of(a, way.threads(), pass.lanes);
  way(elementwise_units(v, gate.context), elements_of(a),
      [&](int64_t begin, int64_t end) { pass.recalibrate(v, x, gate, y, begin, end); });
}

template <class Way = Shared>
void recalibrate_reduce_into(const Activation& a, const void* grad_y, const void* x, int context, void* grad_gate,
                             const Way& way = {}) {
  const RecalibratePasses& pass = passes<RecalibratePasses>(a.scalar);
  const Volume v = volume_of(a, way.threads(), pass.lanes);
  way(reduction_units(v, context), elements_of(a),
      [&](int64_t begin, int64_t end) { pass.recalibrate_reduce(v, grad_y, x, context, grad_gate, begin, end); });
}

// Partial results of the units of gate passes, so many numbers each. Clips may be done in any order.
class Partials {
 public:
  Partials(const PackedDims& d, int per_unit) : d_(d), per_unit_(per_unit), values_(gate_units(d) * per_unit) {}

  double* of_clip(int64_t b) { return values_.data() + b * clip_units(d_) * per_unit_; }

  // Calls add(map, values) for those of every unit, in a fixed order.
  template <class Add>
  void for_each(Add&& add) {
    int64_t before = 0;
    for (int map = 0; map < d_.n; before += map_units(d_, map++))
      for (int64_t b = 0; b < d_.B; ++b)
        for (int64_t i = 0; i < map_units(d_, map); ++i) add(map, of_clip(b) + (before + i) * per_unit_);
  }

 private:
  const PackedDims d_;
  const int per_unit_;
  std::vector<double> values_;
};

inline PackedDims clips_of(PackedDims d, int64_t count) {
  d.B = count;
  return d;
}

// The gates of one context, forward, of pooled [B, 2, M] to gate [B, M], with norm [n, 4] and statistics [n, 3]. Where
// a gate uses the statistics of the batch, all clips must have been convolved before finish, and gates stand in `gate`
// after activate only.
template <class A>
class GatesForward {
 public:
  GatesForward(const PackedDims& d, const Gates& gates, const A* pooled, A* gate, A* norm, A* statistics)
      : d_(d),
        gates_(gates),
        of_batch_(std::any_of(gates.begin(), gates.begin() + d.n, [](const auto& of) { return of.batch; })),
        pooled_(pooled),
        gate_(gate),
        norm_(norm),
        statistics_(statistics),
        weight_(contiguous_weights<A>(gates, d.n)),
        moments_(of_batch_ ? d : clips_of(d, 0), kMomentPartials) {
    if (!of_batch_) finish();
  }

  template <class Way>
  void convolve(int64_t first, int64_t count, const Way& way) {
    const PackedDims d = clips_of(d_, count);
    const A* pooled = pooled_ + first * 2 * d.packed();
    A* gate = gate_ + first * d.packed();
    split_gates(d, way, [&](int64_t begin, int64_t end) {
      if (of_batch_)
        pass_.conv(d, pooled, weight_.data(), gate, moments_.of_clip(first), begin, end);
      else
        pass_.conv_activate(d, pooled, weight_.data(), norm_, gate, gate, begin, end);
    });
  }
  void finish() {
    Moments total[3] = {Moments::none(), Moments::none(), Moments::none()};
    moments_.for_each([&](int map, const double* p) { total[map].merge({p[0], p[1], p[2]}); });
    for (int i = 0; i < d_.n; ++i)
      finish_norm(gates_[i], total[i].mean, total[i].squares / total[i].count, total[i].count, norm_ + 4 * i,
                  statistics_ + 3 * i);
  }
  template <class Way>
  void activate(int64_t first, int64_t count, const Way& way) const {
    if (!of_batch_) return;
    const PackedDims d = clips_of(d_, count);
    A* gate = gate_ + first * d.packed();
    split_gates(d, way, [&](int64_t begin, int64_t end) { pass_.activate(d, gate, norm_, gate, begin, end); });
  }

 private:
  const PackedDims d_;
  const Gates& gates_;
  const bool of_batch_;
  const GatePasses<A>& pass_ = passes<GatePasses<A>>();
  const A* const pooled_;
  A *const gate_, *const norm_, *const statistics_;
  const std::vector<A> weight_;
  Partials moments_;
};

// z and gate of clips, [count, M], of their pooled features.
template <class A, class Way>
void gate_again_into(const PackedDims& d, const A* weight, const A* pooled, const A* norm, A* z, A* gate,
                     const Way& way) {
  split_gates(d, way, [&](int64_t begin, int64_t end) {
    passes<GatePasses<A>>().conv_activate(d, pooled, weight, norm, z, gate, begin, end);
  });
}

// The gradients of the shift and the scale of each gate, sums [n, 2].
template <class A>
class NormsBackward {
 public:
  NormsBackward(const PackedDims& d, const A* norm, A* sums) : d_(d), norm_(norm), sums_(sums) {}

  // Maps of clips, [count, M]. Where the gates of z are known, the gradient of the sigmoids' arguments is written to
  // grad, which may be grad_gate.
  template <class Way>
  void reduce(int64_t first, int64_t count, const A* grad_gate, const A* z, const A* known, A* grad, const Way& way) {
    const PackedDims d = clips_of(d_, count);
    split_gates(d, way, [&](int64_t begin, int64_t end) {
      passes<GatePasses<A>>().backward_reduce(d, grad_gate, z, known, norm_, grad, partials_.of_clip(first), begin,
                                              end);
    });
  }
  // When all clips are reduced.
  void finish() {
    double total[3][2] = {};
    partials_.for_each([&](int map, const double* p) { total[map][0] += p[0], total[map][1] += p[1]; });
    for (int i = 0; i < 2 * d_.n; ++i) sums_[i] = static_cast<A>(total[i / 2][i % 2]);
  }

 private:
  const PackedDims d_;
  const A* const norm_;
  A* const sums_;
  Partials partials_{d_, kNormPartials};
};

// What the forward of a context keeps for its backward: pooled features [B, 2, M] and, as above, norm and statistics.
template <class A>
struct MadeOf {
  const A *pooled, *norm, *statistics;
};

// Back through the norms, of which the sums are known, and the convolutions of one context.
template <class A>
class ConvolutionsBackward {
 public:
  ConvolutionsBackward(const PackedDims& d, const Gates& gates, const MadeOf<A>& of, const A* sums)
      : d_(d), of_(of), sums_(sums), weight_(contiguous_weights<A>(gates, d.n)) {}

  template <class Way>
  void again(int64_t first, int64_t count, A* z, A* gate, const Way& way) const {
    gate_again_into(clips_of(d_, count), weight_.data(), pooled(first), of_.norm, z, gate, way);
  }
  // Maps of clips, from the gradient of the gates (of_gate) or of the sigmoids' arguments.
  template <class Way>
  void convolve(int64_t first, int64_t count, const A* grad, bool of_gate, const A* z, A* grad_pooled, const Way& way) {
    const PackedDims d = clips_of(d_, count);
    A mean[6];
    for (int i = 0; i < 2 * d.n; ++i) mean[i] = mean_of(sums_[i], of_.statistics[i / 2 * 3 + 2]);
    split_gates(d, way, [&](int64_t begin, int64_t end) {
      passes<GatePasses<A>>().backward(d, grad, of_gate, z, of_.norm, mean, pooled(first), weight_.data(), grad_pooled,
                                       partials_.of_clip(first), begin, end);
    });
  }
  // When all clips are convolved: the gradients of the weights, each into the weight of grads, if that is there.
  void finish(const Gates& grads) {
    double total[3][54] = {};
    partials_.for_each([&](int map, const double* p) {
      for (int i = 0; i < 54; ++i) total[map][i] += p[i];
    });
    for (int i = 0; i < d_.n; ++i)
      if (const Parameter& weight = grads[i].weight; weight.data)
        for_taps(grads[i], [&](int tap, int64_t offset) { write(weight, offset, total[i][tap]); });
  }

 private:
  const A* pooled(int64_t first) const { return of_.pooled + first * 2 * d_.packed(); }

  const PackedDims d_;
  const MadeOf<A> of_;
  const A* const sums_;
  const std::vector<A> weight_;
  Partials partials_{d_, kWeightPartials};
};

}  // namespace aia::cpu
