// Whole units on the CPU, all passes of a direction as one operator (schemas.PROPAGATE_PASSES and UNIT_PASSES in
// aia_kernels/schemas.py), for small calls: the passes one after the other, without the framework between them.
#include "cpu_unit.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_products.h"
#include "cpu_running_statistics.h"
#include "cpu_unit_steps.h"

namespace {

using aia::accumulate_type;
using aia::Activation;
using aia::activation_of;
using aia::check_same;
using aia::first_of;
using aia::Gate;
using aia::GateParameters;
using aia::Gates;
using aia::index_type;
using aia::kChannel;
using aia::kNone;
using aia::kSpacetime;
using aia::new_numbers;
using aia::new_tensor;
using aia::Numbers;
using aia::PackedDims;
using aia::Unpooled;
using aia::cpu::mutable_numbers;
using aia::cpu::numbers;
using aia::cpu::output_like;
using aia::cpu::view_of;
using aia::cpu::with_large_pages;
using aia::cpu::with_type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One context of a unit: its gates, and what it keeps, as pool and gate give it. index_bytes of 0: no indices.
// averaged: of an inner one whether its gates are, over the channels.
struct Context {
  int context = kNone, index_bytes = 0;
  Gates gates{};
  void *pooled = nullptr, *argmax = nullptr, *norm = nullptr, *statistics = nullptr;
  bool averaged = false;

  // The context of the gates as they multiply x.
  int of_gate() const { return averaged ? kChannel : context; }
};

PackedDims dims_of(const Activation& a, int context) {
  if (context == kNone) return {};
  PackedDims d = aia::cpu::maps_of(aia::cpu::volume_of(a), context);
  d.B = a.B;
  return d;
}

// Memory for so many numbers for each element of the maps of a context.
Tensor new_maps(const Tensor& x, const Activation& a, int context, int64_t each) {
  return with_large_pages(new_numbers(x, {a.B * each * a.packed(context)}));
}

// Clips [first, first + count) of x, and how their passes are done.
template <class Way>
struct Clips {
  Activation a;  // of these clips
  int64_t first, count;
  const Way& way;

  Clips(const Activation& all, int64_t first, int64_t count, const Way& way)
      : a(all), first(first), count(count), way(way) {
    a.B = count;
  }

  // Where they lie in memory for all clips: in a tensor like x, and in `each` numbers for each element of maps.
  const void* in(const void* x) const { return static_cast<const char*>(x) + offset(); }
  void* in(void* x) const { return static_cast<char*>(x) + offset(); }
  template <class A>
  A* of_maps(A* maps, int context, int64_t each) const {
    return maps + first * each * a.packed(context);
  }

 private:
  int64_t offset() const { return first * a.T * a.C * a.H * a.W * aia::bytes_of(a.scalar); }
};

// Calls each(clips). Passes that follow each other there are done clip by clip where that serves all threads.
template <class Each>
void for_clips(const Activation& a, const Each& each) {
  aia::cpu::for_clips(a, [&](int64_t first, int64_t count, const auto& way) { each(Clips(a, first, count, way)); });
}

// Passes wait for each other where a gate needs the statistics of all clips.
template <class A>
void forward(const Tensor& x, const Activation& a, const Context& inner, const Context& outer, const Tensor& y) {
  const void* data = x.const_data_ptr();
  void* out = y.mutable_data_ptr();
  const Tensor of_inner = new_maps(x, a, inner.context, 1), of_outer = new_maps(x, a, outer.context, 1),
               average = new_maps(x, a, inner.averaged ? kChannel : kNone, 1);
  A *inner_gate = mutable_numbers<A>(of_inner), *gate = mutable_numbers<A>(of_outer);
  const auto gates_of = [&](const Context& of, A* made) {
    return aia::cpu::GatesForward<A>(dims_of(a, of.context), of.gates, static_cast<const A*>(of.pooled), made,
                                     static_cast<A*>(of.norm), static_cast<A*>(of.statistics));
  };
  const auto pool = [&](const auto& clips, const Context& of, const Gate& guide, aia::cpu::GatesForward<A>& gates) {
    aia::cpu::pool_into(
        clips.a, clips.in(data), guide, of.context, clips.of_maps(static_cast<A*>(of.pooled), of.context, 2),
        clips.of_maps(static_cast<char*>(of.argmax), of.context, of.index_bytes), of.index_bytes, clips.way);
    gates.convolve(clips.first, clips.count, clips.way);
  };
  aia::cpu::GatesForward<A> outer_gates = gates_of(outer, gate);
  if (inner.context) {
    aia::cpu::GatesForward<A> inner_gates = gates_of(inner, inner_gate);
    for_clips(a, [&](const auto& clips) { pool(clips, inner, {nullptr, kNone}, inner_gates); });
    inner_gates.finish();
    for_clips(a, [&](const auto& clips) {
      inner_gates.activate(clips.first, clips.count, clips.way);
      const A* guide = clips.of_maps(inner_gate, inner.context, 1);
      if (inner.averaged) {
        A* averaged = clips.of_maps(mutable_numbers<A>(average), kChannel, 1);
        aia::cpu::average_into(clips.a, guide, averaged, clips.way);
        guide = averaged;
      }
      pool(clips, outer, {guide, inner.of_gate()}, outer_gates);
    });
  } else {
    for_clips(a, [&](const auto& clips) { pool(clips, outer, {nullptr, kNone}, outer_gates); });
  }
  outer_gates.finish();
  for_clips(a, [&](const auto& clips) {
    outer_gates.activate(clips.first, clips.count, clips.way);
    aia::cpu::recalibrate_into(clips.a, clips.in(data), {clips.of_maps(gate, outer.context, 1), outer.context},
                               clips.in(out), clips.way);
  });
}

// Where gradients go: those of the weights of a context, as far as they are there, and of shift and scale, [n, 2].
template <class A>
struct Gradients {
  Gates weights;
  A* sums;
};

// Memory for z and for the gradient of the gates of both contexts, [2, count, M] for the clips of a call. If it has
// room, the gradient of x of the same clips is where they lie, which is written last of all: fresh memory costs as much
// as a pass.
template <class A>
class Scratch {
 public:
  Scratch(const Tensor& x, const Activation& a, const Context& inner, const Context& outer, const Tensor& grad_x)
      : outer_(2 * a.packed(outer.context)), of_clip_(outer_ + 2 * a.packed(inner.context)) {
    const int64_t room = a.T * a.C * a.H * a.W * aia::bytes_of(a.scalar);
    if (grad_x.defined() && of_clip_ * int64_t{sizeof(A)} + kLine <= room)
      grad_x_ = grad_x.mutable_data_ptr();
    else
      own_ = with_large_pages(new_numbers(x, {a.B * of_clip_}));
  }

  template <class Clips>
  A* of_outer(const Clips& clips) const {
    if (!grad_x_) return mutable_numbers<A>(own_) + clips.first * of_clip_;
    const auto place = reinterpret_cast<uintptr_t>(clips.in(grad_x_));
    return reinterpret_cast<A*>((place + kLine - 1) / kLine * kLine);
  }
  template <class Clips>
  A* of_inner(const Clips& clips) const {
    return of_outer(clips) + clips.count * outer_;
  }

 private:
  static constexpr int64_t kLine = 64;

  const int64_t outer_, of_clip_;
  void* grad_x_ = nullptr;
  Tensor own_;
};

// The gates of a context, which are made again, and the gradient of its pooled features.
template <class A>
class Back {
 public:
  Back(const Tensor& x, const Activation& a, const Context& of, const Gradients<A>& found)
      : a_(a),
        of_(of),
        found_(found),
        norms_(dims_of(a, of.context), static_cast<const A*>(of.norm), found.sums),
        convolutions_(
            dims_of(a, of.context), of.gates,
            {static_cast<const A*>(of.pooled), static_cast<const A*>(of.norm), static_cast<const A*>(of.statistics)},
            found.sums),
        results_(new_maps(x, a, of.context, 3)) {}

  template <class Clips>
  A* gate(const Clips& clips) const {
    return clips.of_maps(mutable_numbers<A>(results_), of_.context, 1);
  }
  template <class Clips>
  A* grad_pooled(const Clips& clips) const {
    return clips.of_maps(mutable_numbers<A>(results_) + a_.B * a_.packed(of_.context), of_.context, 2);
  }
  template <class Clips>
  Unpooled unpooled(const Clips& clips) const {
    if (of_.context == kNone) return {nullptr, nullptr, 1, kNone};
    return {grad_pooled(clips), clips.of_maps(static_cast<const char*>(of_.argmax), of_.context, of_.index_bytes),
            of_.index_bytes, of_.context};
  }

  // gradient_of_gates(memory) writes the gradient of the gates of these clips. scratch: [2, count, M], for convolve.
  template <class Clips, class GradientOfGates>
  void reduce(const Clips& clips, A* scratch, const GradientOfGates& gradient_of_gates) {
    A *z = scratch, *grad = scratch + maps(clips), *known = gate(clips);
    convolutions_.again(clips.first, clips.count, z, known, clips.way);
    gradient_of_gates(grad);
    norms_.reduce(clips.first, clips.count, grad, z, known, grad, clips.way);
  }
  // When all clips are reduced.
  void finish_sums() { norms_.finish(); }
  template <class Clips>
  void convolve(const Clips& clips, const A* scratch) {
    convolutions_.convolve(clips.first, clips.count, scratch + maps(clips), false, scratch, grad_pooled(clips),
                           clips.way);
  }
  // When all clips are convolved.
  void finish_weights() { convolutions_.finish(found_.weights); }

 private:
  template <class Clips>
  int64_t maps(const Clips& clips) const {
    return clips.count * a_.packed(of_.context);
  }

  const Activation& a_;
  const Context& of_;
  const Gradients<A>& found_;
  aia::cpu::NormsBackward<A> norms_;
  aia::cpu::ConvolutionsBackward<A> convolutions_;
  const Tensor results_;
};

// grad_x is undefined where it is not needed.
template <class A>
void backward(const Tensor& grad_y, const Tensor& x, const Activation& a, const Context& inner, const Context& outer,
              const Gradients<A>& of_inner, const Gradients<A>& of_outer, const Tensor& grad_x) {
  const void *data = x.const_data_ptr(), *grad = grad_y.const_data_ptr();
  const Scratch<A> scratch(x, a, inner, outer, grad_x);
  Back<A> from_outer(x, a, outer, of_outer), from_inner(x, a, inner, of_inner);
  const Tensor average = new_maps(x, a, inner.averaged ? kChannel : kNone, 1);
  const auto averaged = [&](const auto& clips) { return clips.of_maps(mutable_numbers<A>(average), kChannel, 1); };
  const auto unpool = [&](const auto& clips, const Gate& guide) {
    if (!grad_x.defined()) return;
    aia::cpu::unpool_into(clips.a, clips.in(grad), {from_outer.gate(clips), outer.context}, from_outer.unpooled(clips),
                          guide, from_inner.unpooled(clips), clips.in(grad_x.mutable_data_ptr()), clips.way);
  };
  for_clips(a, [&](const auto& clips) {
    from_outer.reduce(clips, scratch.of_outer(clips), [&](A* out) {
      aia::cpu::recalibrate_reduce_into(clips.a, clips.in(grad), clips.in(data), outer.context, out, clips.way);
    });
  });
  from_outer.finish_sums();
  for_clips(a, [&](const auto& clips) {
    from_outer.convolve(clips, scratch.of_outer(clips));
    if (!inner.context) return unpool(clips, {nullptr, kNone});
    from_inner.reduce(clips, scratch.of_inner(clips), [&](A* out) {
      A* of_gate = inner.averaged ? averaged(clips) : out;
      aia::cpu::unpool_reduce_into(clips.a, clips.in(data), from_outer.unpooled(clips), inner.of_gate(), of_gate,
                                   clips.way);
      if (inner.averaged) aia::cpu::spread_into<A>(clips.a, of_gate, out, clips.way);
    });
  });
  from_outer.finish_weights();
  if (!inner.context) return;
  from_inner.finish_sums();
  for_clips(a, [&](const auto& clips) {
    from_inner.convolve(clips, scratch.of_inner(clips));
    const A* guide = from_inner.gate(clips);
    if (inner.averaged) {
      aia::cpu::average_into(clips.a, guide, averaged(clips), clips.way);
      guide = averaged(clips);
    }
    unpool(clips, {guide, inner.of_gate()});
  });
  from_inner.finish_weights();
}

// For the gradient of a parameter, stored as it.
Tensor new_gradient(const Tensor& parameter) {
  const aia::Layout at(parameter);
  bool contiguous = true;
  int64_t expected = 1;
  for (int64_t axis = at.dim - 1; axis >= 0; expected *= at.sizes[axis--])
    contiguous = contiguous && !at.differs(axis, expected);
  if (!contiguous) return torch::stable::empty_like(parameter);
  return new_tensor(parameter, {at.sizes, at.sizes + at.dim}, parameter.scalar_type());
}

// propagate and propagate_back: parts that are kept are tensors of their own.

Context context_of(const Tensor* kept, const Gates& gates, const Tensor& x, const Activation& a, int64_t context) {
  const ScalarType type = accumulate_type(x);
  const int64_t n = context, M = a.packed(context);
  aia::check_contiguous(kept[0], {a.B, 2, M}, type, x, "pooled");
  aia::check_contiguous(kept[1], {a.B, M}, index_type(a, context), x, "argmax");
  aia::check_contiguous(kept[2], {n, 4}, type, x, "norm");
  aia::check_contiguous(kept[3], {n, 3}, type, x, "statistics");
  return {static_cast<int>(context),
          static_cast<int>(kept[1].element_size()),
          gates,
          const_cast<void*>(kept[0].const_data_ptr()),
          const_cast<void*>(kept[1].const_data_ptr()),
          const_cast<void*>(kept[2].const_data_ptr()),
          const_cast<void*>(kept[3].const_data_ptr())};
}

std::vector<Tensor> propagate(const Tensor& x, std::vector<Tensor> weight, Numbers scale, Numbers shift, Numbers mean,
                              Numbers var, std::vector<double> eps, std::vector<bool> batch, int64_t inner,
                              int64_t outer) {
  const Activation a = activation_of(x, "x");
  const aia::UnitArguments gates(x, weight, scale, shift, mean, var, eps, inner, outer, batch);
  const ScalarType type = accumulate_type(x);
  std::vector<Tensor> results{output_like(x)};
  const auto new_context = [&](int64_t context, const Gates& of) -> Context {
    if (context == kNone) return {};
    const int64_t M = a.packed(context);
    results.push_back(with_large_pages(new_tensor(x, {a.B, 2, M}, type)));
    results.push_back(with_large_pages(new_tensor(x, {a.B, M}, index_type(a, context))));
    results.push_back(new_tensor(x, {context, 4}, type));
    results.push_back(new_tensor(x, {context, 3}, type));
    return context_of(&results[results.size() - 4], of, x, a, context);
  };
  const Context of_inner = new_context(inner, gates.inner), of_outer = new_context(outer, gates.outer);
  with_type(x, [&](auto zero) { forward<decltype(zero)>(x, a, of_inner, of_outer, results[0]); });
  return results;
}

std::vector<Tensor> propagate_back(const Tensor& grad_y, const Tensor& x, std::vector<Tensor> weight,
                                   std::vector<Tensor> kept, int64_t inner, int64_t outer, bool needs_x) {
  aia::check_unit(inner, outer, {weight.size()});
  const size_t n = weight.size(), contexts = inner ? 2 : 1;
  AIA_CHECK(kept.size() == 4 * contexts, "kept must hold four tensors for each of ", contexts, " contexts, got ",
            kept.size());
  const Activation a = activation_of(x, "x");
  check_same(grad_y, x, "grad_y", "x");
  std::vector<Tensor> results;
  for (const Tensor& w : weight) results.push_back(new_gradient(w));
  const auto own = [&](const std::vector<Tensor>& list, int64_t context, int64_t other) {
    const auto first = list.begin() + first_of(context, other);
    return aia::weights_of({first, first + context}, static_cast<int>(context), x);
  };
  const auto given = [&](int64_t context, int64_t other, const Tensor* of) -> Context {
    return context == kNone ? Context{} : context_of(of, own(weight, context, other), x, a, context);
  };
  const Context of_inner = given(inner, outer, kept.data()), of_outer = given(outer, inner, &kept[4 * contexts - 4]);
  const Tensor grad_x = needs_x ? output_like(x) : Tensor();
  with_type(x, [&](auto zero) {
    using A = decltype(zero);
    A sums[8];
    const auto gradients = [&](int64_t context, int64_t other) -> Gradients<A> {
      if (context == kNone) return {};
      return {own(results, context, other), sums + 2 * first_of(context, other)};
    };
    const Gradients<A> found_inner = gradients(inner, outer), found_outer = gradients(outer, inner);
    backward<A>(grad_y, x, a, of_inner, of_outer, found_inner, found_outer, grad_x);
    for (int64_t first = 0, count; first < static_cast<int64_t>(n); first += count) {
      count = first == 0 && contexts == 2 ? 1 : n - first;
      const Tensor affine = torch::stable::new_empty(weight[first], {count, 2});
      const aia::Parameter of = aia::parameter_of(affine, x, "grad_affine", true);
      for (int64_t i = 0; i < 2 * count; ++i) aia::write(of, i, sums[2 * first + i]);
      results.push_back(affine);
    }
  });
  if (needs_x) results.push_back(grad_x);
  return results;
}

// unit_propagate_ and unit_propagate_back: x and parameters as a network has them, and all that is kept in one tensor.

// The view [B, T, C, H, W] of x, [B * frames, C, H, W] or [B, C, T, H, W].
Tensor clips_of(const Tensor& x, int64_t frames) {
  const aia::Layout at = aia::check_operand(x, x, "x");
  AIA_CHECK(at.dim == 4 || at.dim == 5, "x must be [B * T, C, H, W] or [B, C, T, H, W], got ", aia::described(x));
  const int64_t *n = at.sizes, *step = at.strides;
  if (at.dim == 5) return view_of(x, {n[0], n[2], n[1], n[3], n[4]}, {step[0], step[2], step[1], step[3], step[4]});
  AIA_CHECK(frames > 0 && n[0] % frames == 0, "frames must divide the ", n[0], " frames of x, got ", frames);
  return view_of(x, {n[0] / frames, frames, n[1], n[2], n[3]}, {frames * step[0], step[0], step[1], step[2], step[3]});
}

// How many gates a unit of these contexts has, with weight, scale and shift for each.
int64_t count_of(int64_t inner, int64_t outer, bool averaged, const Numbers& parameters) {
  aia::check_context(outer, "outer");
  AIA_CHECK(!averaged || inner == kSpacetime, "averaged must be of an inner context over T, H and W, got ", inner);
  AIA_CHECK(parameters.size() % 3 == 0, "parameters must hold weight, scale and shift for each gate, got ",
            parameters.size(), " entries");
  aia::check_unit(inner, outer, {parameters.size() / 3});
  return static_cast<int64_t>(parameters.size() / 3);
}

// Strides of the axes of a weight, from the paper's order to that of its map as it is stored: maps.weights_in_order.
void turn(GateParameters& gate, char letter, aia::Order order) {
  int64_t* step = gate.stride + 1;
  if (order == aia::Order::kTHWC && letter == 'T') std::rotate(step, step + 1, step + 3);
  if (letter == (order == aia::Order::kTHWC ? 'H' : 'W')) std::swap(step[1], step[2]);
}

// The weights of the gates of a context, as the maps of x are stored. An absent one, a gradient that is not needed, has
// no data.
Gates turned_weights(const Numbers& parameters, int64_t context, int64_t other, const Activation& a, const Tensor& x) {
  Gates gates{};
  const int first = first_of(context, other);
  for (int i = 0; i < context; ++i) {
    const std::optional<Tensor>& weight = parameters[3 * (first + i)];
    if (!weight) continue;
    aia::set_weight(gates[i], *weight, x);
    turn(gates[i], context == kSpacetime ? "THW"[i] : 'C', a.order);
  }
  return gates;
}

void check_weights(const Numbers& parameters) {
  for (size_t i = 0; i < parameters.size(); i += 3)
    AIA_CHECK(parameters[i].has_value(), "weight of gate ", i / 3, " must be a tensor, got None");
}

// The parts of what is kept, by their places in bytes: norm [n, 4] and statistics [n, 3] of all gates, and of the inner
// and the outer context pooled and argmax, if maps are kept.
struct Places {
  int64_t statistics, pooled[2] = {}, argmax[2] = {}, bytes;

  Places(const Tensor& x, const Activation& a, int64_t inner, int64_t outer, bool maps) {
    const int64_t itemsize = accumulate_type(x) == ScalarType::Double ? 8 : 4, n = inner + outer;
    const auto after = [](int64_t place, int64_t size) { return place + (size + 63) / 64 * 64; };
    statistics = 4 * n * itemsize;
    bytes = after(0, 7 * n * itemsize);
    if (!maps) return;
    for (const int i : {0, 1}) {
      const int64_t context = i ? outer : inner, elements = a.B * a.packed(context);
      if (context == kNone) continue;
      pooled[i] = bytes;
      argmax[i] = after(pooled[i], 2 * elements * itemsize);
      bytes = after(argmax[i], elements * aia::bytes_of(index_type(a, context)));
    }
  }

  // The context that keeps its parts there.
  Context at(char* kept, const Tensor& x, const Activation& a, const Gates& gates, int64_t context, int64_t other,
             bool is_outer) const {
    if (context == kNone) return {};
    const int64_t itemsize = accumulate_type(x) == ScalarType::Double ? 8 : 4, first = first_of(context, other);
    Context of{static_cast<int>(context)};
    of.gates = gates;
    of.norm = kept + 4 * first * itemsize, of.statistics = kept + statistics + 3 * first * itemsize;
    if (!pooled[is_outer]) return of;
    of.pooled = kept + pooled[is_outer], of.argmax = kept + argmax[is_outer];
    of.index_bytes = static_cast<int>(aia::bytes_of(index_type(a, context)));
    return of;
  }
};

// The gates of both contexts of a unit with all that they are computed with.
struct UnitGates {
  Gates inner, outer;

  UnitGates(const Tensor& x, const Activation& a, const Numbers& parameters, const Numbers& fixed,
            const std::vector<double>& eps, const std::vector<bool>& batch, int64_t inner_context,
            int64_t outer_context) {
    const auto of = [&](int64_t context, int64_t other) {
      Gates gates = turned_weights(parameters, context, other, a, x);
      const int first = first_of(context, other);
      for (int i = 0; i < context; ++i) {
        const int k = first + i;
        const auto of_bn = [&](int number) { return fixed.empty() ? std::nullopt : fixed[2 * k + number]; };
        aia::set_norm(gates[i], x, parameters[3 * k + 1], parameters[3 * k + 2], of_bn(0), of_bn(1), eps[k], batch[k]);
      }
      return gates;
    };
    check_weights(parameters);
    inner = of(inner_context, outer_context), outer = of(outer_context, inner_context);
  }
};

std::tuple<Tensor, Tensor> unit_propagate_(const Tensor& x, int64_t frames, Numbers parameters, Numbers fixed,
                                           std::vector<Tensor> running, std::vector<double> eps,
                                           std::vector<bool> batch, double momentum, int64_t inner, int64_t outer,
                                           bool averaged, bool keep) {
  const auto n = static_cast<size_t>(count_of(inner, outer, averaged, parameters));
  AIA_CHECK(fixed.empty() || fixed.size() == 2 * n, "fixed must be empty or hold mean and variance for each of ", n,
            " gates, got ", fixed.size(), " entries");
  aia::check_unit(inner, outer, {eps.size(), batch.size()});
  const Tensor clips = clips_of(x, frames);
  const Activation a = activation_of(clips, "x");
  const UnitGates gates(x, a, parameters, fixed, eps, batch, inner, outer);
  const aia::cpu::Running moved(running, batch, momentum, x);
  Tensor y = output_like(x);
  const bool of_batch = std::any_of(batch.begin(), batch.end(), [](bool used) { return used; });
  if (!keep && !of_batch) {
    aia::cpu::evaluate_unit(a, {gates.inner, static_cast<int>(inner), averaged}, {gates.outer, static_cast<int>(outer)},
                            x.const_data_ptr(), y.mutable_data_ptr());
    return {y, new_tensor(x, {0}, ScalarType::Byte)};
  }
  const Places places(x, a, inner, outer, keep);
  Tensor kept = with_large_pages(new_tensor(x, {places.bytes}, ScalarType::Byte));
  auto* memory = static_cast<char*>(kept.mutable_data_ptr());
  Context of_inner = places.at(memory, x, a, gates.inner, inner, outer, false),
          of_outer = places.at(memory, x, a, gates.outer, outer, inner, true);
  of_inner.averaged = averaged;
  std::vector<Tensor> pooled;  // which nobody keeps
  for (Context* of : {&of_inner, &of_outer})
    if (of->context && !keep) {
      pooled.push_back(new_maps(x, a, of->context, 2));
      of->pooled = pooled.back().mutable_data_ptr();
    }
  with_type(x, [&](auto zero) { forward<decltype(zero)>(x, a, of_inner, of_outer, y); });
  moved.move(of_inner.statistics, first_of(inner, outer), of_inner.context, x);
  moved.move(of_outer.statistics, first_of(outer, inner), of_outer.context, x);
  return {y, kept};
}

// For each of parameters and for x whether its gradient is needed; those gradients, in this order.
std::vector<Tensor> unit_propagate_back(const Tensor& grad_y, const Tensor& x, int64_t frames, Numbers parameters,
                                        const Tensor& kept, int64_t inner, int64_t outer, bool averaged,
                                        std::vector<bool> needs) {
  count_of(inner, outer, averaged, parameters);
  const size_t n = parameters.size();
  AIA_CHECK(needs.size() == n + 1, "needs must hold an entry for each of ", n, " parameters and for x, got ",
            needs.size());
  check_weights(parameters);
  const Tensor clips = clips_of(x, frames);
  const Activation a = activation_of(clips, "x");
  check_same(grad_y, x, "grad_y", "x");
  const Places places(x, a, inner, outer, true);
  aia::check_contiguous(kept, {places.bytes}, ScalarType::Byte, x, "kept");
  const Tensor own = aia::cpu::aligned(kept);
  auto* memory = static_cast<char*>(const_cast<void*>(own.const_data_ptr()));
  Context of_inner = places.at(memory, x, a, turned_weights(parameters, inner, outer, a, x), inner, outer, false);
  of_inner.averaged = averaged;
  const Context of_outer = places.at(memory, x, a, turned_weights(parameters, outer, inner, a, x), outer, inner, true);
  Numbers found(n);
  for (size_t i = 0; i < n; ++i) {
    if (i % 3) aia::number_of(parameters[i], x, i % 3 == 1 ? "scale" : "shift");
    AIA_CHECK(!needs[i] || parameters[i], "needs must be of parameters that are there, got parameter ", i);
    if (needs[i]) found[i] = new_gradient(*parameters[i]);
  }
  const Tensor grad_x = needs[n] ? output_like(x) : Tensor();
  with_type(x, [&](auto zero) {
    using A = decltype(zero);
    A sums[8];
    const Gradients<A> to_inner{turned_weights(found, inner, outer, a, x), sums + 2 * first_of(inner, outer)},
        to_outer{turned_weights(found, outer, inner, a, x), sums + 2 * first_of(outer, inner)};
    backward<A>(grad_y, x, a, of_inner, of_outer, to_inner, to_outer, grad_x);
    for (size_t i = 0; i < n; ++i)
      if (i % 3 && found[i])  // shift comes first in sums
        aia::write(aia::parameter_of(*found[i], x, "the gradient", true), 0, sums[i / 3 * 2 + 2 - i % 3]);
  });
  std::vector<Tensor> results;
  for (std::optional<Tensor>& gradient : found)
    if (gradient) results.push_back(*gradient);
  if (needs[n]) results.push_back(grad_x);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aia_kernels, CPU, m) {
  m.impl("propagate", TORCH_BOX(&propagate));
  m.impl("propagate_back", TORCH_BOX(&propagate_back));
  m.impl("unit_propagate_", TORCH_BOX(&unit_propagate_));
  m.impl("unit_propagate_back", TORCH_BOX(&unit_propagate_back));
}
