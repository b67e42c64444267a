// What the operators of CBAM check of their arguments, the same on every device.
#pragma once

#include "../common/matrix.h"
#include "checks_attention_in_attention.h"

namespace aia {

// x, y or a gradient [B, C, H, W], which is not empty: contiguous or channels_last. Strides of axes of length one are
// arbitrary.
struct FeatureMaps {
  int64_t B, C, H, W;
  bool channels_last;
  Scalar scalar;

  int64_t positions() const { return H * W; }
};

inline FeatureMaps maps_of(const Tensor& x, const char* name) {
  const Layout at = check_operand(x, x, name);
  AIA_CHECK(at.dim == 4, name, " must be [B, C, H, W], got ", described(x));
  AIA_CHECK(at.numel > 0, name, " must not be empty, got ", described(x));
  const int64_t B = at.sizes[0], C = at.sizes[1], H = at.sizes[2], W = at.sizes[3];
  // Indices of channels and of positions have 32 bits, with room for a block beyond their end.
  constexpr int64_t kMost = int64_t{1} << 30;
  AIA_CHECK(C < kMost && H < kMost && W < kMost && H * W < kMost, name,
            " must have fewer than 2^30 channels and positions, got ", described(x));
  const Scalar scalar = scalar_of(x, name);
  const int64_t plane = H * W;
  const bool samples = !at.differs(0, C * plane);
  if (samples && !at.differs(1, plane) && !at.differs(2, W) && !at.differs(3, 1)) return {B, C, H, W, false, scalar};
  AIA_CHECK(samples && !at.differs(1, 1) && !at.differs(2, W * C) && !at.differs(3, C), name,
            " must be contiguous or channels_last, got ", described(x));
  return {B, C, H, W, true, scalar};
}

inline Matrix matrix_of(const FeatureMaps& at) {
  if (at.channels_last) return {at.B, at.positions(), at.C, false, at.scalar};
  return {at.B, at.C, at.positions(), true, at.scalar};
}

// The gate of the channels [B, C] and that of the positions [B, 1, H, W] for `of`, or null. One of them is there.
struct MapGates {
  const void *channel = nullptr, *spatial = nullptr;

  MapGates(const std::optional<Tensor>& of_channels, const std::optional<Tensor>& of_positions, const FeatureMaps& at,
           const Tensor& of) {
    AIA_CHECK(of_channels || of_positions, "channel or spatial must be a tensor, got None twice");
    if (of_channels) check_contiguous(*of_channels, {at.B, at.C}, accumulate_type(of), of, "channel");
    if (of_positions) check_contiguous(*of_positions, {at.B, 1, at.H, at.W}, accumulate_type(of), of, "spatial");
    if (of_channels) channel = of_channels->const_data_ptr();
    if (of_positions) spatial = of_positions->const_data_ptr();
  }
  const void* of_rows(const Matrix& m) const { return m.rows_are_channels ? channel : spatial; }
  const void* of_columns(const Matrix& m) const { return m.rows_are_channels ? spatial : channel; }
};

// The gradient of pooled features and the index of each maximum, or null.
struct MapFeatures {
  const void* grad = nullptr;
  const int32_t* argmax = nullptr;

  static MapFeatures of_channels(const Tensor& grad, const Tensor& argmax, const FeatureMaps& at, const Tensor& of) {
    check_contiguous(grad, {at.B, 2, at.C}, accumulate_type(of), of, "grad_channel");
    check_contiguous(argmax, {at.B, at.C}, ScalarType::Int, of, "channel_argmax");
    return {grad.const_data_ptr(), static_cast<const int32_t*>(argmax.const_data_ptr())};
  }
  static MapFeatures of_positions(const Tensor& grad, const Tensor& argmax, const FeatureMaps& at, const Tensor& of) {
    check_contiguous(grad, {at.B, 2, at.H, at.W}, accumulate_type(of), of, "grad_spatial");
    check_contiguous(argmax, {at.B, at.H, at.W}, ScalarType::Int, of, "spatial_argmax");
    return {grad.const_data_ptr(), static_cast<const int32_t*>(argmax.const_data_ptr())};
  }
};

// Makes pooled features and the index of each maximum by pool(m, x, over_columns, gate, pooled, argmax).
template <class Pool>
std::tuple<Tensor, Tensor> pooled_positions(const Tensor& x, const Pool& pool) {
  const FeatureMaps at = maps_of(x, "x");
  const Matrix m = matrix_of(at);
  Tensor pooled = new_numbers(x, {at.B, 2, at.C}), argmax = torch::stable::new_empty(x, {at.B, at.C}, ScalarType::Int);
  pool(m, x, m.rows_are_channels, nullptr, pooled, argmax);
  return {pooled, argmax};
}

template <class Pool>
std::tuple<Tensor, Tensor> pooled_channels(const Tensor& x, const std::optional<Tensor>& channel, const Pool& pool) {
  const FeatureMaps at = maps_of(x, "x");
  const Matrix m = matrix_of(at);
  if (channel) check_contiguous(*channel, {at.B, at.C}, accumulate_type(x), x, "channel");
  Tensor pooled = new_numbers(x, {at.B, 2, at.H, at.W});
  Tensor argmax = torch::stable::new_empty(x, {at.B, at.H, at.W}, ScalarType::Int);
  pool(m, x, !m.rows_are_channels, channel ? channel->const_data_ptr() : nullptr, pooled, argmax);
  return {pooled, argmax};
}

// What comes of one gate: all three or none.
inline bool come_together(const std::optional<Tensor>& gate, const std::optional<Tensor>& grad,
                          const std::optional<Tensor>& argmax, const char* gate_name, const char* grad_name,
                          const char* argmax_name) {
  AIA_CHECK(gate.has_value() == grad.has_value() && grad.has_value() == argmax.has_value(), gate_name, ", ", grad_name,
            " and ", argmax_name, " must come together");
  return grad.has_value();
}

inline const void* confounder_of(const std::optional<Tensor>& grad_confounder, const Tensor& grad_y) {
  if (!grad_confounder) return nullptr;
  check_same(*grad_confounder, grad_y, "grad_confounder", "grad_y");
  return grad_confounder->const_data_ptr();
}

// The arguments of cbam_unpool.
struct UnpoolMaps {
  FeatureMaps at;
  const void* grad_confounder;
  MapGates gates;
  MapFeatures channel, spatial;

  UnpoolMaps(const Tensor& grad_y, const std::optional<Tensor>& confounder, const std::optional<Tensor>& of_channels,
             const std::optional<Tensor>& grad_channel, const std::optional<Tensor>& channel_argmax,
             const std::optional<Tensor>& of_positions, const std::optional<Tensor>& grad_spatial,
             const std::optional<Tensor>& spatial_argmax)
      : at(maps_of(grad_y, "grad_y")),
        grad_confounder(confounder_of(confounder, grad_y)),
        gates(of_channels, of_positions, at, grad_y) {
    if (come_together(of_channels, grad_channel, channel_argmax, "channel", "grad_channel", "channel_argmax"))
      channel = MapFeatures::of_channels(*grad_channel, *channel_argmax, at, grad_y);
    if (come_together(of_positions, grad_spatial, spatial_argmax, "spatial", "grad_spatial", "spatial_argmax"))
      spatial = MapFeatures::of_positions(*grad_spatial, *spatial_argmax, at, grad_y);
  }
  Side of_channels() const { return {gates.channel, channel.grad, channel.argmax}; }
  Side of_positions() const { return {gates.spatial, spatial.grad, spatial.argmax}; }
};

// The convolution of a spatial gate: pooled features [B, 2, H, W] and a weight [1, 2, k, k], k odd.
struct MapConvolution {
  int64_t B, H, W, k;
  ScalarType type;

  MapConvolution(const Tensor& pooled, const Tensor& weight) {
    const Layout at = check_operand(pooled, pooled, "pooled");
    type = pooled.scalar_type();
    AIA_CHECK(type == ScalarType::Float || type == ScalarType::Double,
              "pooled must be float32 or float64, as pooled features are, got ", name_of(type));
    AIA_CHECK(at.dim == 4 && at.sizes[1] == 2 && at.numel > 0, "pooled must be [B, 2, H, W] and not empty, got ",
              described(pooled));
    B = at.sizes[0], H = at.sizes[2], W = at.sizes[3];
    check_contiguous(pooled, {B, 2, H, W}, type, pooled, "pooled");
    const Layout of = check_operand(weight, pooled, "weight");
    constexpr int64_t kMost = 1 << 15;  // its square counts taps
    AIA_CHECK(of.dim == 4 && of.sizes[3] % 2 == 1 && of.sizes[3] < kMost,
              "weight must be [1, 2, k, k] with an odd k, got ", described(weight));
    k = of.sizes[3];
    check_contiguous(weight, {1, 2, k, k}, type, pooled, "weight");
  }
};

// What a spatial gate is made of: z [B, 1, H, W], contiguous, in an accumulation type.
struct SpatialMaps {
  int64_t B, H, W;

  explicit SpatialMaps(const Tensor& z) {
    const Layout at = check_operand(z, z, "z");
    const ScalarType type = z.scalar_type();
    AIA_CHECK(type == ScalarType::Float || type == ScalarType::Double,
              "z must be float32 or float64, as pooled features are, got ", name_of(type));
    AIA_CHECK(at.dim == 4 && at.sizes[1] == 1 && at.numel > 0, "z must be [B, 1, H, W] and not empty, got ",
              described(z));
    B = at.sizes[0], H = at.sizes[2], W = at.sizes[3];
    check_contiguous(z, {B, 1, H, W}, type, z, "z");
  }
  int64_t positions() const { return H * W; }
};

// The MLP of a channel gate: pools of each sample [B, pools, C], and weights [hidden, C] and [C, hidden].
struct ChannelMlp {
  int64_t B, pools, C, hidden;
  ScalarType type;

  ChannelMlp(const Tensor& pooled, const Tensor& weight_1, const Tensor& weight_2) {
    const Layout at = check_operand(pooled, pooled, "pooled");
    type = pooled.scalar_type();
    AIA_CHECK(type == ScalarType::Float || type == ScalarType::Double,
              "pooled must be float32 or float64, as pooled features are, got ", name_of(type));
    AIA_CHECK(at.dim == 3 && at.numel > 0, "pooled must be [B, pools, C] and not empty, got ", described(pooled));
    B = at.sizes[0], pools = at.sizes[1], C = at.sizes[2];
    check_contiguous(pooled, {B, pools, C}, type, pooled, "pooled");
    const Layout of = check_operand(weight_1, pooled, "weight_1");
    AIA_CHECK(of.dim == 2 && of.numel > 0, "weight_1 must be [hidden, ", C, "] and not empty, got ",
              described(weight_1));
    hidden = of.sizes[0];
    check_contiguous(weight_1, {hidden, C}, type, pooled, "weight_1");
    check_contiguous(weight_2, {C, hidden}, type, pooled, "weight_2");
  }
  void check_biases(const std::optional<Tensor>& bias_1, const std::optional<Tensor>& bias_2, const Tensor& of) const {
    if (bias_1) check_contiguous(*bias_1, {hidden}, type, of, "bias_1");
    if (bias_2) check_contiguous(*bias_2, {C}, type, of, "bias_2");
  }
  void check_results(const Tensor& grad_channel, const Tensor& of_hidden, const Tensor& channel,
                     const Tensor& of) const {
    check_contiguous(grad_channel, {B, C}, type, of, "grad_channel");
    check_contiguous(of_hidden, {B, pools, hidden}, type, of, "hidden");
    check_contiguous(channel, {B, C}, type, of, "channel");
  }
};

}  // namespace aia
