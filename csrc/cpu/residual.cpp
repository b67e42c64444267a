// The end of the external attention block on the CPU. See aia_kernels/schemas.py for what each pass computes.
//
// Both passes walk the storage vector by vector, whatever its rows are: the signs follow it. Where vectors lie within
// one row, its shift and its sums are whole vectors too; where a row ends in one, they are gathered lane by lane.
#include "residual.h"

#include "tile.h"
#include "untyped.h"

namespace aia::cpu::AIA_CPU_LEVEL {

namespace {

// An element of the storage: the i-th, in a row from its `offset`-th element on.
struct Place {
  int64_t i, row, offset;
};

// Calls whole(unit, place, count) for each run of count vectors within one row of a unit, and part(unit, place, lanes)
// for each vector in which a row, or the storage, ends.
template <class Whole, class Part>
AIA_INLINE void for_vectors(const Rows& z, int64_t begin, int64_t end, Whole&& whole, Part&& part) {
  const int64_t length = z.length();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * unit_elements(z), last = std::min(z.numel(), first + unit_elements(z));
    Place at{first, first / length, first % length};
    while (at.i < last) {
      int64_t step = std::min(length - at.offset, last - at.i) / kLanes * kLanes;
      if (step > 0) {
        whole(unit, at, step / kLanes);
      } else {
        step = kLanes;
        part(unit, at, static_cast<int>(std::min<int64_t>(kLanes, last - at.i)));
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

// Calls each(lane, channel) for the lanes of a vector in which a row ends.
template <class Each>
AIA_INLINE void for_lanes(const Rows& z, Place at, int lanes, Each&& each) {
  for (int lane = 0; lane < lanes; ++lane, ++at.offset) {
    if (at.offset == z.length()) ++at.row, at.offset = 0;
    each(lane, at);
  }
}

inline int64_t channel(const Rows& z, const Place& at) { return z.maps ? at.row % z.C : at.offset; }

// One bit for each lane of a comparison, and back.
AIA_INLINE uint16_t bits_of(IVec<float> condition) {
#if defined(__AVX512DQ__)
  return static_cast<uint16_t>(_mm512_movepi32_mask(detail::bit_cast<__m512i>(condition)));
#elif defined(__x86_64__)
  __m128 quarters[4];
  __builtin_memcpy(quarters, &condition, sizeof condition);
  int bits = 0;
  for (int i = 0; i < 4; ++i) bits |= _mm_movemask_ps(quarters[i]) << 4 * i;
  return static_cast<uint16_t>(bits);
#else
  uint16_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint16_t>((condition[i] & 1) << i);
  return bits;
#endif
}
AIA_INLINE uint16_t bits_of(IVec<double> condition) { return bits_of(__builtin_convertvector(condition, IVec<float>)); }

template <class A>
AIA_INLINE IVec<A> lanes_of(uint16_t bits) {
  const IVec<A> lane = splat_index<A>(1) << iota<A>();
  return (splat_index<A>(bits) & lane) != IVec<A>{};
}

AIA_INLINE uint16_t load_bits(const uint8_t* signs, int lanes) {
  return static_cast<uint16_t>(signs[0] | (lanes > 8 ? signs[1] << 8 : 0));
}
AIA_INLINE void store_bits(uint8_t* signs, uint16_t bits, int lanes) {
  signs[0] = static_cast<uint8_t>(bits);
  if (lanes > 8) signs[1] = static_cast<uint8_t>(bits >> 8);
}

template <class T, class A = Accumulate<T>>
void residual_relu(const Rows& z, T* data, const T* x, const A* shift, uint8_t* signs, int64_t begin, int64_t end) {
  const auto rectify = [&](int64_t i, Vec<A> shifts, auto lanes) {
    const Vec<A> total = load(data + i, lanes) + shifts + load(x + i, lanes);
    const IVec<A> shown = ~(total <= Vec<A>{});
    store(data + i, shown ? total : Vec<A>{}, lanes);
    const uint16_t valid = static_cast<uint16_t>((1 << lanes) - 1);
    store_bits(signs + i / 8, bits_of(shown) & valid, lanes);
  };
  for_vectors(
      z, begin, end,
      [&](int64_t, const Place& at, int64_t count) {
        const Vec<A> row = splat(shift && z.maps ? shift[at.row % z.C] : A(0));
        const A* moving = shift && !z.maps ? shift + at.offset : nullptr;
        for (int64_t k = 0; k < count; ++k)
          rectify(at.i + k * kLanes, moving ? load(moving + k * kLanes) : row, std::integral_constant<int, kLanes>{});
      },
      [&](int64_t, const Place& first, int lanes) {
        Vec<A> shifts{};
        if (shift) for_lanes(z, first, lanes, [&](int lane, const Place& at) { shifts[lane] = shift[channel(z, at)]; });
        rectify(first.i, shifts, lanes);
      });
}

template <class T, class A = Accumulate<T>>
void residual_relu_backward(const Rows& z, const T* grad_y, const uint8_t* signs, T* grad, A* partial, int64_t begin,
                            int64_t end) {
  const auto masked = [&](int64_t i, auto lanes) {
    const Vec<A> g = lanes_of<A>(load_bits(signs + i / 8, lanes)) ? load(grad_y + i, lanes) : Vec<A>{};
    store(grad + i, g, lanes);
    return g;
  };
  const auto sum_of = [&](int64_t unit, const Place& at) {
    return partial + (z.maps ? unit + at.row : unit * z.C + at.offset);
  };
  for_vectors(
      z, begin, end,
      [&](int64_t unit, const Place& at, int64_t count) {
        A* sums = sum_of(unit, at);
        Vec<A> row{};
        for (int64_t k = 0; k < count; ++k) {
          const Vec<A> g = masked(at.i + k * kLanes, std::integral_constant<int, kLanes>{});
          if (z.maps)
            row += g;
          else
            store(sums + k * kLanes, load(sums + k * kLanes) + g);
        }
        if (z.maps) *sums += sum_lanes<A>(row);
      },
      [&](int64_t unit, const Place& first, int lanes) {
        const Vec<A> g = masked(first.i, lanes);
        for_lanes(z, first, lanes, [&](int lane, const Place& at) { *sum_of(unit, at) += g[lane]; });
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
