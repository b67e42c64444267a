// A vector of lanes of an accumulation type, and what is done with it in registers.
//
// GCC/Clang vector extensions, as wide as the registers of the level: of wider ones GCC makes scalar code. Intrinsics
// stand behind a few of the names, where a compiler does not find the instruction.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "passes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef AIA_INLINE
#define AIA_INLINE inline __attribute__((always_inline))
#endif

namespace aia::cpu::AIA_CPU_LEVEL {

// As many as a register holds floats; doubles take two registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using AllLanes = std::make_integer_sequence<int, kLanes>;

template <class A>
struct LaneTypes;
template <>
struct LaneTypes<float> {
  typedef float V __attribute__((vector_size(4 * kLanes)));
  typedef int32_t I __attribute__((vector_size(4 * kLanes)));
};
template <>
struct LaneTypes<double> {
  typedef double V __attribute__((vector_size(8 * kLanes)));
  typedef int64_t I __attribute__((vector_size(8 * kLanes)));
};
template <class A>
using Vec = typename LaneTypes<A>::V;
template <class A>
using IVec = typename LaneTypes<A>::I;

// f(0), f(1), ... f(n - 1).
template <int n, class F>
AIA_INLINE auto at_each(F&& f) {
  return [&]<int... j>(std::integer_sequence<int, j...>) {
    return std::array{f(j)...};
  }(std::make_integer_sequence<int, n>{});
}

// body(0), body(1), ... body(n - 1), of constants: what they index stays in registers.
template <int n, class Body>
AIA_INLINE void for_each(Body&& body) {
  [&]<int... j>(std::integer_sequence<int, j...>) {
    (body(std::integral_constant<int, j>{}), ...);
  }(std::make_integer_sequence<int, n>{});
}

template <class A, int... lane>
AIA_INLINE Vec<A> splat_of(A value, std::integer_sequence<int, lane...>) {
  return Vec<A>{(static_cast<void>(lane), value)...};  // 0 + value would be an addition, for the sake of -0
}
template <class A>
AIA_INLINE Vec<A> splat(A value) {
  return splat_of<A>(value, AllLanes{});
}

template <class A>
using IndexOf = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;

// An index in every lane. Lanes of float hold 32-bit indices: every axis is shorter than 2^31.
template <class A>
AIA_INLINE IVec<A> splat_index(int64_t index) {
  return IVec<A>{} + static_cast<IndexOf<A>>(index);
}

template <class A, int... lane>
AIA_INLINE IVec<A> iota_of(std::integer_sequence<int, lane...>) {
  return IVec<A>{lane...};
}
template <class A>
AIA_INLINE IVec<A> iota() {
  return iota_of<A>(AllLanes{});
}

namespace detail {

template <class To, class From>
AIA_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace detail

// Whether a level masks by bits, one for each lane.
#if defined(__AVX512F__)
constexpr bool kMasks = true;
#else
constexpr bool kMasks = false;
#endif

// The lanes of a mask; zero in the others.
template <class A>
AIA_INLINE Vec<A> keep_where(IVec<A> mask, Vec<A> v) {
  return detail::bit_cast<Vec<A>>(detail::bit_cast<IVec<A>>(v) & mask);
}

// Lanes of a vector that are met again and again: a bit each where a level masks by bits, elsewhere as IVec.
template <class A>
using LaneSet = std::conditional_t<kMasks && sizeof(A) == 4, uint16_t, IVec<A>>;

template <class A>
void insert_lane(LaneSet<A>& set, int lane) {
  if constexpr (std::is_same_v<LaneSet<A>, uint16_t>)
    set = static_cast<uint16_t>(set | 1 << lane);
  else
    set[lane] = -1;
}
template <class A>
AIA_INLINE Vec<A> keep_lanes(LaneSet<A> set, Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return detail::bit_cast<Vec<A>>(_mm512_maskz_mov_ps(set, detail::bit_cast<__m512>(v)));
#endif
  if constexpr (sizeof(LaneSet<A>) == sizeof(Vec<A>)) return keep_where<A>(set, v);
}

namespace detail {

// v, of which a compiler knows nothing but that it lies in a register.
AIA_INLINE Vec<float> settled(Vec<float> v) {
#if defined(__AVX2__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}
AIA_INLINE Vec<double> settled(Vec<double> v) {
  struct Registers {
    Vec<float> low, high;
  };
  auto [low, high] = bit_cast<Registers>(v);
  return bit_cast<Vec<double>>(Registers{settled(low), settled(high)});
}

}  // namespace detail

// The value, loaded once: GCC would rather load it again for every product that takes it.
template <class A>
AIA_INLINE Vec<A> in_register(Vec<A> v) {
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return detail::settled(v);
#endif
  return v;
}

// An index that a compiler knows nothing of: where one meets many arrays it would make a pointer of each, of which
// there are more than registers.
AIA_INLINE int64_t as_index(int64_t i) {
  asm("" : "+r"(i));
  return i;
}

// A product, rounded: a compiler would make one multiply-add of it and of a sum that takes it.
template <class A>
AIA_INLINE Vec<A> rounded(Vec<A> product) {
  return detail::settled(product);
}

// a > b ? a : b and a < b ? a : b, so b where one is NaN: one instruction, of which GCC makes two.
template <class A>
AIA_INLINE Vec<A> larger(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return detail::bit_cast<Vec<A>>(_mm512_max_ps(detail::bit_cast<__m512>(a), detail::bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4)
    return detail::bit_cast<Vec<A>>(_mm256_max_ps(detail::bit_cast<__m256>(a), detail::bit_cast<__m256>(b)));
#endif
  return a > b ? a : b;
}
template <class A>
AIA_INLINE Vec<A> smaller(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return detail::bit_cast<Vec<A>>(_mm512_min_ps(detail::bit_cast<__m512>(a), detail::bit_cast<__m512>(b)));
#endif
  return a < b ? a : b;
}

// Running maximum with the semantics of torch.max(dim): the first index wins ties, the first NaN wins over all.
template <class A>
AIA_INLINE void max_first(Vec<A> v, IVec<A> index, Vec<A>& best, IVec<A>& best_index) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {  // GCC spends two instructions more on the masks of the portable form
    const __m512 value = detail::bit_cast<__m512>(v), old = detail::bit_cast<__m512>(best);
    const __mmask16 ordered = _mm512_cmp_ps_mask(old, old, _CMP_ORD_Q);
    const __mmask16 take = _mm512_mask_cmp_ps_mask(ordered, value, old, _CMP_NLE_UQ);
    best = detail::bit_cast<Vec<A>>(_mm512_mask_mov_ps(old, take, value));
    best_index = detail::bit_cast<IVec<A>>(
        _mm512_mask_mov_epi32(detail::bit_cast<__m512i>(best_index), take, detail::bit_cast<__m512i>(index)));
    return;
  }
#endif
  const IVec<A> keep = (v <= best) | (best != best);
  best = keep ? best : v;
  best_index = keep ? best_index : index;
}

// The same for v without NaN, by fewer instructions. A NaN that is the best already stays it.
template <class A>
AIA_INLINE void max_first_of_numbers(Vec<A> v, IVec<A> index, Vec<A>& best, IVec<A>& best_index) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __m512 value = detail::bit_cast<__m512>(v), old = detail::bit_cast<__m512>(best);
    const __mmask16 take = _mm512_cmp_ps_mask(value, old, _CMP_GT_OQ);
    best = detail::bit_cast<Vec<A>>(_mm512_max_ps(value, old));
    best_index = detail::bit_cast<IVec<A>>(
        _mm512_mask_mov_epi32(detail::bit_cast<__m512i>(best_index), take, detail::bit_cast<__m512i>(index)));
    return;
  }
#endif
  best_index = v > best ? index : best_index;
  best = larger<A>(v, best);
}

constexpr unsigned kAllLanes = (1u << kLanes) - 1;

// One bit for each lane in which two vectors are equal.
template <class A>
AIA_INLINE unsigned equal_lanes(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_cmpeq_ps_mask(detail::bit_cast<__m512>(a), detail::bit_cast<__m512>(b));
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return _mm256_movemask_ps(detail::bit_cast<__m256>(a == b));
#endif
  const IVec<A> equal = a == b;
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (equal[i] & 1u) << i;
  return bits;
}

// v + addend in the lanes where the condition holds.
template <class A>
AIA_INLINE Vec<A> add_where(IVec<A> condition, Vec<A> v, Vec<A> addend) {
  return v + (condition ? addend : Vec<A>{});
}

namespace detail {

template <class A, int d, int... lane>
AIA_INLINE A sum_halves(Vec<A> v, std::integer_sequence<int, lane...> lanes) {
  if constexpr (d == 0)
    return v[0];
  else
    return sum_halves<A, d / 2>(v + __builtin_shufflevector(v, v, (lane ^ d)...), lanes);
}

}  // namespace detail

// Halves added to halves. In shuffles: GCC makes branches and memory of the loop that says the same.
template <class A>
AIA_INLINE A sum_lanes(Vec<A> v) {
  return detail::sum_halves<A, kLanes / 2>(v, AllLanes{});
}

namespace detail {

template <int first, class V, int... lane>
AIA_INLINE V lanes_from(V left, V right, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(left, right, (first + lane)...);
}

template <class V, int... lane>
AIA_INLINE V first_of(V first, V second, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(first, second, (lane < kLanes / 2 ? lane : lane + kLanes)...);
}

// Rows i and i + d of a matrix change their blocks of d lanes: what lies above the diagonal with what lies below.
template <int d, class V, int... lane>
AIA_INLINE void swap_blocks(V& upper, V& lower, std::integer_sequence<int, lane...>) {
  const V a = upper, b = lower;
  upper = __builtin_shufflevector(a, b, (lane & d ? lane - d + kLanes : lane)...);
  lower = __builtin_shufflevector(a, b, (lane & d ? lane + kLanes : lane + d)...);
}

// Within each four lanes, those from `first` on of a and of b in turns, `run` at a time.
template <int first, int run, class V, int... lane>
AIA_INLINE V interleave(V a, V b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(
      a, b, ((lane & ~3) + first + (lane & 3) / (2 * run) * run + lane % run + (lane & run ? kLanes : 0))...);
}

template <int d, int n, class V>
AIA_INLINE void swap_all_blocks(V (&r)[n]) {
  if constexpr (d >= 4) {
    for (int i = 0; i < n; ++i)
      if (!(i & d)) swap_blocks<d>(r[i], r[i + d], AllLanes{});
    swap_all_blocks<d / 2>(r);
  }
}

// Of two vectors that are joined, block by block of d lanes: the first block of a with its second, and the second of b
// with its first.
template <int d, class V, class Join, int... lane>
AIA_INLINE V join_pairs(V a, V b, Join&& join, std::integer_sequence<int, lane...>) {
  return join(__builtin_shufflevector(a, b, (lane & d ? lane + kLanes : lane)...),
              __builtin_shufflevector(a, b, (lane & d ? lane - d + kLanes : lane + d)...));
}

// Rows i, i + d, i + 2 d ... below n, joined so that each has a block of d lanes.
template <int d, int n, class Row, class Join>
AIA_INLINE auto join_blocks(int i, Row&& row, Join&& join) {
  if constexpr (d >= n)
    return row(i);
  else
    return join_pairs<d>(join_blocks<2 * d, n>(i, row, join), join_blocks<2 * d, n>(i + d, row, join), join,
                         AllLanes{});
}

}  // namespace detail

// {left[last], right[0 .. last - 1]} and {left[1 .. last], right[0]}.
template <class A>
AIA_INLINE Vec<A> shift_up(Vec<A> left, Vec<A> right) {
  return detail::lanes_from<kLanes - 1>(left, right, AllLanes{});
}
template <class A>
AIA_INLINE Vec<A> shift_down(Vec<A> left, Vec<A> right) {
  return detail::lanes_from<1>(left, right, AllLanes{});
}

// Transpose every n lanes in place: blocks of four lanes change places, and then the lanes of each block.
template <int n, class V>
AIA_INLINE void transpose(V (&r)[n]) {
  constexpr AllLanes lanes;
  detail::swap_all_blocks<n / 2>(r);
  for (int i = 0; i < n; i += 4) {
    const V a = detail::interleave<0, 1>(r[i], r[i + 1], lanes), b = detail::interleave<2, 1>(r[i], r[i + 1], lanes);
    const V c = detail::interleave<0, 1>(r[i + 2], r[i + 3], lanes);
    const V d = detail::interleave<2, 1>(r[i + 2], r[i + 3], lanes);
    r[i] = detail::interleave<0, 2>(a, c, lanes), r[i + 1] = detail::interleave<2, 2>(a, c, lanes);
    r[i + 2] = detail::interleave<0, 2>(b, d, lanes), r[i + 3] = detail::interleave<2, 2>(b, d, lanes);
  }
}

// The halves of a vector change places.
template <class V>
AIA_INLINE V swap_halves(V v) {
  return detail::lanes_from<kLanes / 2>(v, v, AllLanes{});
}

// The first half of one vector, and the second of another.
template <class V>
AIA_INLINE V from_halves(V first, V second) {
  return detail::first_of(first, second, AllLanes{});
}

// A number for the lanes of each half.
template <class A>
AIA_INLINE Vec<A> splat_each(A first, A second) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return detail::bit_cast<Vec<A>>(_mm512_mask_broadcastss_ps(_mm512_set1_ps(first), 0xff00, _mm_load_ss(&second)));
#endif
  return from_halves(splat(first), splat(second));
}

// Lane i of the result: the lanes of row(i) joined, two by two; of its first n lanes and, where n is less than all,
// lane n + i those of the next n. Rows are met one after the other: few registers hold what is not joined yet.
template <class A, int n, class Row, class Join>
AIA_INLINE Vec<A> join_each(Row&& row, Join&& join) {
  constexpr AllLanes lanes;
  const auto four = [&](int i) { return detail::join_blocks<4, n>(i, row, join); };
  const auto halves = [&](Vec<A> a, Vec<A> b) {
    return join(detail::interleave<0, 1>(a, b, lanes), detail::interleave<2, 1>(a, b, lanes));
  };
  const Vec<A> ab = halves(four(0), four(1)), cd = halves(four(2), four(3));
  return join(detail::interleave<0, 2>(ab, cd, lanes), detail::interleave<2, 2>(ab, cd, lanes));
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
