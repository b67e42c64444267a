// Elements of 16 bits in float32 and back on the CPU, for products that are faster in float32 as they are small.
#include "convert.h"

#include "lane_memory.h"
#include "untyped.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

template <class From, class To>
void convert(const From* from, To* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}

template <class T>
constexpr ConvertPasses kPasses = {untyped<convert<T, Accumulate<T>>>, untyped<convert<Accumulate<T>, T>>};

}  // namespace

}  // namespace aia::cpu::AIA_CPU_LEVEL

namespace aia::cpu {

using namespace AIA_CPU_LEVEL;

const ConvertPasses ConvertPasses::AIA_CPU_LEVEL[] = {kPasses<float>, kPasses<double>, kPasses<bf16>, kPasses<f16>};

}  // namespace aia::cpu
