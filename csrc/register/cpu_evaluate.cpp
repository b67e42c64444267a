// The CPU implementation of a whole unit with fixed statistics (evaluate of aia_kernels/schemas.py): no clip depends on
// another, so each goes through all passes while it is in cache, with maps that all clips of a thread share.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>
#include <vector>

#include "cpu.h"
#include "cpu_gates.h"
#include "cpu_unit.h"
#include "cpu_unit_steps.h"

namespace {

using aia::Activation;
using aia::Gate;
using aia::Gates;
using aia::kChannel;
using aia::kNone;
using aia::Numbers;
using aia::PackedDims;
using aia::cpu::AveragePasses;
using aia::cpu::ContextOfGates;
using aia::cpu::GatePasses;
using aia::cpu::maps_of;
using aia::cpu::passes;
using aia::cpu::PoolPasses;
using aia::cpu::RecalibratePasses;
using aia::cpu::Volume;
using torch::stable::Tensor;

// One context of a unit on one clip: x is pooled, and gates come of it.
template <class A>
class ContextGates {
 public:
  ContextGates(const Volume& clip, const Gates& gates, int context)
      : clip_(clip),
        context_(context),
        dims_(maps_of(clip, context)),
        weight_(aia::cpu::contiguous_weights<A>(gates, context)),
        norm_(4 * context) {
    A statistics[3];
    for (int i = 0; i < context; ++i) aia::finish_norm(gates[i], 0, 0, 1, norm_.data() + 4 * i, statistics);
  }

  // Elements of type A that the maps of a clip take: two features and the gates.
  int64_t elements() const { return context_ ? packed() * 3 : 0; }

  // split(units, body) calls body(begin, end) for all units.
  template <class Split>
  Gate operator()(const void* x, const Gate& guide, A* maps, const Split& split) const {
    A *pooled = maps, *gate = maps + 2 * packed();
    split(aia::cpu::reduction_units(clip_, context_), [&](int64_t begin, int64_t end) {
      passes<PoolPasses>(clip_.scalar).pool(clip_, x, guide, context_, pooled, nullptr, 0, begin, end);
    });
    split(aia::cpu::gate_units(dims_), [&](int64_t begin, int64_t end) {
      passes<GatePasses<A>>().conv_activate(dims_, pooled, weight_.data(), norm_.data(), gate, gate, begin, end);
    });
    return {gate, context_};
  }

 private:
  int64_t packed() const { return clip_.packed(context_); }

  const Volume& clip_;
  const int context_;
  const PackedDims dims_;
  const std::vector<A> weight_;
  std::vector<A> norm_;
};

template <class A>
void evaluate_clips(const Activation& a, const ContextOfGates& inner, const ContextOfGates& outer, const char* data,
                    char* y) {
  const int64_t itemsize = aia::bytes_of(a.scalar);
  const Volume x = aia::cpu::volume_of(a, aia::cpu::takes_own_clips(a) ? 1 : torch::stable::get_num_threads(),
                                       passes<PoolPasses>(a.scalar).lanes);
  Volume clip = x;
  clip.B = 1;
  const ContextGates<A> guide_of(clip, inner.gates, inner.context), gate_of(clip, outer.gates, outer.context);
  const auto run = [&](int64_t begin, int64_t end, const auto& split) {
    const int64_t gates = guide_of.elements() + gate_of.elements(),
                  average = inner.averaged ? clip.packed(kChannel) : 0;
    const int64_t elements = gates + average;
    const std::unique_ptr<A[]> maps(new A[elements]);
    aia::cpu::advise_large_pages(maps.get(), elements * sizeof(A));
    for (int64_t b = begin; b < end; ++b) {
      const char* from = data + b * x.stride_b * itemsize;
      char* to = y + b * x.stride_b * itemsize;
      Gate guide{nullptr, kNone};
      if (inner.context) guide = guide_of(from, guide, maps.get(), split);
      if (inner.averaged) {
        A* averaged = maps.get() + gates;
        passes<AveragePasses<A>>().average(clip, static_cast<const A*>(guide.maps), averaged, 0, 1);
        guide = {averaged, kChannel};
      }
      const Gate gate = gate_of(from, guide, maps.get() + guide_of.elements(), split);
      split(aia::cpu::elementwise_units(clip, outer.context), [&](int64_t first, int64_t last) {
        passes<RecalibratePasses>(x.scalar).recalibrate(clip, from, gate, to, first, last);
      });
    }
  };
  const auto one_thread = [](int64_t units, const auto& body) { body(0, units); };
  // Threads take clips of their own where all get as many, or nearly so; else they share each.
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  if (threads == 1 || aia::cpu::elements_of(a) < aia::cpu::kElementsAlone)
    run(0, x.B, one_thread);
  else if (x.B % threads == 0 || x.B >= 4 * threads)
    aia::cpu::parallel(x.B, [&](int64_t begin, int64_t end) { run(begin, end, one_thread); });
  else
    run(0, x.B, [](int64_t units, const auto& body) { aia::cpu::parallel(units, body); });
}

Tensor evaluate(const Tensor& x, std::vector<Tensor> weight, Numbers scale, Numbers shift, Numbers mean, Numbers var,
                std::vector<double> eps, int64_t inner, int64_t outer) {
  const Activation a = aia::activation_of(x, "x");
  const aia::UnitArguments gates(x, weight, scale, shift, mean, var, eps, inner, outer);
  Tensor y = aia::cpu::output_like(x);
  aia::cpu::evaluate_unit(a, {gates.inner, static_cast<int>(inner)}, {gates.outer, static_cast<int>(outer)},
                          x.const_data_ptr(), y.mutable_data_ptr());
  return y;
}

}  // namespace

void aia::cpu::evaluate_unit(const Activation& a, const ContextOfGates& inner, const ContextOfGates& outer,
                             const void* x, void* y) {
  const auto evaluated = a.scalar == Scalar::kFloat64 ? evaluate_clips<double> : evaluate_clips<float>;
  evaluated(a, inner, outer, static_cast<const char*>(x), static_cast<char*>(y));
}

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CPU, m) { m.impl("evaluate", TORCH_BOX(&evaluate)); }
