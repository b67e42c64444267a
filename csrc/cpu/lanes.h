// A vector of lanes of an accumulation type, and the conversions between them and the storage types.
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

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

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

template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

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

typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));

template <class To, class From>
AIA_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

AIA_INLINE U32 widen(U16 bits) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // of which GCC makes five instructions
  return bit_cast<U32>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#elif defined(__SSE2__) && !defined(__AVX2__)
  return bit_cast<U32>(_mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&bits)), __m128i{}));
#else
  return __builtin_convertvector(bits, U32);
#endif
}

AIA_INLINE Vec<float> widen_f16(U16 bits) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#else
  // Shifting the exponent field into place leaves it 112 too small; the product corrects that, subnormals included.
  const U32 wide = widen(bits);
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
#elif defined(__F16C__)
  return bit_cast<U16>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
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

// Elements of 16 bits of type T, and back.
template <class T>
AIA_INLINE Vec<float> widened(U16 bits) {
  if constexpr (std::is_same_v<T, bf16>)
    return bit_cast<Vec<float>>(widen(bits) << 16);
  else
    return widen_f16(bits);
}
template <class T>
AIA_INLINE U16 narrowed(Vec<float> v) {
  if constexpr (std::is_same_v<T, bf16>)
    return narrow_bf16(v);
  else
    return narrow_f16(v);
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
  return detail::bit_cast<Vec<float>>(detail::widen(bits) << 16);
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

#if defined(__AVX2__)
namespace detail {

#if defined(__AVX512F__)
AIA_INLINE __mmask16 first_lanes(int n) { return _cvtu32_mask16(_bzhi_u32(0xffff, n)); }
#else
AIA_INLINE __m256i first_lanes(int n) { return bit_cast<__m256i>(iota<float>() < splat_index<float>(n)); }
#endif

}  // namespace detail
#endif

// So many lanes, fewer than all as a rule: where a level has masks they are masked without a question.
struct Part {
  int n;
  AIA_INLINE operator int() const { return n; }
};
#if defined(__AVX512F__)
constexpr bool kMasks = true;
#else
constexpr bool kMasks = false;
#endif

// The first n lanes; the others load as zero and are not stored. A full count takes the direct path, the rest is not
// inlined: it is met at the end of a piece of memory, and compiled many times over.
namespace detail {

template <class T>
__attribute__((noinline)) Vec<Accumulate<T>> load_part(const T* p, int n) {
  T part[kLanes] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
template <class T>
__attribute__((noinline)) void store_part(T* p, Vec<Accumulate<T>> v, int n) {
  T part[kLanes];
  store(part, v);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}

}  // namespace detail

template <class T>
AIA_INLINE Vec<Accumulate<T>> load(const T* p, int n) {
  if (n >= kLanes) return load(p);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return detail::bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(detail::first_lanes(n), p));
  if constexpr (sizeof(T) == 2)
    return detail::widened<T>(detail::bit_cast<detail::U16>(_mm256_maskz_loadu_epi16(detail::first_lanes(n), p)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>)
    return detail::bit_cast<Vec<float>>(_mm256_maskload_ps(p, detail::first_lanes(n)));
#endif
  return detail::load_part(p, n);
}
template <class T>
AIA_INLINE void store(T* p, Vec<Accumulate<T>> v, int n) {
  if (n >= kLanes) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_mask_storeu_ps(p, detail::first_lanes(n), detail::bit_cast<__m512>(v));
  if constexpr (sizeof(T) == 2)
    return _mm256_mask_storeu_epi16(p, detail::first_lanes(n), detail::bit_cast<__m256i>(detail::narrowed<T>(v)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>)
    if (n >= kLanes / 2) {  // two halves that overlap: a store by a mask takes many cycles on some processors
      const __m256 all = detail::bit_cast<__m256>(v);
      const __m256i from = detail::bit_cast<__m256i>(iota<float>() + splat_index<float>(n - kLanes / 2));
      _mm_storeu_ps(p, _mm256_castps256_ps128(all));
      return _mm_storeu_ps(p + n - kLanes / 2, _mm256_castps256_ps128(_mm256_permutevar8x32_ps(all, from)));
    }
#endif
  detail::store_part(p, v, n);
}

template <class T>
AIA_INLINE Vec<Accumulate<T>> load(const T* p, Part part) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return detail::bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(detail::first_lanes(part.n), p));
  if constexpr (sizeof(T) == 2)
    return detail::widened<T>(detail::bit_cast<detail::U16>(_mm256_maskz_loadu_epi16(detail::first_lanes(part.n), p)));
#endif
  return load(p, part.n);
}
template <class T>
AIA_INLINE void store(T* p, Vec<Accumulate<T>> v, Part part) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_mask_storeu_ps(p, detail::first_lanes(part.n), detail::bit_cast<__m512>(v));
  if constexpr (sizeof(T) == 2)
    return _mm256_mask_storeu_epi16(p, detail::first_lanes(part.n), detail::bit_cast<__m256i>(detail::narrowed<T>(v)));
#endif
  store(p, v, part.n);
}

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

// Whether two halves of a vector are loaded from two places at little cost.
template <class A>
#if defined(__AVX512F__)
constexpr bool kLoadsHalves = sizeof(A) == 4;
#else
constexpr bool kLoadsHalves = false;
#endif
// A half of a vector from each of two places: the first n lanes of it; zero in the others.
template <class T>
AIA_INLINE Vec<Accumulate<T>> load_from_each(const T* first, const T* second, Part n) {
#if defined(__AVX512F__)
  const __mmask16 lanes = detail::first_lanes(n);
  if constexpr (std::is_same_v<T, float>) {
    const auto half = [&](const T* p) { return _mm256_maskz_loadu_ps(lanes, p); };
    return detail::bit_cast<Vec<T>>(_mm512_insertf32x8(_mm512_castps256_ps512(half(first)), half(second), 1));
  } else if constexpr (sizeof(T) == 2) {
    const auto half = [&](const T* p) { return _mm_maskz_loadu_epi16(lanes, p); };
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(half(first)), half(second), 1);
    return detail::widened<T>(detail::bit_cast<detail::U16>(both));
  }
#endif
  static_cast<void>(second);
  return load(first, n);
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
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    __m256 wide = detail::bit_cast<__m256>(v);
    asm("" : "+x"(wide));
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

namespace detail {

template <class A, class Index>
__attribute__((noinline)) IVec<A> load_index_part(const Index* p, int n) {
  IVec<A> wide{};
  for (int i = 0; i < n; ++i) wide[i] = p[i];
  return wide;
}
template <class A, class Index>
__attribute__((noinline)) void store_index_part(Index* p, IVec<A> index, int n) {
  for (int i = 0; i < n; ++i) p[i] = static_cast<Index>(index[i]);
}

}  // namespace detail

// Indices of the smallest type make up nearly all there are; for them compilers need help to find the one instruction.
template <class A, class Index>
AIA_INLINE IVec<A> load_index(const Index* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Index) == 1 && sizeof(A) == 4) {
    const __m128i bytes = n < kLanes ? _mm_maskz_loadu_epi8(detail::first_lanes(n), p)
                                     : _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return detail::bit_cast<IVec<A>>(_mm512_cvtepu8_epi32(bytes));
  }
  if constexpr (sizeof(Index) == 2 && sizeof(A) == 4) {
    const __m256i words = n < kLanes ? _mm256_maskz_loadu_epi16(detail::first_lanes(n), p)
                                     : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return detail::bit_cast<IVec<A>>(_mm512_cvtepi16_epi32(words));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Index) == 1 && sizeof(A) == 4)
    if (n < kLanes && n >= kLanes / 2) {  // two halves that overlap
      const uint64_t first = _mm_cvtsi128_si32(_mm_loadu_si32(p)) & 0xffffffffu;
      const uint64_t last = _mm_cvtsi128_si32(_mm_loadu_si32(p + n - kLanes / 2)) & 0xffffffffu;
      const uint64_t all = first | last << 8 * (n - kLanes / 2);
      return detail::bit_cast<IVec<A>>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(all))));
    }
#endif
  if (n < kLanes) return detail::load_index_part<A>(p, n);
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(Index) == 1 && sizeof(A) == 4)
    return detail::bit_cast<IVec<A>>(_mm256_cvtepu8_epi32(_mm_loadu_si64(p)));
  if constexpr (sizeof(Index) == 2 && sizeof(A) == 4)
    return detail::bit_cast<IVec<A>>(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__SSE2__) && !defined(__AVX2__)
  if constexpr (sizeof(Index) == 1 && sizeof(A) == 4) {
    const __m128i words = _mm_unpacklo_epi8(_mm_loadu_si32(p), __m128i{});
    return detail::bit_cast<IVec<A>>(_mm_unpacklo_epi16(words, __m128i{}));
  }
#endif
  return detail::load_index_part<A>(p, kLanes);
}
namespace detail {

template <class A>
__attribute__((noinline)) IVec<A> load_wide_index(const char* p, int bytes, int n) {
  if (bytes == 2) return load_index<A>(reinterpret_cast<const int16_t*>(p), n);
  return load_index<A>(reinterpret_cast<const int32_t*>(p), n);
}

}  // namespace detail

// Indices of so many bytes each.
template <class A, class Lanes>
AIA_INLINE IVec<A> load_index(const char* p, int bytes, Lanes n) {
  if (bytes == 1) return load_index<A>(reinterpret_cast<const uint8_t*>(p), n);
#if defined(__AVX512F__)
  if (bytes == 2) return load_index<A>(reinterpret_cast<const int16_t*>(p), n);
#endif
  return detail::load_wide_index<A>(p, bytes, n);
}
template <class A, class Index>
AIA_INLINE void store_index(Index* p, IVec<A> index, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Index) == 1 && sizeof(A) == 4) {
    const __m128i bytes = _mm512_cvtepi32_epi8(detail::bit_cast<__m512i>(index));
    if (n >= kLanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    return _mm_mask_storeu_epi8(p, detail::first_lanes(n), bytes);
  }
  if constexpr (sizeof(Index) == 2 && sizeof(A) == 4) {
    const __m256i words = _mm512_cvtepi32_epi16(detail::bit_cast<__m512i>(index));
    if (n >= kLanes) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
    return _mm256_mask_storeu_epi16(p, detail::first_lanes(n), words);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Index) == 1 && sizeof(A) == 4) {
    if (n >= kLanes) {
      const __m256i all = detail::bit_cast<__m256i>(index);
      const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
      return _mm_storeu_si64(p, _mm_packus_epi16(words, words));
    }
  }
#elif defined(__SSE2__)
  if constexpr (sizeof(Index) == 1 && sizeof(A) == 4) {
    if (n >= kLanes) {
      const __m128i all = detail::bit_cast<__m128i>(index), words = _mm_packs_epi32(all, all);
      return _mm_storeu_si32(p, _mm_packus_epi16(words, words));
    }
  }
#endif
  detail::store_index_part<A>(p, index, n);
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

template <int d, int n, class V, class Join>
AIA_INLINE void join_blocks(V (&r)[n], Join&& join) {
  if constexpr (d >= 4) {
    for (int i = 0; i < d; ++i) swap_blocks<d>(r[i], r[i + d], AllLanes{}), r[i] = join(r[i], r[i + d]);
    join_blocks<d / 2>(r, join);
  }
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

// The halves of a vector to two places: n lanes of each.
template <class T>
AIA_INLINE void store_to_each(T* first, T* second, Vec<Accumulate<T>> v, Part n) {
#if defined(__AVX512F__)
  const __mmask16 lanes = detail::first_lanes(n);
  if constexpr (std::is_same_v<T, float>) {
    const __m512 both = detail::bit_cast<__m512>(v);
    const auto half = [&](T* p, __m256 part) { _mm256_mask_storeu_ps(p, lanes, part); };
    return half(first, _mm512_castps512_ps256(both)), half(second, _mm512_extractf32x8_ps(both, 1));
  } else if constexpr (sizeof(T) == 2) {
    const __m256i both = detail::bit_cast<__m256i>(detail::narrowed<T>(v));
    const auto half = [&](T* p, __m128i part) { _mm_mask_storeu_epi16(p, lanes, part); };
    return half(first, _mm256_castsi256_si128(both)), half(second, _mm256_extracti128_si256(both, 1));
  }
#endif
  store(first, v, n), store(second, swap_halves(v), n);
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

// Lane i of the result: the lanes of r[i] joined, two by two; of its first n lanes and, where n is less than all, lane
// n + i those of the next n.
template <class A, int n, class Join>
AIA_INLINE Vec<A> join_each(Vec<A> (&r)[n], Join&& join) {
  constexpr AllLanes lanes;
  detail::join_blocks<n / 2>(r, join);
  const auto halves = [&](Vec<A> a, Vec<A> b) {
    return join(detail::interleave<0, 1>(a, b, lanes), detail::interleave<2, 1>(a, b, lanes));
  };
  const Vec<A> ab = halves(r[0], r[1]), cd = halves(r[2], r[3]);
  return join(detail::interleave<0, 2>(ab, cd, lanes), detail::interleave<2, 2>(ab, cd, lanes));
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
