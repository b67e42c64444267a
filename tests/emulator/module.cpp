// The CUDA passes on the host emulator, bound to numpy. Arrays come flat and outputs allocated, as a kernel sees them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <memory>
#include <optional>

#include "../../csrc/cuda/cbam.h"
#include "../../csrc/cuda/double_norm.h"
#include "../../csrc/cuda/evaluate.h"
#include "../../csrc/cuda/fold.h"
#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/memory.h"
#include "../../csrc/cuda/passes.h"
#include "../../csrc/cuda/residual.h"
#include "../../csrc/cuda/shares.h"
#include "together.h"

namespace {

namespace py = pybind11;
using namespace aia;
using namespace aia::cuda;
using Array = std::optional<py::array>;
using Sizes = std::array<int, 5>;

Shape shape_of(const Sizes& sizes, int order, int scalar) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], static_cast<Order>(order), static_cast<Scalar>(scalar)};
}

PackedDims dims_of(int64_t batch, const std::vector<int64_t>& dims) {
  PackedDims packed{batch, static_cast<int>(dims.size() / 3), {}};
  for (size_t i = 0; i < dims.size(); ++i) packed.dims[i / 3][i % 3] = dims[i];
  return packed;
}

const void* data(const Array& array) { return array ? array->data() : nullptr; }

Gate gate_of(const Array& maps, int context) { return {data(maps), maps ? context : kNone}; }

Unpooled unpooled_of(const Array& grad, const Array& argmax, int context) {
  return {data(grad), data(argmax), argmax ? static_cast<int>(argmax->itemsize()) : 1, grad ? context : kNone};
}

Tokens tokens_of(const std::array<int64_t, 4>& sizes, int scalar, const Array& padding) {
  return {sizes[0],
          sizes[1],
          static_cast<int>(sizes[2]),
          static_cast<int>(sizes[3]),
          static_cast<Scalar>(scalar),
          static_cast<const uint8_t*>(data(padding))};
}

Features features_of(const std::array<int64_t, 3>& sizes, bool maps, int scalar) {
  return {sizes[0], sizes[1], sizes[2], maps, static_cast<Scalar>(scalar)};
}

// B, H, d, N and the place of phi.
Memory memory_of(const std::array<int64_t, 5>& sizes, int scalar, const Array& padding) {
  return {sizes[0],
          sizes[1],
          sizes[2],
          sizes[3],
          static_cast<Feature>(sizes[4]),
          static_cast<Scalar>(scalar),
          static_cast<const uint8_t*>(data(padding))};
}

// B, rows and columns, and whether rows are channels.
using Extents = std::array<int64_t, 4>;

Matrix matrix_of(const Extents& of, int scalar) {
  return {of[0], of[1], of[2], of[3] != 0, static_cast<Scalar>(scalar)};
}

const int32_t* indices_of(const Array& argmax) { return static_cast<const int32_t*>(data(argmax)); }

int32_t* mutable_indices(py::array& argmax) { return static_cast<int32_t*>(argmax.mutable_data()); }

// A parameter, or none, with its scalar.
using Number = std::pair<Array, int>;

Parameter parameter_of(const Number& number) {
  return {const_cast<void*>(data(number.first)), static_cast<Scalar>(number.second)};
}

// The storage of each weight and its strides along [2, 3, 3, 3].
using Weights = std::vector<std::pair<Number, std::array<int64_t, 4>>>;

std::vector<GateParameters> parameters_of(const Weights& weights) {
  std::vector<GateParameters> gates(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    gates[i].weight = parameter_of(weights[i].first);
    std::copy_n(weights[i].second.begin(), 4, gates[i].stride);
  }
  return gates;
}

std::vector<GateParameters> gates_of(const Weights& weights, const std::vector<std::array<Number, 4>>& norms,
                                     const std::vector<double>& eps, const std::vector<bool>& own) {
  auto gates = parameters_of(weights);
  for (size_t i = 0; i < gates.size(); ++i) {
    gates[i].scale = parameter_of(norms[i][0]), gates[i].shift = parameter_of(norms[i][1]);
    gates[i].mean = parameter_of(norms[i][2]), gates[i].var = parameter_of(norms[i][3]);
    gates[i].eps = eps[i], gates[i].batch = own[i];
  }
  return gates;
}

// A workspace for partial results, on the heap for the sanitizer and NaN as float and as double.
std::unique_ptr<double[]> doubles_of_nan(int64_t count) {
  std::unique_ptr<double[]> workspace(new double[count]);
  std::memset(workspace.get(), 0xff, count * sizeof(double));
  return workspace;
}

// Runs a gate pass with a workspace.
template <class Pass>
void with_workspace(int blocks, int per_block, Pass&& pass) {
  const auto data = doubles_of_nan(int64_t{blocks} * per_block);
  pass(Workspace{data.get(), blocks});
}

}  // namespace

PYBIND11_MODULE(aia_emulator, m) {
  m.def("pool", [](Sizes sizes, int order, int scalar, py::array x, int context, Array gate, int gate_context,
                   py::array pooled, py::array argmax) {
    pool(shape_of(sizes, order, scalar), x.data(), context, gate_of(gate, gate_context), pooled.mutable_data(),
         argmax.mutable_data(), static_cast<int>(argmax.itemsize()), nullptr);
  });
  m.def("unpool", [](Sizes sizes, int order, int scalar, py::array grad_y, Array gate, Array grad_pooled, Array argmax,
                     int context, Array inner_gate, int inner_gate_context, Array inner_grad_pooled, Array inner_argmax,
                     int inner_context, py::array grad_x) {
    unpool(shape_of(sizes, order, scalar), grad_y.data(), gate_of(gate, context),
           unpooled_of(grad_pooled, argmax, context), gate_of(inner_gate, inner_gate_context),
           unpooled_of(inner_grad_pooled, inner_argmax, inner_context), grad_x.mutable_data(), nullptr);
  });
  m.def("unpool_reduce", [](Sizes sizes, int order, int scalar, py::array x, Array grad_pooled, Array argmax,
                            int context, int gate_context, py::array grad_gate) {
    unpool_reduce(shape_of(sizes, order, scalar), x.data(), unpooled_of(grad_pooled, argmax, context), gate_context,
                  grad_gate.mutable_data(), nullptr);
  });
  m.def("recalibrate", [](Sizes sizes, int order, int scalar, py::array x, Array gate, int context, py::array y) {
    recalibrate(shape_of(sizes, order, scalar), x.data(), gate_of(gate, context), y.mutable_data(), nullptr);
  });
  m.def("recalibrate_reduce",
        [](Sizes sizes, int order, int scalar, py::array grad_y, py::array x, int context, py::array grad_gate) {
          recalibrate_reduce(shape_of(sizes, order, scalar), grad_y.data(), x.data(), context, grad_gate.mutable_data(),
                             nullptr);
        });
  m.def("average_gate", [](Sizes sizes, int order, int scalar, py::array gate, py::array averaged) {
    average_gate(shape_of(sizes, order, scalar), gate.data(), averaged.mutable_data(), nullptr);
  });
  m.def("average_gate_back", [](Sizes sizes, int order, int scalar, py::array grad, py::array spread) {
    average_gate_back(shape_of(sizes, order, scalar), grad.data(), spread.mutable_data(), nullptr);
  });
  m.def("temporal_shift", [](Sizes sizes, int order, int scalar, py::array x, int fold, bool reverse, py::array y) {
    temporal_shift(shape_of(sizes, order, scalar), x.data(), fold, reverse, y.mutable_data(), nullptr);
  });

  m.def("gate", [](int64_t batch, std::vector<int64_t> dims, int scalar, int blocks, py::array pooled, Weights weight,
                   std::vector<std::array<Number, 4>> norms, std::vector<double> eps, std::vector<bool> own,
                   py::array gate, py::array norm, py::array statistics) {
    const auto gates = gates_of(weight, norms, eps, own);
    with_workspace(blocks, kMomentPartials, [&](Workspace workspace) {
      aia::cuda::gate(dims_of(batch, dims), static_cast<Scalar>(scalar), gates.data(), pooled.data(),
                      gate.mutable_data(), norm.mutable_data(), statistics.mutable_data(), workspace, nullptr);
    });
  });
  m.def("gate_again", [](int64_t batch, std::vector<int64_t> dims, int scalar, py::array pooled, Weights weight,
                         py::array norm, py::array gate, py::array z) {
    gate_again(dims_of(batch, dims), static_cast<Scalar>(scalar), parameters_of(weight).data(), pooled.data(),
               norm.data(), gate.mutable_data(), z.mutable_data(), nullptr);
  });
  m.def("gate_backward_reduce", [](int64_t batch, std::vector<int64_t> dims, int scalar, int blocks,
                                   py::array grad_gate, py::array z, py::array norm, py::array sums) {
    with_workspace(blocks, kNormPartials, [&](Workspace workspace) {
      gate_backward_reduce(dims_of(batch, dims), static_cast<Scalar>(scalar), grad_gate.data(), z.data(), norm.data(),
                           sums.mutable_data(), workspace, nullptr);
    });
  });
  m.def("gate_backward", [](int64_t batch, std::vector<int64_t> dims, int scalar, int blocks, py::array grad_gate,
                            py::array z, py::array norm, Array sums, py::array statistics, py::array pooled,
                            Weights weight, Weights grad_weight, Number grad_affine, py::array grad_pooled) {
    with_workspace(blocks, kWeightPartials, [&](Workspace workspace) {
      gate_backward(dims_of(batch, dims), static_cast<Scalar>(scalar), parameters_of(weight).data(),
                    parameters_of(grad_weight).data(), parameter_of(grad_affine),
                    {pooled.data(), z.data(), norm.data(), statistics.data()}, grad_gate.data(), data(sums),
                    grad_pooled.mutable_data(), workspace, nullptr);
    });
  });
  m.def("shares", [](int64_t batch, std::vector<int64_t> dims, bool backward, int blocks) {
    const PackedDims packed = dims_of(batch, dims);
    Capacity capacity{};
    with_form<float>(packed, true, [&](auto form) {
      capacity = backward ? kBackwardCapacity<float, form.value> : kForwardCapacity<float, form.value>;
      return 0;
    });
    const Maps maps = cut(packed, capacity, blocks), large = cut_into_large_tiles(packed, capacity, blocks);
    if (std::memcmp(&maps, &large, sizeof(Maps)) != 0) capacity.strips /= 2;
    std::vector<std::array<int64_t, 5>> found;
    for (int m = 0; m < maps.n; ++m) {
      const Map& of = maps.at[m];
      Map map = of;
      map.chunks = map.d0;
      found.push_back({items_of(of, batch), of.work(), of.blocks, map.tiles(), most_slabs(map, capacity)});
    }
    return found;
  });
  m.def("move_statistics_",
        [](int scalar, std::vector<int64_t> channels, double momentum, std::vector<Number> mean,
           std::vector<Number> var, std::vector<py::array> tracked, std::vector<py::array> statistics) {
          Running running{};
          for (; running.norms < static_cast<int>(mean.size()); ++running.norms) {
            const int i = running.norms;
            running.mean[i] = parameter_of(mean[i]), running.var[i] = parameter_of(var[i]);
            running.statistics[i] = statistics[i].data(), running.channels[i] = channels[i];
          }
          for (py::array& number : tracked)
            running.tracked[running.numbers++] = static_cast<int64_t*>(number.mutable_data());
          move_statistics(running, static_cast<Scalar>(scalar), momentum, nullptr);
        });

  m.def("column_statistics", [](std::array<int64_t, 4> sizes, int scalar, py::array logits, Array padding,
                                py::array statistics, py::array lse) {
    const Tokens at = tokens_of(sizes, scalar, padding);
    const auto partial = doubles_of_nan(at.B * token_split(at).chunks * 2 * at.M);
    column_statistics(at, logits.data(), partial.get(), statistics.mutable_data(), lse.mutable_data(), nullptr);
  });
  m.def("double_norm_", [](std::array<int64_t, 4> sizes, int scalar, py::array lse, double eps, Array padding,
                           py::array logits, py::array mass) {
    double_norm(tokens_of(sizes, scalar, padding), logits.mutable_data(), lse.data(), eps, mass.mutable_data(),
                nullptr);
  });
  m.def("double_norm_backward_reduce",
        [](std::array<int64_t, 4> sizes, int scalar, py::array grad, py::array attention, py::array reduced) {
          const Tokens at = tokens_of(sizes, scalar, {});
          const auto partial = doubles_of_nan(at.B * token_split(at).chunks * at.M);
          const bool needed = needs_dots(at, grad.data(), attention.data());
          const auto dots = doubles_of_nan(needed ? at.B * at.N * at.groups() : 0);
          double_norm_backward_reduce(at, grad.data(), attention.data(), dots.get(), partial.get(),
                                      reduced.mutable_data(), nullptr);
        });
  m.def("double_norm_backward_", [](std::array<int64_t, 4> sizes, int scalar, py::array attention, py::array mass,
                                    py::array reduced, py::array grad) {
    double_norm_backward(tokens_of(sizes, scalar, {}), grad.mutable_data(), attention.data(), mass.data(),
                         reduced.data(), nullptr);
  });
  m.def("fold", [](std::array<int, 2> sizes, int scalar, double eps, py::array value, Number weight, Number bias,
                   Array origin, Array total, Array second, double count, Number mean, Number var, py::array folded,
                   py::array shift, py::array statistics, py::array off) {
    fold({sizes[0], sizes[1], static_cast<Scalar>(scalar), eps}, value.data(), parameter_of(weight), parameter_of(bias),
         {data(origin), data(total), data(second)}, count, parameter_of(mean), parameter_of(var),
         {folded.mutable_data(), shift.mutable_data(), statistics.mutable_data(), off.mutable_data()}, nullptr);
  });
  m.def("fold_sums", [](std::array<int, 2> sizes, int scalar, double eps, py::array value, py::array product,
                        py::array sums, py::array statistics, Array off, py::array joint, py::array center) {
    fold_sums({sizes[0], sizes[1], static_cast<Scalar>(scalar), eps},
              {value.data(), statistics.data(), data(off), nullptr, nullptr}, product.data(), sums.data(),
              joint.mutable_data(), center.mutable_data(), nullptr);
  });
  m.def("fold_back", [](std::array<int, 2> sizes, int scalar, double eps, py::array value, Number weight,
                        py::array product, py::array joint, py::array center, py::array statistics, Array off,
                        Array total, Array second, py::array grad, py::array folded, py::array inner,
                        py::array constant) {
    fold_back({sizes[0], sizes[1], static_cast<Scalar>(scalar), eps},
              {value.data(), statistics.data(), data(off), data(total), data(second)}, parameter_of(weight),
              product.data(), joint.data(), center.data(),
              {grad.mutable_data(), folded.mutable_data(), inner.mutable_data(), constant.mutable_data()}, nullptr);
  });
  m.def("residual_relu_", [](std::array<int64_t, 3> sizes, bool maps, int scalar, py::array x, Array shift, py::array z,
                             py::array signs) {
    residual_relu(features_of(sizes, maps, scalar), z.mutable_data(), x.data(), data(shift),
                  static_cast<uint8_t*>(signs.mutable_data()), nullptr);
  });
  m.def("residual_relu_backward", [](std::array<int64_t, 3> sizes, bool maps, int scalar, py::array grad_y,
                                     py::array signs, py::array grad, py::array sums) {
    const Features at = features_of(sizes, maps, scalar);
    const auto partial = doubles_of_nan(residual_partials(at) * at.C);
    residual_relu_backward(at, grad_y.data(), static_cast<const uint8_t*>(signs.data()), grad.mutable_data(),
                           partial.get(), sums.mutable_data(), nullptr);
  });

  m.def("memory_keys", [](std::array<int64_t, 5> sizes, int scalar, int64_t pitch, py::array logits, Array padding,
                          Array statistics, py::array rows, py::array sums) {
    const Memory at = memory_of(sizes, scalar, padding);
    const auto partial = doubles_of_nan(memory_keys_partials(at, statistics.has_value()));
    memory_keys(at, logits.data(), data(statistics), rows.mutable_data(), pitch, partial.get(), sums.mutable_data(),
                nullptr);
  });
  m.def("memory_queries", [](std::array<int64_t, 5> sizes, int scalar, double eps, py::array logits, Array padding,
                             py::array sums, Array gamma, py::array query) {
    memory_queries(memory_of(sizes, scalar, padding), logits.data(), sums.data(), data(gamma), eps,
                   query.mutable_data(), nullptr);
  });
  m.def("memory_queries_backward_",
        [](std::array<int64_t, 5> sizes, int scalar, double eps, py::array logits, Array padding, py::array sums,
           Array gamma, py::array reached, py::array rows, py::array query, py::array grad_sums, py::array grad_gamma) {
          const Memory at = memory_of(sizes, scalar, padding);
          const auto partial = doubles_of_nan(memory_queries_backward_partials(at));
          memory_queries_backward(
              at, logits.data(), sums.data(), data(gamma), eps, reached.data(),
              {rows.mutable_data(), query.mutable_data(), grad_sums.mutable_data(), grad_gamma.mutable_data()},
              partial.get(), nullptr);
        });
  m.def("memory_keys_backward_", [](std::array<int64_t, 5> sizes, int scalar, py::array logits, Array padding,
                                    py::array reached, py::array grad_sums, Array reduced, py::array rows) {
    const Memory at = memory_of(sizes, scalar, padding);
    const auto partial = doubles_of_nan(memory_keys_backward_partials(at, reduced.has_value()));
    memory_keys_backward(at, logits.data(), reached.data(), grad_sums.data(), data(reduced), rows.mutable_data(),
                         partial.get(), nullptr);
  });

  m.def("cbam_pool", [](Extents extents, int scalar, bool over_columns, py::array x, Array gate, py::array pooled,
                        py::array argmax) {
    const Matrix matrix = matrix_of(extents, scalar);
    if (over_columns) {
      cbam_pool_columns(matrix, x.data(), data(gate), pooled.mutable_data(), mutable_indices(argmax), nullptr);
      return;
    }
    const int64_t parts = matrix.B * cbam_split(matrix).chunks * matrix.columns;
    const auto partial = doubles_of_nan(2 * parts), indices = doubles_of_nan(parts);
    cbam_pool_rows(matrix, x.data(), data(gate), partial.get(), reinterpret_cast<int32_t*>(indices.get()),
                   pooled.mutable_data(), mutable_indices(argmax), nullptr);
  });
  m.def("cbam_recalibrate", [](Extents extents, int scalar, py::array x, Array of_rows, Array of_columns,
                               py::args results) {
    std::vector<void*> to{nullptr, nullptr};
    for (size_t i = 0; i < results.size(); ++i) to[i] = results[i].cast<py::array>().mutable_data();
    cbam_recalibrate(matrix_of(extents, scalar), x.data(), data(of_rows), data(of_columns), to[0], to[1], nullptr);
  });
  m.def("cbam_recalibrate_reduce", [](Extents extents, int scalar, py::array grad_y, Array confounder, py::array x,
                                      Array of_rows, Array of_columns, py::array over_columns, py::array over_rows) {
    const Matrix matrix = matrix_of(extents, scalar);
    const CbamGradients given{grad_y.data(), data(confounder), x.data(), data(of_rows), data(of_columns)};
    const auto row_parts = doubles_of_nan(matrix.B * cbam_reduce_tiles(matrix, given) * matrix.rows);
    const auto column_parts = doubles_of_nan(matrix.B * cbam_split(matrix).chunks * matrix.columns);
    cbam_recalibrate_reduce(matrix, given, row_parts.get(), over_columns.mutable_data(), column_parts.get(),
                            over_rows.mutable_data(), nullptr);
  });
  m.def("cbam_unpool_reduce",
        [](Extents extents, int scalar, py::array x, py::array grad, py::array argmax, py::array sums) {
          const Matrix matrix = matrix_of(extents, scalar);
          const auto partial = doubles_of_nan(matrix.B * cbam_split(matrix).chunks * matrix.columns);
          cbam_unpool_reduce(matrix, x.data(), {nullptr, grad.data(), mutable_indices(argmax)}, partial.get(),
                             sums.mutable_data(), nullptr);
        });
  m.def("cbam_unpool", [](Extents extents, int scalar, py::array grad_y, Array confounder, std::array<Array, 3> of_rows,
                          std::array<Array, 3> of_columns, py::array grad_x) {
    const auto side_of = [](const std::array<Array, 3>& of) {
      return Side{data(of[0]), data(of[1]), indices_of(of[2])};
    };
    cbam_unpool(matrix_of(extents, scalar), grad_y.data(), data(confounder), side_of(of_rows), side_of(of_columns),
                grad_x.mutable_data(), nullptr);
  });

  m.def("cluster_size", [](Sizes sizes, int order, int scalar, int inner, int outer) {
    int cluster = 0;
    cluster_size(shape_of(sizes, order, scalar), inner, outer, &cluster);
    return cluster;
  });
  m.def("evaluate",
        [](Sizes sizes, int order, int scalar, py::array x, Weights weight, std::vector<std::array<Number, 4>> norms,
           std::vector<double> eps, int inner, int outer, int cluster, int64_t clips, py::array y) {
          const Shape shape = shape_of(sizes, order, scalar);
          const auto gates = gates_of(weight, norms, eps, std::vector<bool>(eps.size()));
          const GateParameters *const of_channel = gates.data(), *const of_spacetime = gates.data() + weight.size() % 3;
          const UnitGates unit{inner, outer, inner == kChannel ? of_channel : of_spacetime,
                               outer == kChannel ? of_channel : of_spacetime};
          if (cluster > 0) {
            evaluate_in_clusters(shape, x.data(), unit, y.mutable_data(), cluster, nullptr);
            return;
          }
          const auto workspace = doubles_of_nan((group_bytes(shape, clips) + 7) / 8);
          evaluate_in_groups(shape, x.data(), unit, y.mutable_data(), clips, workspace.get(), nullptr);
        });

  m.def("turn_among_blocks", [](int64_t blocks, int waiting, py::array values) {
    turn_among_blocks(blocks, waiting, static_cast<float*>(values.mutable_data()));
  });
  m.def("turn_in_warps", [](py::array values) { turn_in_warps(static_cast<float*>(values.mutable_data())); });
  m.def("turn_in_clusters", [](int64_t blocks, int cluster, int unused_bytes, py::array values) {
    turn_in_clusters(blocks, cluster, unused_bytes, static_cast<float*>(values.mutable_data()));
  });

  m.def("schedule",
        [](bool backward, std::string dropped) { emulator::schedule = {backward, std::move(dropped), {}, 0}; });
  m.def("barriers", [] { return emulator::schedule.barriers; });
  m.def("launches", [] { return emulator::schedule.launches; });
}
