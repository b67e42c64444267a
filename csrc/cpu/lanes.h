// Sixteen lanes of an accumulation type, and the conversions between them and the storage types.
//
// Plain GCC/Clang vector extensions: the same source becomes AVX-512, AVX2, SSE2 or NEON code by compiler flags alone.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "passes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef AIA_INLINE
#define AIA_INLINE inline __attribute__((always_inline))
#endif

namespace aia::cpu::AIA_CPU_LEVEL {

template <class A>
struct LaneTypes;
template <>
struct LaneTypes<float> {
  typedef float V __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
};
template <>
struct LaneTypes<double> {
  typedef double V __attribute__((vector_size(128)));
  typedef int64_t I __attribute__((vector_size(128)));
};
template <class A>
using Vec = typename LaneTypes<A>::V;
template <class A>
using IVec = typename LaneTypes<A>::I;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
AIA_INLINE Vec<A> splat(A value) {
  return Vec<A>{} + value;
}

template <class A>
using IndexOf = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;

// An index in every lane. Lanes of float hold 32-bit indices: every axis is shorter than 2^31.
template <class A>
AIA_INLINE IVec<A> splat_index(int64_t index) {
  return IVec<A>{} + static_cast<IndexOf<A>>(index);
}

template <class A>
AIA_INLINE IVec<A> iota() {
  return IVec<A>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

namespace detail {

typedef uint16_t U16 __attribute__((vector_size(32)));
typedef uint32_t U32 __attribute__((vector_size(64)));

template <class To, class From>
AIA_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

AIA_INLINE Vec<float> widen_f16(U16 bits) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
#else
  // Shifting the exponent field into place leaves it 112 too small; the product corrects that, subnormals included.
  const U32 wide = __builtin_convertvector(bits, U32);
  const U32 magnitude = (wide & 0x7fffu) << 13;
  const Vec<float> scaled = bit_cast<Vec<float>>(magnitude) * 0x1p112f;
  const U32 special = bit_cast<U32>((wide & 0x7c00u) == 0x7c00u);
  const U32 value = (special & (magnitude | 0x7f800000u)) | (~special & bit_cast<U32>(scaled));
  return bit_cast<Vec<float>>(value | ((wide & 0x8000u) << 16));
#endif
}

AIA_INLINE U16 narrow_f16(Vec<float> v) {
#if defined(__AVX512F__)
  return bit_cast<U16>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const U32 bits = bit_cast<U32>(v);
  const U32 magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent, round to nearest even. Subnormal results: let an addition do the rounding.
  const U32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U32 subnormal = bit_cast<U32>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  const U32 is_small = bit_cast<U32>(magnitude < 0x38800000u);
  const U32 is_large = bit_cast<U32>(magnitude >= 0x477ff000u);
  const U32 is_nan = bit_cast<U32>(magnitude > 0x7f800000u);
  U32 half = (is_small & subnormal) | (~is_small & normal);
  half = (is_large & 0x7c00u) | (~is_large & half);
  half = (is_nan & 0x7e00u) | (~is_nan & half);
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), U16);
#endif
}

AIA_INLINE U16 narrow_bf16(Vec<float> v) {
  const U32 bits = bit_cast<U32>(v);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 is_nan = bit_cast<U32>(v != v);
  return __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), U16);
}

}  // namespace detail

AIA_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
AIA_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
AIA_INLINE Vec<float> load(const bf16* p) {
  detail::U16 bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return detail::bit_cast<Vec<float>>(__builtin_convertvector(bits, detail::U32) << 16);
}
AIA_INLINE Vec<float> load(const f16* p) {
  detail::U16 bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return detail::widen_f16(bits);
}

AIA_INLINE void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
AIA_INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }
AIA_INLINE void store(bf16* p, Vec<float> v) {
  const detail::U16 bits = detail::narrow_bf16(v);
  __builtin_memcpy(p, &bits, sizeof bits);
}
AIA_INLINE void store(f16* p, Vec<float> v) {
  const detail::U16 bits = detail::narrow_f16(v);
  __builtin_memcpy(p, &bits, sizeof bits);
}

// The first n lanes; the others load as zero and are not stored. A full count takes the direct path.
template <class T>
AIA_INLINE Vec<Accumulate<T>> load(const T* p, int n) {
  if (n >= kLanes) return load(p);
  T part[kLanes] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
template <class T>
AIA_INLINE void store(T* p, Vec<Accumulate<T>> v, int n) {
  if (n >= kLanes) return store(p, v);
  T part[kLanes];
  store(part, v);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}

// The value, loaded once: GCC would rather load it again for every product that takes it.
template <class A>
AIA_INLINE Vec<A> in_register(Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    __m512 wide = detail::bit_cast<__m512>(v);
    asm("" : "+v"(wide));
    return detail::bit_cast<Vec<A>>(wide);
  }
#endif
  return v;
}

// Calls body with the number of lanes, as a constant when it is full: the loads and stores inside lose their branch.
template <class Body>
AIA_INLINE void with_lanes(int lanes, Body&& body) {
  if (lanes == kLanes)
    body(std::integral_constant<int, kLanes>{});
  else
    body(lanes);
}

// Indices of the smallest type make up nearly all there are; for them compilers need help to find the one instruction.
template <class A, class Index>
AIA_INLINE IVec<A> load_index(const Index* p, int n) {
  Index part[kLanes] = {};
  if (n < kLanes) {
    for (int i = 0; i < n; ++i) part[i] = p[i];
    p = part;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(Index) == 1 && sizeof(A) == 4)
    return detail::bit_cast<IVec<A>>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
  IVec<A> wide;
  for (int i = 0; i < kLanes; ++i) wide[i] = p[i];
  return wide;
}
template <class A, class Index>
AIA_INLINE void store_index(Index* p, IVec<A> index, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Index) == 1 && sizeof(A) == 4) {
    if (n >= kLanes)
      return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(detail::bit_cast<__m512i>(index)));
  }
#endif
  for (int i = 0; i < n; ++i) p[i] = static_cast<Index>(index[i]);
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
  const IVec<A> take = ~(v <= best) & (best == best);
  best = take ? v : best;
  best_index = take ? index : best_index;
}

// v + addend in the lanes where the condition holds.
template <class A>
AIA_INLINE Vec<A> add_where(IVec<A> condition, Vec<A> v, Vec<A> addend) {
  return v + (condition ? addend : Vec<A>{});
}

// Halves added to halves. In shuffles: GCC makes branches and memory of the loop that says the same.
template <class A>
AIA_INLINE A sum_lanes(Vec<A> v) {
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return v[0];
}

// a > b ? a : b and a < b ? a : b, so b where one is NaN: one instruction, of which GCC makes two.
template <class A>
AIA_INLINE Vec<A> larger(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return detail::bit_cast<Vec<A>>(_mm512_max_ps(detail::bit_cast<__m512>(a), detail::bit_cast<__m512>(b)));
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

// {left[15], right[0 .. 14]} and {left[1 .. 15], right[0]}.
template <class A>
AIA_INLINE Vec<A> shift_up(Vec<A> left, Vec<A> right) {
  return __builtin_shufflevector(left, right, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30);
}
template <class A>
AIA_INLINE Vec<A> shift_down(Vec<A> left, Vec<A> right) {
  return __builtin_shufflevector(left, right, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
}

// 16 x 16 transpose in place, by halving: at distance s, blocks of s lanes change places between rows i and i + s.
template <class V>
AIA_INLINE void transpose(V (&r)[kLanes]) {
#define AIA_SWAP(i, s, ...)              \
  {                                      \
    const V low = r[i], high = r[i + s]; \
    constexpr int d = s;                 \
    r[i] = AIA_LOW(low, high, d);        \
    r[i + s] = AIA_HIGH(low, high, d);   \
  }
#define AIA_LANE_LOW(l, d) (((l) & (d)) ? (l) - (d) + kLanes : (l))
#define AIA_LANE_HIGH(l, d) (((l) & (d)) ? (l) + kLanes : (l) + (d))
#define AIA_ALL(f, d)                                                                                           \
  f(0, d), f(1, d), f(2, d), f(3, d), f(4, d), f(5, d), f(6, d), f(7, d), f(8, d), f(9, d), f(10, d), f(11, d), \
      f(12, d), f(13, d), f(14, d), f(15, d)
#define AIA_LOW(a, b, d) __builtin_shufflevector(a, b, AIA_ALL(AIA_LANE_LOW, d))
#define AIA_HIGH(a, b, d) __builtin_shufflevector(a, b, AIA_ALL(AIA_LANE_HIGH, d))
#define AIA_STAGE(s, i0, i1, i2, i3, i4, i5, i6, i7) \
  AIA_SWAP(i0, s)                                    \
  AIA_SWAP(i1, s) AIA_SWAP(i2, s) AIA_SWAP(i3, s) AIA_SWAP(i4, s) AIA_SWAP(i5, s) AIA_SWAP(i6, s) AIA_SWAP(i7, s)
  AIA_STAGE(8, 0, 1, 2, 3, 4, 5, 6, 7)
  AIA_STAGE(4, 0, 1, 2, 3, 8, 9, 10, 11)
  AIA_STAGE(2, 0, 1, 4, 5, 8, 9, 12, 13)
  AIA_STAGE(1, 0, 2, 4, 6, 8, 10, 12, 14)
#undef AIA_STAGE
#undef AIA_HIGH
#undef AIA_LOW
#undef AIA_ALL
#undef AIA_LANE_HIGH
#undef AIA_LANE_LOW
#undef AIA_SWAP
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
