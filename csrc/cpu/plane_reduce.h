// The reduction of planes over C to a channel map, of a value that no spacetime map makes.
//
// values(tile) returns of(k), which returns value(i, lanes): the value on the run that begins with the k-th plane of
// the tile. `emit` as in reduce.h.
#pragma once

#include "planes.h"
#include "reduce.h"

namespace aia::cpu::AIA_CPU_LEVEL {

// Over C: unit = a run of rows of one frame. Its accumulators meet a few channels at a time.
template <class A, class Accumulator, class Values, class Emit>
void reduce_planes_to_channel(const Volume& x, int64_t begin, int64_t end, Values&& values, Emit&& emit) {
  const int64_t tile = (run_rows(x) * x.W + kLanes - 1) / kLanes;  // vectors
  std::unique_ptr<Accumulator[]> over_c(new Accumulator[(unit_rows(x) + run_rows(x) - 1) / run_rows(x) * tile]);
  for (int64_t unit = begin; unit < end; ++unit)
    for_planes_of_rows(x, unit, [&](const Planes& at, int64_t r) {
      Accumulator* __restrict acc = over_c.get() + r / run_rows(x) * tile;
      const auto of = values(at);
      const auto run = [&](int64_t k, auto channels) {
        std::array<decltype(of(0)), channels> value = at_each<channels>([&](int j) { return of(k + j); });
        for_positions(at.run(x), [&](int64_t i, auto lanes) {
          Accumulator& kept = acc[(i + kLanes - 1) / kLanes];
          Accumulator total = at.c + k ? kept : Accumulator{};
          for (int j = 0; j < channels; ++j)
            total.template add<std::false_type>(value[j](i, lanes), splat_index<A>(at.c + k + j));
          kept = total;
        });
      };
      int64_t k = 0;
      for (; k + kRunChannels <= at.channels; k += kRunChannels) run(k, std::integral_constant<int, kRunChannels>{});
      for (; k < at.channels; ++k) run(k, std::integral_constant<int, 1>{});
      if (at.c + at.channels < x.C) return;
      for_positions(at.run(x), [&](int64_t i, auto lanes) {
        emit(at.b, offset_c(x, at) + i, acc[(i + kLanes - 1) / kLanes], A(1) / static_cast<A>(x.C), lanes);
      });
    });
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
