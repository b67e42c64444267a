// Loads and stores of vectors of lanes (lanes.h), whole or in part, and the conversions between their accumulation type
// and the storage types.
#pragma once

#include "lanes.h"

namespace aia::cpu::AIA_CPU_LEVEL {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

namespace detail {

typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));

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
#if defined(__AVX512F__)  // of which GCC makes three instructions more
  const __m512 value = bit_cast<__m512>(v);
  const __m512i wide = bit_cast<__m512i>(v), odd = _mm512_and_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(wide, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_number = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
  const __m512i nan = _mm512_set1_epi32(0x7fc0);
  return bit_cast<U16>(_mm512_cvtepi32_epi16(_mm512_mask_srli_epi32(nan, is_number, sum, 16)));
#else
  const U32 bits = bit_cast<U32>(v);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 is_nan = bit_cast<U32>(v != v);
  return __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), U16);
#endif
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

// The same of a row behind which others will be stored: the other lanes may be stored too.
struct PartBefore : Part {};

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

template <class T>
AIA_INLINE void store(T* p, Vec<Accumulate<T>> v, PartBefore) {
  store(p, v);
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
  if constexpr (sizeof(Index) == 2 && sizeof(A) == 4)
    if (n < kLanes && n > kLanes / 2) {  // two halves that overlap
      uint64_t first, last;
      std::memcpy(&first, p, sizeof first), std::memcpy(&last, p + n - kLanes / 2, sizeof last);
      const __m128i all = _mm_set_epi64x(static_cast<int64_t>(last >> 16 * (kLanes - n)), static_cast<int64_t>(first));
      return detail::bit_cast<IVec<A>>(_mm256_cvtepi16_epi32(all));
    }
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
  if constexpr (sizeof(Index) == 2 && sizeof(A) == 4) {
    const __m128i words = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return detail::bit_cast<IVec<A>>(_mm_srai_epi32(_mm_unpacklo_epi16(words, words), 16));
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

// The first n lanes in both halves; zero in the others.
AIA_INLINE Vec<float> load_in_both(const float* p, Part n) {
#if defined(__AVX512F__)
  return detail::bit_cast<Vec<float>>(_mm512_broadcast_f32x8(_mm256_maskz_loadu_ps(detail::first_lanes(n), p)));
#else
  return load(p, n);
#endif
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
template <class T>
AIA_INLINE void store_to_each(T* first, T* second, Vec<Accumulate<T>> v, PartBefore n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    const __m512 both = detail::bit_cast<__m512>(v);
    _mm256_storeu_ps(first, _mm512_castps512_ps256(both));
    return _mm256_storeu_ps(second, _mm512_extractf32x8_ps(both, 1));
  } else if constexpr (sizeof(T) == 2) {
    const __m256i both = detail::bit_cast<__m256i>(detail::narrowed<T>(v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(first), _mm256_castsi256_si128(both));
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(second), _mm256_extracti128_si256(both, 1));
  }
#endif
  store_to_each(first, second, v, Part{n});
}

}  // namespace aia::cpu::AIA_CPU_LEVEL
