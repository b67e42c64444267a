// The CUDA passes on the host emulator, bound to numpy. Arrays come flat and outputs allocated, as a kernel sees them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "../../csrc/cuda/pool.cu"

namespace {

namespace py = pybind11;
using namespace aia::cuda;
using Array = std::optional<py::array>;

Shape shape_of(const std::array<int, 5>& sizes, int order, int scalar) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], static_cast<Order>(order), static_cast<Scalar>(scalar)};
}

const void* data(const Array& array) { return array ? array->data() : nullptr; }

Gate gate_of(const Array& maps, int context) { return {data(maps), maps ? context : kNone}; }

Unpooled unpooled_of(const Array& grad, const Array& argmax, int context) {
  return {data(grad), data(argmax), argmax ? static_cast<int>(argmax->itemsize()) : 1, grad ? context : kNone};
}

}  // namespace

PYBIND11_MODULE(aia_emulator, m) {
  using Sizes = std::array<int, 5>;
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
  m.def("schedule", [](bool backward, std::string dropped) {
    aia::emulator::block.backward = backward;
    aia::emulator::block.dropped = dropped;
  });
  m.def("barriers", [] { return aia::emulator::block.barriers; });
}
