// The end of the external attention block on the CPU. See aia_kernels/schemas.py for what each pass computes.
//
// Both passes walk the storage step by step, whatever its rows are: the signs follow it. Where steps lie within one
// row, its shift and its sums are whole vectors too; where a row ends in one, they are gathered element by element.
#include "residual.h"

#include "tile.h"
#include "untyped.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

// An element of the storage: the i-th, in a row from its `offset`-th element on.
struct Place {
  int64_t i, row, offset;
};

// Elements walked at once: a vector, or as many as make a whole byte of signs.
constexpr int kStep = std::max(kLanes, 8), kVectors = kStep / kLanes;
using Bits = std::conditional_t<kStep == 8, uint8_t, uint16_t>;

// The lanes of the i-th vector of a step: all of them, or what is left of the first so many elements.
AIA_INLINE auto lanes_at(int, std::integral_constant<int, kStep>) { return std::integral_constant<int, kLanes>{}; }
AIA_INLINE int lanes_at(int i, int elements) { return std::clamp(elements - i * kLanes, 0, kLanes); }

// Calls whole(unit, place, count) for each run of count steps within one row of a unit, and part(unit, place, elements)
// for each step in which a row, or the storage, ends.
template <class Whole, class Part>
AIA_INLINE void for_steps(const Rows& z, int64_t begin, int64_t end, Whole&& whole, Part&& part) {
  const int64_t length = z.length();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * unit_elements(z), last = std::min(z.numel(), first + unit_elements(z));
    Place at{first, first / length, first % length};
    while (at.i < last) {
      int64_t step = std::min(length - at.offset, last - at.i) / kStep * kStep;
      if (step > 0) {
        whole(unit, at, step / kStep);
      } else {
        step = kStep;
        part(unit, at, static_cast<int>(std::min<int64_t>(kStep, last - at.i)));
      }
      at.i += step;
      at.offset += step;
      if (at.offset >= length) {
        at.row += at.offset / length;
        at.offset %= length;
      }
    }
  }
}

// Calls each(element, place) for the elements of a step in which a row ends.
template <class Each>
AIA_INLINE void for_elements(const Rows& z, Place at, int elements, Each&& each) {
  for (int i = 0; i < elements; ++i, ++at.offset) {
    if (at.offset == z.length()) ++at.row, at.offset = 0;
    each(i, at);
  }
}

inline int64_t channel(const Rows& z, const Place& at) { return z.maps ? at.row % z.C : at.offset; }

// One bit for each lane of a comparison, and back.
AIA_INLINE int bits_of(IVec<float> condition) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask(detail::bit_cast<__m512i>(condition));
#elif defined(__AVX2__)
  return _mm256_movemask_ps(detail::bit_cast<__m256>(condition));
#elif defined(__x86_64__)
  return _mm_movemask_ps(detail::bit_cast<__m128>(condition));
#else
  int bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (condition[i] & 1) << i;
  return bits;
#endif
}
AIA_INLINE int bits_of(IVec<double> condition) { return bits_of(__builtin_convertvector(condition, IVec<float>)); }

template <class A>
AIA_INLINE IVec<A> lanes_of(int bits) {
  const IVec<A> lane = splat_index<A>(1) << iota<A>();
  return (splat_index<A>(bits) & lane) != IVec<A>{};
}

AIA_INLINE Bits load_bits(const uint8_t* signs, int elements) {
  return static_cast<Bits>(signs[0] | (elements > 8 ? signs[1] << 8 : 0));
}
AIA_INLINE void store_bits(uint8_t* signs, Bits bits, int elements) {
  signs[0] = static_cast<uint8_t>(bits);
  if (elements > 8) signs[1] = static_cast<uint8_t>(bits >> 8);
}

template <class T, class A = Accumulate<T>>
void residual_relu(const Rows& z, T* data, const T* x, const A* shift, uint8_t* signs, int64_t begin, int64_t end) {
  // shift_at(j): that of the j-th vector.
  const auto rectify = [&](int64_t i, auto&& shift_at, auto elements) {
    int bits = 0;
    for (int j = 0; j < kVectors; ++j) {
      const auto lanes = lanes_at(j, elements);
      T* at = data + i + j * kLanes;
      const Vec<A> total = load(at, lanes) + shift_at(j) + load(x + i + j * kLanes, lanes);
      const IVec<A> shown = ~(total <= Vec<A>{});
      store(at, shown ? total : Vec<A>{}, lanes);
      bits |= bits_of(shown) << j * kLanes;
    }
    store_bits(signs + i / 8, static_cast<Bits>(bits & ((1 << elements) - 1)), elements);
  };
  for_steps(
      z, begin, end,
      [&](int64_t, const Place& at, int64_t count) {
        constexpr std::integral_constant<int, kStep> whole;
        const Vec<A> row = splat(shift && z.maps ? shift[at.row % z.C] : A(0));
        const A* moving = shift && !z.maps ? shift + at.offset : nullptr;
        for (int64_t k = 0; k < count * kStep; k += kStep)
          rectify(at.i + k, [&](int j) { return moving ? load(moving + k + j * kLanes) : row; }, whole);
      },
      [&](int64_t, const Place& first, int elements) {
        A shifts[kStep] = {};
        if (shift) for_elements(z, first, elements, [&](int i, const Place& at) { shifts[i] = shift[channel(z, at)]; });
        rectify(first.i, [&](int j) { return load(shifts + j * kLanes); }, elements);
      });
}

template <class T, class A = Accumulate<T>>
void residual_relu_backward(const Rows& z, const T* grad_y, const uint8_t* signs, T* grad, A* partial, int64_t begin,
                            int64_t end) {
  // Calls each(j, gradient) for the vectors of a step.
  const auto mask = [&](int64_t i, auto elements, auto&& each) {
    const int bits = load_bits(signs + i / 8, elements);
    for (int j = 0; j < kVectors; ++j) {
      const auto lanes = lanes_at(j, elements);
      const int64_t at = i + j * kLanes;
      const Vec<A> g = lanes_of<A>(bits >> j * kLanes) ? load(grad_y + at, lanes) : Vec<A>{};
      store(grad + at, g, lanes);
      each(j, g);
    }
  };
  const auto sum_of = [&](int64_t unit, const Place& at) {
    return partial + (z.maps ? unit + at.row : unit * z.C + at.offset);
  };
  for_steps(
      z, begin, end,
      [&](int64_t unit, const Place& at, int64_t count) {
        constexpr std::integral_constant<int, kStep> whole;
        A* sums = sum_of(unit, at);
        Vec<A> row{};
        for (int64_t k = 0; k < count * kStep; k += kStep)
          mask(at.i + k, whole, [&](int j, Vec<A> g) {
            A* sum = sums + k + j * kLanes;
            if (z.maps)
              row += g;
            else
              store(sum, load(sum) + g);
          });
        if (z.maps) *sums += sum_lanes<A>(row);
      },
      [&](int64_t unit, const Place& first, int elements) {
        A g[kStep];
        mask(first.i, elements, [&](int j, Vec<A> part) { store(g + j * kLanes, part); });
        for_elements(z, first, elements, [&](int i, const Place& at) { *sum_of(unit, at) += g[i]; });
      });
}

template <class A>
void join_residual_sums(const Rows& z, const A* partial, A* sums) {
  std::fill_n(sums, z.C, A(0));
  if (!z.maps) {
    for (int64_t unit = 0; unit < element_units(z); ++unit)
      for (int64_t c = 0; c < z.C; ++c) sums[c] += partial[unit * z.C + c];
    return;
  }
  for (int64_t row = 0; row < z.B * z.C; ++row) {
    const int64_t last = ((row + 1) * z.N - 1) / unit_elements(z);
    for (int64_t unit = row * z.N / unit_elements(z); unit <= last; ++unit) sums[row % z.C] += partial[unit + row];
  }
}

template <class T>
constexpr ResidualPasses kPasses = {untyped<residual_relu<T>>, untyped<residual_relu_backward<T>>,
                                    untyped<join_residual_sums<Accumulate<T>>>};

}  // namespace

}  // namespace aia::cpu::AIA_CPU_LEVEL

namespace aia::cpu {

using namespace AIA_CPU_LEVEL;

const ResidualPasses ResidualPasses::AIA_CPU_LEVEL[] = {kPasses<float>, kPasses<double>, kPasses<bf16>, kPasses<f16>};

}  // namespace aia::cpu
