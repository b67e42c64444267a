// A layer of external attention as one operator for each direction on the CPU (schemas.EXTERNAL_PROPAGATE_PASSES in
// aia_kernels/schemas.py), for small calls: products of PyTorch, the passes of the double normalization, and those of
// batch norm. Matrices are [p, q]; R are the B N tokens of all samples.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/batch_norm.h"
#include "cpu.h"
#include "cpu_double_norm.h"
#include "cpu_products.h"
#include "cpu_running_statistics.h"

namespace {

using aia::new_numbers;
using aia::cpu::BatchNormPasses;
using aia::cpu::double_norm_backward_;
using aia::cpu::double_norm_backward_reduce;
using aia::cpu::for_numbers;
using aia::cpu::is_narrow;
using aia::cpu::multiply_small;
using aia::cpu::mutable_numbers;
using aia::cpu::narrowed;
using aia::cpu::normalize;
using aia::cpu::numbers;
using aia::cpu::passes;
using aia::cpu::Rows;
using aia::cpu::Tokens;
using aia::cpu::view_of;
using aia::cpu::widened;
using aia::cpu::with_type;
using torch::stable::Tensor;

using Sizes = std::initializer_list<int64_t>;
using Optional = std::optional<Tensor>;

// Of matrices [p, q] and [q, r], and of as many of them as there are samples.
void multiply_matrices(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (multiply_small(out, a, b)) return;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}
void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (!multiply_small(out, a, b)) aia::cpu::multiply(out, a, b);
}

Tensor product(const Tensor& a, const Tensor& b, int64_t rows, int64_t columns) {
  Tensor out = new_numbers(a, {rows, columns});
  multiply_matrices(out, a, b);
  return out;
}

// A contiguous tensor as a matrix [p, q], or its transpose [q, p].
Tensor matrix(const Tensor& t, int64_t p, int64_t q) { return view_of(t, {p, q}, {q, 1}); }
Tensor turned(const Tensor& t, int64_t p, int64_t q) { return view_of(t, {q, p}, {1, q}); }
// A matrix for each of B samples, or its transpose.
Tensor for_samples(const Tensor& t, int64_t B, int64_t p, int64_t q) { return view_of(t, {B, p, q}, {0, q, 1}); }
Tensor turned_for_samples(const Tensor& t, int64_t B, int64_t p, int64_t q) { return view_of(t, {B, q, p}, {0, 1, q}); }

// Tokens [B, N, p] of a layer: rows of a matrix [R, p], or maps as the samples lie.
struct Side {
  int64_t B, N, p;
  bool maps;

  int64_t R() const { return B * N; }
  bool is_matrix() const { return !maps || B == 1; }
  // As one matrix [R, p], or [B, N, p].
  Tensor rows(const Tensor& t) const {
    if (!maps) return view_of(t, {R(), p}, {p, 1});
    return B == 1 ? view_of(t, {N, p}, {1, N}) : view_of(t, {B, N, p}, {p * N, 1, N});
  }
  // The transpose.
  Tensor columns(const Tensor& t) const {
    if (!maps) return view_of(t, {p, R()}, {1, p});
    return B == 1 ? view_of(t, {p, N}, {N, 1}) : view_of(t, {B, p, N}, {p * N, N, 1});
  }
  // Into out [R, q]: t times the transpose of a matrix [q, p], or times a matrix [p, q].
  void times_into(const Tensor& out, const Tensor& t, const Tensor& with, int64_t q, bool transposed) const {
    if (is_matrix())
      multiply_matrices(matrix(out, R(), q), rows(t), transposed ? turned(with, q, p) : matrix(with, p, q));
    else
      multiply(view_of(out, {B, N, q}, {N * q, q, 1}), rows(t),
               transposed ? turned_for_samples(with, B, q, p) : for_samples(with, B, p, q));
  }
  Tensor times(const Tensor& t, const Tensor& with, int64_t q) const {
    Tensor out = new_numbers(t, {R(), q});
    times_into(out, t, with, q, false);
    return out;
  }
  // Into out, tokens of this side: rows [R, q] times a matrix [q, p], or times the transpose of one [p, q].
  void multiply_into(const Tensor& out, const Tensor& from, const Tensor& with, int64_t q, bool transposed) const {
    if (!maps)
      multiply_matrices(rows(out), matrix(from, R(), q), transposed ? turned(with, p, q) : matrix(with, q, p));
    else if (B == 1)
      multiply_matrices(columns(out), transposed ? matrix(with, p, q) : turned(with, q, p), turned(from, N, q));
    else
      multiply(columns(out), transposed ? for_samples(with, B, p, q) : turned_for_samples(with, B, q, p),
               view_of(from, {B, q, N}, {N * q, 1, q}));
  }
  // The sum over all tokens of t and rows [R, q]: [p, q], or, turned, [q, p].
  Tensor over_tokens(const Tensor& t, const Tensor& with, int64_t q, bool turn) const {
    const int64_t first = turn ? q : p, last = turn ? p : q;
    if (is_matrix())
      return turn ? product(turned(with, R(), q), rows(t), first, last)
                  : product(columns(t), matrix(with, R(), q), first, last);
    Tensor parts = new_numbers(t, {B, first, last}), sum = new_numbers(t, {first, last});
    if (turn)
      multiply(parts, view_of(with, {B, q, N}, {N * q, 1, q}), rows(t));
    else
      multiply(parts, columns(t), view_of(with, {B, N, q}, {N * q, q, 1}));
    with_type(t, [&](auto zero) {
      const auto* from = numbers<decltype(zero)>(parts);
      for_numbers(sum, [&, size = first * last](auto& number, int64_t i) {
        number = from[i];
        for (int64_t b = 1; b < B; ++b) number += from[b * size + i];
      });
    });
    return sum;
  }
};

// A weight as a matrix: that of a pointwise convolution has axes of one behind.
Optional weight_of(const Optional& weight, const Tensor& x, const char* name) {
  if (!weight) return std::nullopt;
  const aia::Layout at = aia::check_operand(*weight, x, name);
  int64_t p = at.dim > 0 ? at.sizes[0] : 0, q = at.dim > 1 ? at.sizes[1] : 0;
  AIA_CHECK(
      p > 0 && at.numel == p * q && !at.differs(0, q) && !at.differs(1, 1) && weight->scalar_type() == x.scalar_type(),
      name, " must be a contiguous matrix of the type of x, with or without axes of one behind, got ",
      aia::described(*weight));
  return matrix(*weight, p, q);
}
// The same elements with the sizes and strides of another tensor, or with another stride of its first axis.
Tensor shaped_as(const Tensor& t, const Tensor& other, std::optional<int64_t> first_stride = std::nullopt) {
  const aia::Layout at(other);
  std::vector<int64_t> strides(at.strides, at.strides + at.dim);
  if (first_stride) strides[0] = *first_stride;
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), at.dim, at.sizes, strides.data(), 0, &view));
  return Tensor(view);
}
// New numbers, stored as x, which is dense. A single sample may have been cut from others with any stride.
Tensor stored_as(const Tensor& x) {
  const int64_t numel = x.numel();
  return shaped_as(new_numbers(x, {numel}), x, numel / x.size(0));
}

// A layer's weights and sizes: x, W_1 (or none), K and V, which all heads share, W_2 (or none), biases. x is tokens
// [B, N, C] or maps [B, C, H, W], as those of a block, which batch norm, residual and ReLU belong to.
struct Layer {
  Side x, y;
  int64_t heads, S, k, v;  // slots, and the features of a head before K and behind V
  bool on_maps, block, residual;
  Tensor first, key, value, last;  // undefined where there is none
  Optional value_bias, last_bias, first_bias;

  Layer(const Tensor& tokens, const std::vector<Optional>& weights, const std::vector<Optional>& norm, int64_t heads)
      : heads(heads), block(!norm.empty()), residual(weights.size() == 7) {
    const aia::Layout at = aia::check_operand(tokens, tokens, "x");
    const auto type = tokens.scalar_type();
    AIA_CHECK(type == aia::accumulate_type(tokens), "x must be float32 or float64, got ", aia::name_of(type));
    on_maps = at.dim == 4;
    AIA_CHECK(at.numel > 0 && (on_maps || (at.dim == 3 && !block)),
              "x must be [B, N, C] or, as of a block, [B, C, H, W], and not empty, got ", aia::described(tokens));
    const int64_t B = at.sizes[0], N = on_maps ? at.sizes[2] * at.sizes[3] : at.sizes[1];
    const int64_t C = at.sizes[on_maps ? 1 : 2];
    const bool contiguous = tokens.is_contiguous();
    const bool channels_last = on_maps && aia::cpu::is_channels_last(at);
    AIA_CHECK(contiguous || channels_last, "x must be contiguous or, of maps, channels_last, got ",
              aia::described(tokens));
    AIA_CHECK((weights.size() == 6 || residual) && weights[1] && weights[2],
              "weights must be W_1, K, V, a bias, W_2, a bias and, of a residual, one of W_1, ",
              "of which K and V are there, got ", weights.size(), " entries");
    AIA_CHECK(heads == 1 || (heads > 1 && weights[0] && weights[4]), "several heads need W_1 and W_2");
    const Optional of_first = weight_of(weights[0], tokens, "W_1"), of_last = weight_of(weights[4], tokens, "W_2");
    AIA_CHECK(heads == 1 || heads <= std::min(of_first->size(0), of_last->size(1)),
              "W_1 must have rows, and W_2 columns, for each head, got ", heads, " heads");
    key = *weight_of(weights[1], tokens, "K"), value = *weight_of(weights[2], tokens, "V");
    if (of_first) first = *of_first;
    if (of_last) last = *of_last;
    value_bias = weights[3], last_bias = weights[5];
    S = key.size(0), k = key.size(1), v = value.size(0);
    const int64_t outputs = of_last ? last.size(0) : v;
    x = {B, N, C, on_maps && contiguous && !channels_last}, y = {B, N, outputs, x.maps};
    const auto check = [&](const Optional& t, Sizes sizes, const char* name) {
      if (t) aia::check_contiguous(*t, sizes, type, tokens, name);
    };
    check(of_first, {heads * k, C}, "W_1");
    check(key, {S, of_first ? k : C}, "K");
    check(value, {v, S}, "V");
    check(value_bias, {v}, "the bias of V");
    check(of_last, {outputs, heads * v}, "W_2");
    check(last_bias, {outputs}, "the bias of W_2");
    AIA_CHECK(of_last || !last_bias, "a bias of W_2 needs W_2");
    if (residual) {
      AIA_CHECK(of_first && heads == 1 && !on_maps && outputs == k,
                "a residual is of one head and tokens, with W_1 and as many features behind as h has");
      first_bias = weights[6];
      check(first_bias, {k}, "the bias of W_1");
    }
    AIA_CHECK(!on_maps || (outputs == C && !value_bias && !last_bias),
              "maps must have as many channels behind as before, and no biases");
    if (!block) return;
    AIA_CHECK(norm.size() == 4, "norm must be empty, or scale, shift, mean and variance, got ", norm.size(),
              " entries");
    for (const Optional& t : norm) check(t, {C}, "scale, shift, mean and variance");
  }

  // Something stored as y.
  Tensor made(const Tensor& like) const { return on_maps ? stored_as(like) : new_numbers(like, {y.B, y.N, y.p}); }

  int64_t R() const { return x.R(); }
  // The same layer with a folded K and V.
  Layer folded(const Tensor& keys, const Tensor& values) const {
    Layer layer = *this;
    layer.first = layer.last = Tensor();
    layer.key = keys, layer.value = values;
    return layer;
  }
};

// What is kept for a backward, all in one tensor: each more is a microsecond for whoever hands it on. A [B, N, M] and
// mass [B, N, heads]; h [R, heads k] and u [R heads, v], or of a folded layer K W_1 [S, C] and W_2 V [O, S], as far as
// the layer has W_1 and W_2; of a block z, in the order of x, and its statistics [C, 3].
struct Kept {
  Tensor all, a, mass, h, u, z, statistics;

  Kept(const Layer& given, const Tensor& x, bool fold, const Optional& known = std::nullopt) {
    AIA_CHECK(!fold || (given.heads == 1 && given.first.defined() && !given.value_bias && !given.residual),
              "weights of one head fold, with W_1, no bias of V and no residual");
    const int64_t B = given.x.B, N = given.x.N, R = B * N, heads = given.heads, M = heads * given.S;
    const int64_t of_h = fold ? given.S * given.x.p : given.first.defined() ? R * heads * given.k : 0;
    const int64_t of_u = !given.last.defined() ? 0 : fold ? given.y.p * given.S : R * heads * given.v;
    const int64_t of_z = given.block ? R * given.y.p : 0, of_statistics = given.block ? 3 * given.y.p : 0;
    int64_t count = 0;
    for (const int64_t part : {R * M, R * heads, of_h, of_u, of_z, of_statistics}) count += rounded(part);
    if (known) aia::check_contiguous(*known, {count}, x.scalar_type(), x, "kept");
    all = known ? *known : new_numbers(x, {count});
    int64_t first = 0;
    const auto take = [&](int64_t part) {
      Tensor view = part ? view_of(all, {part}, {1}, first) : Tensor();
      first += rounded(part);
      return view;
    };
    a = view_of(take(R * M), {B, N, M}, {N * M, M, 1}),
    mass = view_of(take(R * heads), {B, N, heads}, {N * heads, heads, 1});
    h = take(of_h), u = take(of_u), z = take(of_z), statistics = take(of_statistics);
  }

 private:
  // Parts begin where cache lines do.
  static int64_t rounded(int64_t part) { return (part + 15) / 16 * 16; }
};

// The layer as tokens meet it, with K W_1 and W_2 V, which are made first if they are not there yet.
Layer with_folded(const Layer& given, const Kept& kept, bool make) {
  const int64_t S = given.S, k = given.k, v = given.v, C = given.x.p, outputs = given.y.p;
  if (make) multiply_matrices(matrix(kept.h, S, C), matrix(given.key, S, k), matrix(given.first, k, C));
  if (make && given.last.defined())
    multiply_matrices(matrix(kept.u, outputs, S), matrix(given.last, outputs, v), matrix(given.value, v, S));
  return given.folded(kept.h, given.last.defined() ? kept.u : given.value);
}

Rows rows_of(const Side& side, aia::Scalar scalar) { return {side.B, side.N, side.p, side.maps, scalar}; }

template <class Body>
void with_batch_norm(const Tensor& t, Body&& body) {
  with_type(t, [&](auto zero) { body(zero, passes<BatchNormPasses<decltype(zero)>>()); });
}

void add_bias(const Side& side, const Optional& bias, const Tensor& to) {
  if (!bias) return;
  with_batch_norm(to, [&](auto zero, const auto& pass) {
    using A = decltype(zero);
    pass.add(rows_of(side, aia::scalar_of(to, "x")), numbers<A>(*bias), mutable_numbers<A>(to));
  });
}
// Adds the numbers of one tensor to those of another, both contiguous or stored alike.
void add(const Tensor& from, const Tensor& to) {
  with_type(to, [&](auto zero) {
    const auto* added = numbers<decltype(zero)>(from);
    for_numbers(to, [&](auto& number, int64_t i) { number += added[i]; });
  });
}
Tensor sums_over_tokens(const Side& side, const Tensor& of) {
  Tensor sums = new_numbers(of, {side.p});
  with_batch_norm(of, [&](auto zero, const auto& pass) {
    using A = decltype(zero);
    pass.sums(rows_of(side, aia::scalar_of(of, "x")), numbers<A>(of), mutable_numbers<A>(sums));
  });
  return sums;
}

// Numbers of the block's batch norm [C], of its statistics [C, 3]: their third column is 0 where they are fixed.
template <class A>
struct Channels {
  std::vector<A> mean, factor, rstd;

  Channels(const Tensor& statistics, int64_t channels, const Optional& scale, double eps) {
    const A* at = numbers<A>(statistics);
    for (int64_t c = 0; c < channels; ++c) {
      mean.push_back(at[3 * c]);
      rstd.push_back(A(1) / std::sqrt(at[3 * c + 1] + static_cast<A>(eps)));
      factor.push_back(scale ? rstd[c] * numbers<A>(*scale)[c] : rstd[c]);
    }
  }
};

// Writes the statistics [C, 3] of z: mean, biased variance and share of the batch, or the running ones and a share of
// 0.
void find_statistics(const Side& side, const Tensor& z, const Optional& mean, const Optional& var, bool batch,
                     const Tensor& statistics) {
  with_batch_norm(z, [&](auto zero, const auto& pass) {
    using A = decltype(zero);
    std::vector<A> means(side.p), variances(side.p);
    if (batch)
      pass.moments(rows_of(side, aia::scalar_of(z, "z")), numbers<A>(z), means.data(), variances.data());
    else
      std::copy_n(numbers<A>(*mean), side.p, means.data()), std::copy_n(numbers<A>(*var), side.p, variances.data());
    A* to = mutable_numbers<A>(statistics);
    for (int64_t c = 0; c < side.p; ++c, to += 3)
      to[0] = means[c], to[1] = variances[c], to[2] = batch ? A(1) / static_cast<A>(side.R()) : A(0);
  });
}

// Of float32 or float64.
std::tuple<Tensor, Tensor> forward(const Tensor& x, const std::vector<Optional>& weights,
                                   const std::vector<Optional>& norm, const std::vector<Tensor>& running, int64_t heads,
                                   double eps, bool fold, bool batch, double norm_eps, double momentum) {
  const Layer given(x, weights, norm, heads);
  AIA_CHECK(running.empty() || (given.block && batch && running.size() > 1 && running.size() < 4),
            "running must be empty or, of a batch, mean, variance and perhaps a number, got ", running.size(),
            " entries");
  AIA_CHECK(norm.empty() || batch || (norm[2] && norm[3]), "mean and variance must be given where they are fixed");
  aia::check_eps(eps);
  const Kept kept(given, x, fold);
  const Layer at = fold ? with_folded(given, kept, true) : given;
  const int64_t rows = at.R() * heads, M = heads * at.S;
  if (at.first.defined()) {
    at.x.times_into(kept.h, x, at.first, heads * at.k, true);
    add_bias({1, at.R(), heads * at.k, false}, at.first_bias, kept.h);
    multiply_matrices(matrix(kept.a, rows, at.S), matrix(kept.h, rows, at.k), turned(at.key, at.S, at.k));
  } else {
    at.x.times_into(kept.a, x, at.key, at.S, true);
  }
  const Tokens tokens{at.x.B, at.x.N, M, at.S, aia::scalar_of(x, "x"), nullptr};
  normalize(tokens, kept.a, eps, kept.a, kept.mass);
  const Tensor y = at.made(x), z = at.block ? kept.z : y;
  if (at.last.defined()) {
    multiply_matrices(matrix(kept.u, rows, at.v), matrix(kept.a, rows, at.S), turned(at.value, at.v, at.S));
    add_bias({1, rows, at.v, false}, at.value_bias, kept.u);
    at.y.multiply_into(z, kept.u, at.last, heads * at.v, true);
    add_bias(at.y, at.last_bias, z);
  } else {
    at.y.multiply_into(z, kept.a, at.value, at.S, true);
    add_bias(at.y, at.value_bias, z);
  }
  if (at.residual) add(kept.h, y);
  if (!at.block) return {y, kept.all};
  find_statistics(at.y, z, norm[2], norm[3], batch, kept.statistics);
  if (!running.empty())
    aia::cpu::move_statistics({running[0]}, {running[1]}, {running.begin() + 2, running.end()},
                              {matrix(kept.statistics, at.y.p, 3)}, momentum);
  with_batch_norm(x, [&](auto zero, const auto& pass) {
    using A = decltype(zero);
    const Channels<A> of(kept.statistics, at.y.p, norm[0], norm_eps);
    const std::vector<A> none(at.y.p);
    pass.apply(rows_of(at.y, tokens.scalar), numbers<A>(z), numbers<A>(x), of.mean.data(), of.factor.data(),
               norm[1] ? numbers<A>(*norm[1]) : none.data(), mutable_numbers<A>(y));
  });
  return {y, kept.all};
}

std::tuple<Tensor, Tensor> external_propagate_(const Tensor& x, const std::vector<Optional>& weights,
                                               const std::vector<Optional>& norm, const std::vector<Tensor>& running,
                                               int64_t heads, double eps, bool fold, bool batch, double norm_eps,
                                               double momentum) {
  if (!is_narrow(x)) return forward(x, weights, norm, running, heads, eps, fold, batch, norm_eps, momentum);
  const auto type = x.scalar_type();
  const Tensor wide = widened(x, "x");
  auto [y, kept] = forward(wide, widened(weights, type, "weights"), widened(norm, type, "norm"), running, heads, eps,
                           fold, batch, norm_eps, momentum);
  return {narrowed(y, x), kept};
}

// The gradients of W_1, K, V, the bias of V, W_2 and its bias, of the bias of W_1, which a residual alone has, of scale
// and shift, and of x, in this order.
enum Gradient { kFirst, kKey, kValue, kValueBias, kLast, kLastBias, kFirstBias, kScale, kShift, kX, kGradients };
using Found = std::array<Tensor, kGradients>;

// Behind relu and batch norm: the gradients of z and of the residual, and of scale and shift.
std::pair<Tensor, Tensor> through_norm(const Layer& at, const Tensor& grad, const Tensor& y, const Kept& kept,
                                       const Optional& scale, double eps, Found& found) {
  const Tensor g = at.made(grad), grad_z = at.made(grad);
  found[kScale] = new_numbers(grad, {at.y.p}), found[kShift] = new_numbers(grad, {at.y.p});
  with_batch_norm(grad, [&](auto zero, const auto& pass) {
    using A = decltype(zero);
    const Rows rows = rows_of(at.y, aia::scalar_of(grad, "grad"));
    const Channels<A> of(kept.statistics, at.y.p, scale, eps);
    const A *z = numbers<A>(kept.z), *statistics = numbers<A>(kept.statistics);
    A *of_g = mutable_numbers<A>(g), *products = mutable_numbers<A>(found[kScale]);
    A* sums = mutable_numbers<A>(found[kShift]);
    pass.backward_reduce(rows, numbers<A>(grad), numbers<A>(y), z, of.mean.data(), of_g, sums, products);
    std::vector<A> slope(at.y.p), constant(at.y.p);
    for (int64_t c = 0; c < at.y.p; ++c) {
      const A share = statistics[3 * c + 2];
      products[c] *= of.rstd[c];
      slope[c] = -of.factor[c] * of.rstd[c] * products[c] * share;
      constant[c] = -of.factor[c] * sums[c] * share;
    }
    pass.backward(rows, of_g, z, of.mean.data(), of.factor.data(), slope.data(), constant.data(),
                  mutable_numbers<A>(grad_z));
  });
  return {grad_z, g};
}

// The gradient of A, and those of what stands behind it.
Tensor through_values(const Layer& at, const Tensor& grad_z, const Kept& kept, const std::vector<bool>& needs,
                      Found& found) {
  if (!at.last.defined()) {
    if (needs[kValue] || needs[kLast]) found[kValue] = at.y.over_tokens(grad_z, kept.a, at.S, false);
    if (needs[kValueBias]) found[kValueBias] = sums_over_tokens(at.y, grad_z);
    return at.y.times(grad_z, at.value, at.S);
  }
  const int64_t rows = at.R() * at.heads, width = at.heads * at.v;
  if (needs[kLast]) found[kLast] = at.y.over_tokens(grad_z, kept.u, width, false);
  if (needs[kLastBias]) found[kLastBias] = sums_over_tokens(at.y, grad_z);
  const Tensor grad_u = at.y.times(grad_z, at.last, width);
  if (needs[kValue]) found[kValue] = product(turned(grad_u, rows, at.v), matrix(kept.a, rows, at.S), at.v, at.S);
  if (needs[kValueBias]) found[kValueBias] = sums_over_tokens({1, rows, at.v, false}, grad_u);
  return product(matrix(grad_u, rows, at.v), matrix(at.value, at.v, at.S), rows, at.S);
}

// The gradients of what stands before A, for that of the logits.
// grad: that of y, which a residual gives h too.
void through_keys(const Layer& at, const Tensor& grad_logits, const Tensor& grad, const Tensor& x, const Kept& kept,
                  const std::vector<bool>& needs, Found& found) {
  if (!at.first.defined()) {
    if (needs[kKey] || needs[kFirst]) found[kKey] = at.x.over_tokens(x, grad_logits, at.S, true);
    if (needs[kX]) at.x.multiply_into(found[kX] = stored_as(x), grad_logits, at.key, at.S, false);
    return;
  }
  const int64_t rows = at.R() * at.heads, width = at.heads * at.k;
  if (needs[kKey]) found[kKey] = product(turned(grad_logits, rows, at.S), matrix(kept.h, rows, at.k), at.S, at.k);
  const Tensor grad_h = product(matrix(grad_logits, rows, at.S), matrix(at.key, at.S, at.k), rows, at.k);
  if (at.residual) add(grad, grad_h);
  if (needs[kFirstBias]) found[kFirstBias] = sums_over_tokens({1, rows, at.k, false}, grad_h);
  if (needs[kFirst]) found[kFirst] = at.x.over_tokens(x, grad_h, width, true);
  if (needs[kX]) at.x.multiply_into(found[kX] = stored_as(x), grad_h, at.first, width, false);
}

// The gradients of the weights of which folded ones were made, for those of these.
void unfold(const Layer& given, Found& found) {
  const int64_t S = given.S, k = given.k, v = given.v, C = given.x.p, outputs = given.y.p;
  if (const Tensor grad = found[kKey]; grad.defined()) {
    found[kFirst] = product(turned(given.key, S, k), grad, k, C);
    found[kKey] = product(grad, turned(given.first, k, C), S, k);
  }
  if (const Tensor grad = found[kValue]; grad.defined() && given.last.defined()) {
    found[kLast] = product(grad, turned(given.value, v, S), outputs, v);
    found[kValue] = product(turned(given.last, outputs, v), grad, v, S);
  }
}

// Of float32 or float64.
std::vector<Tensor> backward(const Tensor& grad, const Tensor& x, const Optional& y,
                             const std::vector<Optional>& weights, const std::vector<Optional>& norm,
                             const Tensor& kept_before, int64_t heads, bool fold, double norm_eps,
                             const std::vector<bool>& given_needs) {
  const Layer given(x, weights, norm, heads);
  const bool block = given.block;
  const size_t expected = given.residual ? kGradients : kGradients - 1;
  AIA_CHECK(given_needs.size() == expected, "needs must hold ", expected, " entries, got ", given_needs.size());
  std::vector<bool> needs = given_needs;
  if (!given.residual) needs.insert(needs.begin() + kFirstBias, false);
  for (int i = 0; i < kX; ++i)
    AIA_CHECK(!needs[i] || (i < kScale ? weights[i].has_value() : block), "needs must be of weights that are there");
  AIA_CHECK(block == y.has_value(), "y must be given for a block, and for nothing else");
  if (block) aia::check_same(*y, x, "y", "x");
  if (given.on_maps)
    aia::check_same(grad, x, "grad", "x");
  else
    aia::check_contiguous(grad, {given.y.B, given.y.N, given.y.p}, x.scalar_type(), x, "grad");
  const Kept kept(given, x, fold, kept_before);
  const Layer at = fold ? with_folded(given, kept, false) : given;
  Found found;
  Tensor grad_z = grad, g;
  if (block) std::tie(grad_z, g) = through_norm(at, grad, *y, kept, norm[0], norm_eps, found);
  const Tensor grad_a = view_of(through_values(at, grad_z, kept, needs, found), {at.x.B, at.x.N, heads * at.S},
                                {at.x.N * heads * at.S, heads * at.S, 1});
  if (needs[kX] || needs[kKey] || needs[kFirst] || needs[kFirstBias]) {
    double_norm_backward_(grad_a, kept.a, kept.mass, double_norm_backward_reduce(grad_a, kept.a, at.S), at.S);
    through_keys(at, grad_a, grad, x, kept, needs, found);
  }
  if (fold) unfold(given, found);
  if (block && needs[kX]) add(g, found[kX]);
  std::vector<Tensor> results;
  for (int i = 0; i < kGradients; ++i)
    if (needs[i]) results.push_back(i < kScale ? shaped_as(found[i], *weights[i]) : found[i]);
  return results;
}

std::vector<Tensor> external_propagate_back(const Tensor& grad, const Tensor& x, const Optional& y,
                                            const std::vector<Optional>& weights, const std::vector<Optional>& norm,
                                            const Tensor& kept, int64_t heads, bool fold, double norm_eps,
                                            const std::vector<bool>& needs) {
  if (!is_narrow(x)) return backward(grad, x, y, weights, norm, kept, heads, fold, norm_eps, needs);
  const auto type = x.scalar_type();
  for (const Tensor& of_y : {grad, y ? *y : grad})
    AIA_CHECK(of_y.scalar_type() == type, "grad and y must be of the type of x, got ", aia::described(of_y));
  std::vector<Tensor> results =
      backward(widened(grad, "grad"), widened(x, "x"), y ? Optional(widened(*y, "y")) : std::nullopt,
               widened(weights, type, "weights"), widened(norm, type, "norm"), kept, heads, fold, norm_eps, needs);
  for (Tensor& result : results) result = narrowed(result, x);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CPU, m) {
  m.impl("external_propagate_", TORCH_BOX(&external_propagate_));
  m.impl("external_propagate_back", TORCH_BOX(&external_propagate_back));
}
