// The CPU implementations of the operators of CBAM's channel gate that aia_kernels/schemas.py defines: the MLP of
// pooled features, and its transpose. The products are in cpu/perceptron.cpp.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu_cbam_steps.h"

namespace {

using aia::new_numbers;
using aia::cpu::mutable_numbers;
using aia::cpu::numbers;
using aia::cpu::with_type;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> channel_gate(const Tensor& pooled, const Tensor& weight_1, std::optional<Tensor> bias_1,
                                        const Tensor& weight_2, std::optional<Tensor> bias_2) {
  const aia::ChannelMlp at(pooled, weight_1, weight_2);
  at.check_biases(bias_1, bias_2, pooled);
  Tensor hidden = new_numbers(pooled, {at.B, at.pools, at.hidden}), channel = new_numbers(pooled, {at.B, at.C});
  with_type(pooled, [&](auto zero) {
    using A = decltype(zero);
    const auto bias = [](const std::optional<Tensor>& of) { return of ? numbers<A>(*of) : nullptr; };
    aia::cpu::channel_gate_into<A>({at.B, at.pools, at.C, at.hidden}, numbers<A>(pooled),
                                   {numbers<A>(weight_1), bias(bias_1), numbers<A>(weight_2), bias(bias_2)},
                                   mutable_numbers<A>(hidden), mutable_numbers<A>(channel));
  });
  return {hidden, channel};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> channel_gate_backward(const Tensor& grad_channel,
                                                                         const Tensor& pooled, const Tensor& hidden,
                                                                         const Tensor& channel, const Tensor& weight_1,
                                                                         const Tensor& weight_2) {
  const aia::ChannelMlp at(pooled, weight_1, weight_2);
  at.check_results(grad_channel, hidden, channel, pooled);
  const int64_t B = at.B, pools = at.pools, R = at.hidden, C = at.C;
  Tensor grad_pooled = new_numbers(pooled, {B, pools, C});
  Tensor grad_1 = new_numbers(pooled, {R, C}), grad_bias_1 = new_numbers(pooled, {R});
  Tensor grad_2 = new_numbers(pooled, {C, R}), grad_bias_2 = new_numbers(pooled, {C});
  with_type(pooled, [&](auto zero) {
    using A = decltype(zero);
    aia::cpu::channel_gate_back_into<A>({B, pools, C, R}, numbers<A>(grad_channel), numbers<A>(pooled),
                                        numbers<A>(hidden), numbers<A>(channel), numbers<A>(weight_1),
                                        numbers<A>(weight_2), mutable_numbers<A>(grad_pooled),
                                        {mutable_numbers<A>(grad_1), mutable_numbers<A>(grad_bias_1),
                                         mutable_numbers<A>(grad_2), mutable_numbers<A>(grad_bias_2)});
  });
  return {grad_pooled, grad_1, grad_bias_1, grad_2, grad_bias_2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CPU, m) {
  m.impl("cbam_channel_gate", TORCH_BOX(&channel_gate));
  m.impl("cbam_channel_gate_backward", TORCH_BOX(&channel_gate_backward));
}
