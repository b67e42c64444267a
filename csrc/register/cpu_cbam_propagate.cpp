// All of CBAM on the CPU as one operator for each direction (schemas.CBAM_PROPAGATE_PASSES in aia_kernels/schemas.py):
// what aia_kernels/algorithms/cbam.py calls one by one, in the same order, without the framework between.
//
// Samples are met one by one where nothing joins them: what one step has read is in the cache for the next one.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "checks_attention_in_attention.h"
#include "cpu_cbam_steps.h"
#include "cpu_running_statistics.h"

namespace {

using aia::accumulate_type;
using aia::FeatureMaps;
using aia::GateParameters;
using aia::Matrix;
using aia::new_numbers;
using aia::new_tensor;
using aia::Numbers;
using aia::cpu::Convolution;
using aia::cpu::MlpSizes;
using aia::cpu::mutable_numbers;
using aia::cpu::numbers;
using aia::cpu::output_like;
using aia::cpu::split;
using aia::cpu::with_large_pages;
using aia::cpu::with_type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The places of parameters: algorithms/cbam.py's Parameters.
enum { kWeight1, kBias1, kWeight2, kBias2, kConvolution, kScale, kShift, kParameters };

// Both gates of x: their sizes, and what they are made with, contiguous and in the type in which x accumulates but for
// the numbers of the batch norm.
struct Gates {
  FeatureMaps at;
  Matrix m;
  int64_t hidden = 0, k = 0;  // 0: there is no such gate
  Numbers of;
  GateParameters norm{};

  Gates(const Tensor& x, const Numbers& parameters) : at(aia::maps_of(x, "x")), m(aia::matrix_of(at)), of(parameters) {
    AIA_CHECK(of.size() == kParameters, "parameters must hold the ", kParameters, " that are learned, got ", of.size());
    const ScalarType type = accumulate_type(x);
    static constexpr const char* kNames[] = {"weight_1", "bias_1", "weight_2", "bias_2", "conv"};
    for (int i = 0; i <= kConvolution; ++i)
      if (of[i] && of[i]->scalar_type() != type) of[i] = aia::cpu::widened(*of[i], kNames[i]);
    const auto check = [&](int i, std::initializer_list<int64_t> sizes) {
      if (of[i]) aia::check_contiguous(*of[i], sizes, type, x, kNames[i]);
    };
    AIA_CHECK(of[kWeight1].has_value() == of[kWeight2].has_value(), "weight_1 and weight_2 must come together");
    AIA_CHECK(of[kWeight1] || of[kConvolution], "weight_1 or conv must be a tensor, got None twice");
    if (of[kWeight1]) {
      const aia::Layout first = aia::check_operand(*of[kWeight1], x, "weight_1");
      AIA_CHECK(first.dim == 2 && first.numel > 0, "weight_1 must be [hidden, ", at.C, "] and not empty, got ",
                aia::described(*of[kWeight1]));
      hidden = first.sizes[0];
      check(kWeight1, {hidden, at.C}), check(kBias1, {hidden}), check(kWeight2, {at.C, hidden}), check(kBias2, {at.C});
    }
    AIA_CHECK(hidden || (!of[kBias1] && !of[kBias2]), "bias_1 and bias_2 must be None without weights");
    AIA_CHECK(of[kConvolution] || (!of[kScale] && !of[kShift]), "scale and shift must be None without conv");
    if (!of[kConvolution]) return;
    const aia::Layout conv = aia::check_operand(*of[kConvolution], x, "conv");
    constexpr int64_t kMost = 1 << 15;  // its square counts taps
    AIA_CHECK(conv.dim == 4 && conv.sizes[3] % 2 == 1 && conv.sizes[3] < kMost,
              "conv must be [1, 2, k, k] with an odd k, got ", aia::described(*of[kConvolution]));
    k = conv.sizes[3];
    check(kConvolution, {1, 2, k, k});
    norm.scale = aia::number_of(of[kScale], x, "scale"), norm.shift = aia::number_of(of[kShift], x, "shift");
  }

  Matrix one() const { return {1, m.rows, m.columns, m.rows_are_channels, m.scalar}; }
  int64_t sample_bytes() const { return m.size() * aia::bytes_of(m.scalar); }
  // Where a sample begins; null stays null.
  const void* sample(const void* x, int64_t b) const {
    return x ? static_cast<const char*>(x) + b * sample_bytes() : nullptr;
  }
  void* sample(void* x, int64_t b) const { return x ? static_cast<char*>(x) + b * sample_bytes() : nullptr; }

  MlpSizes mlp() const { return {at.B, 2, at.C, hidden}; }
  Convolution convolution(int64_t B) const { return {B, at.H, at.W, k}; }
  template <class A>
  const A* parameter(int i) const {
    return of[i] ? numbers<A>(*of[i]) : nullptr;
  }
};

// What a backward takes, in one piece of memory: algorithms/cbam.py's Kept. norm [4] and statistics [3] are of
// finish_norm. What is of an absent gate is null.
template <class A>
struct Kept {
  A *norm, *statistics, *channel_pooled = nullptr, *hidden = nullptr, *channel = nullptr, *spatial_pooled = nullptr,
                        *z = nullptr, *spatial = nullptr;
  int32_t *channel_argmax = nullptr, *spatial_argmax = nullptr;
  int64_t bytes = 0;

  // Of memory that is null the bytes alone.
  Kept(const Gates& gates, char* memory) {
    const auto take = [&](auto*& place, int64_t count) {
      place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(memory + bytes);
      bytes += (count * static_cast<int64_t>(sizeof(*place)) + 63) / 64 * 64;
    };
    const int64_t B = gates.at.B, C = gates.at.C, P = gates.at.positions();
    take(norm, 7);
    statistics = norm + 4;
    if (gates.hidden) {
      take(channel_pooled, B * 2 * C), take(channel_argmax, B * C);
      take(hidden, B * 2 * gates.hidden), take(channel, B * C);
    }
    if (gates.k) take(spatial_pooled, B * 2 * P), take(spatial_argmax, B * P), take(z, B * P), take(spatial, B * P);
  }
};

template <class A>
int64_t kept_bytes(const Gates& gates) {
  return Kept<A>(gates, nullptr).bytes;
}

// Calls body(b) for each sample, in parts on several threads where there are enough; last_first: in the other order.
template <class Body>
void for_samples(const Gates& gates, bool last_first, const Body& body) {
  const int64_t B = gates.at.B;
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(last_first ? begin + end - 1 - i : i);
  };
  if (B < static_cast<int64_t>(torch::stable::get_num_threads()))
    some(0, B);  // each of which is split
  else
    split(B, aia::cpu::elements_of(gates.m), some);
}

// Of two loops over x one begins where the other ends: that sample is in the cache.
template <class A>
void forward(const Gates& gates, const Tensor& x, const Kept<A>& kept, void* y, void* confounder) {
  const int64_t C = gates.at.C, P = gates.at.positions();
  const Matrix one = gates.one();
  const void* data = x.const_data_ptr();
  const auto recalibrate = [&](int64_t b) {
    const A *channel = kept.channel ? kept.channel + b * C : nullptr,
            *spatial = kept.spatial ? kept.spatial + b * P : nullptr;
    const bool turned = !one.rows_are_channels;
    aia::cpu::recalibrate_into(one, gates.sample(data, b), turned ? spatial : channel, turned ? channel : spatial,
                               gates.sample(y, b), gates.sample(confounder, b));
  };
  if (gates.hidden) {
    for_samples(gates, false, [&](int64_t b) {
      aia::cpu::pool_into(one, x, gates.sample(data, b), one.rows_are_channels, nullptr,
                          kept.channel_pooled + b * 2 * C, kept.channel_argmax + b * C);
    });
    aia::cpu::channel_gate_into<A>(gates.mlp(), kept.channel_pooled,
                                   {gates.parameter<A>(kWeight1), gates.parameter<A>(kBias1),
                                    gates.parameter<A>(kWeight2), gates.parameter<A>(kBias2)},
                                   kept.hidden, kept.channel);
  }
  if (!gates.k) return for_samples(gates, true, recalibrate);
  const bool batch = gates.norm.batch;
  if (!batch) aia::cpu::norm_into(gates.norm, gates.at.B, P, kept.z, kept.norm, kept.statistics);
  for_samples(gates, true, [&](int64_t b) {
    aia::cpu::pool_into(one, x, gates.sample(data, b), !one.rows_are_channels,
                        kept.channel ? kept.channel + b * C : nullptr, kept.spatial_pooled + b * 2 * P,
                        kept.spatial_argmax + b * P);
    aia::cpu::convolve_into<A>(gates.convolution(1), kept.spatial_pooled + b * 2 * P, gates.parameter<A>(kConvolution),
                               kept.z + b * P);
    if (batch) return;
    aia::cpu::activate_into(1, P, kept.z + b * P, kept.norm, kept.spatial + b * P);
    recalibrate(b);
  });
  if (!batch) return;
  aia::cpu::norm_into(gates.norm, gates.at.B, P, kept.z, kept.norm, kept.statistics);
  aia::cpu::activate_into(gates.at.B, P, kept.z, kept.norm, kept.spatial);
  for_samples(gates, false, recalibrate);
}

std::vector<Tensor> propagate_(const Tensor& x, Numbers parameters, Numbers fixed, std::vector<Tensor> running,
                               double eps, bool batch, double momentum, bool with_confounder, bool keep) {
  Gates gates(x, parameters);
  AIA_CHECK(fixed.empty() || fixed.size() == 2, "fixed must be empty or hold mean and variance, got ", fixed.size(),
            " entries");
  AIA_CHECK(gates.k || running.empty(), "running must be empty without conv");
  aia::check_eps(eps);
  gates.norm.eps = eps, gates.norm.batch = batch;
  if (!fixed.empty()) {
    gates.norm.mean = aia::number_of(fixed[0], x, "mean");
    gates.norm.var = aia::number_of(fixed[1], x, "var");
  }
  const aia::cpu::Running moved(running, {batch}, momentum, x);
  std::vector<Tensor> results{output_like(x)};
  if (with_confounder) results.push_back(output_like(x));
  with_type(new_numbers(x, {0}), [&](auto zero) {
    using A = decltype(zero);
    const Tensor memory = with_large_pages(new_tensor(x, {kept_bytes<A>(gates)}, ScalarType::Byte));
    const Kept<A> kept(gates, static_cast<char*>(memory.mutable_data_ptr()));
    forward(gates, x, kept, results[0].mutable_data_ptr(), with_confounder ? results[1].mutable_data_ptr() : nullptr);
    if (gates.k) moved.move(kept.statistics, 0, 1, x);
    if (keep) return results.push_back(memory);
    const int64_t count = gates.k ? 7 * static_cast<int64_t>(sizeof(A)) : 0;
    results.push_back(new_tensor(x, {count}, ScalarType::Byte));
    if (count) std::memcpy(results.back().mutable_data_ptr(), kept.norm, count);
  });
  return results;
}

// Where the gradients of parameters go; null for those that are not needed.
template <class A>
using Gradients = std::array<A*, kParameters>;

template <class A>
void backward(const Gates& gates, const void* grad, const void* confounder, const Tensor& x, const Kept<A>& kept,
              const Gradients<A>& found, void* grad_x) {
  const int64_t B = gates.at.B, C = gates.at.C, P = gates.at.positions();
  const Matrix& m = gates.m;
  const void* data = x.const_data_ptr();
  const Tensor memory = new_numbers(x, {B * (4 * C + 3 * P)});
  A *of_channels = mutable_numbers<A>(memory), *through_spatial = of_channels + B * C,
    *channel_pooled = through_spatial + B * C, *of_positions = channel_pooled + B * 2 * C,
    *spatial_pooled = of_positions + B * P;
  if (m.rows_are_channels)
    aia::cpu::recalibrate_reduce_into(m, x, grad, confounder, data, kept.channel, kept.spatial, of_channels,
                                      of_positions);
  else
    aia::cpu::recalibrate_reduce_into(m, x, grad, confounder, data, kept.spatial, kept.channel, of_positions,
                                      of_channels);
  if (gates.k) {
    A unwanted_numbers[2];
    const auto number = [&](int i) { return found[i] ? found[i] : &unwanted_numbers[i - kScale]; };
    aia::cpu::norm_back_into(B, P, kept.z, kept.spatial, kept.norm, kept.statistics, of_positions, number(kScale),
                             number(kShift));
    std::vector<A> unwanted;
    A* of_weight = found[kConvolution];
    if (!of_weight) unwanted.resize(2 * gates.k * gates.k), of_weight = unwanted.data();
    aia::cpu::convolve_back_into<A>(gates.convolution(B), of_positions, kept.spatial_pooled,
                                    gates.parameter<A>(kConvolution), spatial_pooled, of_weight);
  }
  const bool through_mlp = grad_x || found[kWeight1] || found[kBias1] || found[kWeight2] || found[kBias2];
  if (gates.hidden && through_mlp) {
    if (gates.k) {
      aia::cpu::unpool_reduce_into(m, x, data, {nullptr, spatial_pooled, kept.spatial_argmax}, through_spatial);
      for (int64_t i = 0; i < B * C; ++i) of_channels[i] += through_spatial[i];
    }
    aia::cpu::channel_gate_back_into<A>(gates.mlp(), of_channels, kept.channel_pooled, kept.hidden, kept.channel,
                                        gates.parameter<A>(kWeight1), gates.parameter<A>(kWeight2),
                                        grad_x ? channel_pooled : nullptr,
                                        {found[kWeight1], found[kBias1], found[kWeight2], found[kBias2]});
  }
  if (!grad_x) return;
  const aia::Side channel = gates.hidden ? aia::Side{kept.channel, channel_pooled, kept.channel_argmax} : aia::Side{};
  const aia::Side spatial = gates.k ? aia::Side{kept.spatial, spatial_pooled, kept.spatial_argmax} : aia::Side{};
  aia::cpu::unpool_into(m, grad, confounder, channel, spatial, grad_x);
}

std::vector<Tensor> propagate_back(const Tensor& grad_y, std::optional<Tensor> grad_confounder, const Tensor& x,
                                   Numbers parameters, const Tensor& kept, std::vector<bool> needs) {
  const Gates gates(x, parameters);
  aia::check_same(grad_y, x, "grad_y", "x");
  const void* confounder = aia::confounder_of(grad_confounder, grad_y);
  AIA_CHECK(needs.size() == kParameters + 1, "needs must hold an entry for each of ", kParameters,
            " parameters and for x, got ", needs.size());
  std::vector<Tensor> results;
  with_type(new_numbers(x, {0}), [&](auto zero) {
    using A = decltype(zero);
    const int64_t bytes = kept_bytes<A>(gates);
    aia::check_contiguous(kept, {bytes}, ScalarType::Byte, x, "kept");
    const Tensor own = aia::cpu::aligned(kept);
    Gradients<A> found{};
    for (int i = 0; i < kParameters; ++i) {
      AIA_CHECK(!needs[i] || parameters[i], "needs must be of parameters that are there, got parameter ", i);
      if (!needs[i]) continue;
      const aia::Layout of(*parameters[i]);
      results.push_back(new_numbers(x, {of.sizes, of.sizes + of.dim}));
      found[i] = mutable_numbers<A>(results.back());
    }
    if (needs[kParameters]) results.push_back(output_like(x));
    const Kept<A> from(gates, static_cast<char*>(const_cast<void*>(own.const_data_ptr())));
    backward(gates, grad_y.const_data_ptr(), confounder, x, from, found,
             needs[kParameters] ? results.back().mutable_data_ptr() : nullptr);
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CPU, m) {
  m.impl("cbam_propagate_", TORCH_BOX(&propagate_));
  m.impl("cbam_propagate_back", TORCH_BOX(&propagate_back));
}
