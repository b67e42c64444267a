// Indices of maxima, lane by lane, as passes over the rows of planes hold them: where a level compares narrow integers
// into a mask they stay narrow, elsewhere they are as wide as the lanes.
#pragma once

#include <limits>

#include "lane_memory.h"

namespace aia::cpu::AIA_CPU_LEVEL {

// How indices lie in memory: in so many bytes each, or as many as a call says (0).
template <int count>
struct IndexBytes {
  static constexpr int kCount = count;
};
using AnyBytes = IndexBytes<0>;
// Indices that nobody will read.
struct NoIndices {};

// What can be done with indices beside lanes of type A: as wide as those.
template <class A, class Stored>
struct Indices {
  using I = IVec<A>;
  static constexpr bool kKnown = true;

  static AIA_INLINE I splat(int64_t index) { return splat_index<A>(index); }
  static AIA_INLINE I counting(int64_t first) { return iota<A>() + splat_index<A>(first); }
  static AIA_INLINE I from(IVec<A> index) { return index; }
  template <class Lanes>
  static AIA_INLINE I load(const char* p, int bytes, Lanes n) {
    if constexpr (Stored::kCount == 1)
      return load_index<A>(reinterpret_cast<const uint8_t*>(p), n);
    else if constexpr (Stored::kCount == 2)
      return load_index<A>(reinterpret_cast<const int16_t*>(p), n);
    else
      return load_index<A>(p, bytes, n);
  }
  static AIA_INLINE I halves(I first, I second) { return from_halves(first, swap_halves(second)); }
  static AIA_INLINE I halves_swapped(I index) { return swap_halves(index); }
  static AIA_INLINE Vec<A> add_where_equal(I a, I b, Vec<A> v, Vec<A> addend) {
    return add_where<A>(a == b, v, addend);
  }
  // The least of those where the condition holds.
  static AIA_INLINE int64_t least_where(IVec<A> condition, I index) {
    return least<kLanes / 2>(condition ? index : splat_index<A>(std::numeric_limits<int32_t>::max()), AllLanes{});
  }
  // A running maximum; numbers: whether v has no NaN.
  template <bool numbers>
  static AIA_INLINE void max_first(Vec<A> v, I index, Vec<A>& best, I& best_index) {
    if constexpr (numbers)
      max_first_of_numbers<A>(v, index, best, best_index);
    else
      cpu::AIA_CPU_LEVEL::max_first<A>(v, index, best, best_index);
  }
  template <class T>
  static AIA_INLINE void store(T* p, I index, int n) {
    store_index<A>(p, index, n);
  }

 private:
  template <int d, int... lane>
  static AIA_INLINE int64_t least(I v, std::integer_sequence<int, lane...> lanes) {
    if constexpr (d == 0) {
      return v[0];
    } else {
      const I other = __builtin_shufflevector(v, v, (lane ^ d)...);
      return least<d / 2>(other < v ? other : v, lanes);
    }
  }
};

// None: of a maximum its value alone.
template <class A>
struct Indices<A, NoIndices> {
  struct I {};
  static constexpr bool kKnown = false;

  static AIA_INLINE I splat(int64_t) { return {}; }
  static AIA_INLINE I counting(int64_t) { return {}; }
  static AIA_INLINE I from(IVec<A>) { return {}; }
  static AIA_INLINE I halves(I, I) { return {}; }
  static AIA_INLINE I halves_swapped(I) { return {}; }
  template <bool numbers>
  static AIA_INLINE void max_first(Vec<A> v, I, Vec<A>& best, I&) {
    IVec<A> unread{};
    if constexpr (numbers)
      best = larger<A>(v, best);
    else
      cpu::AIA_CPU_LEVEL::max_first<A>(v, unread, best, unread);
  }
  template <class T>
  static AIA_INLINE void store(T*, I, int) {}
};

#if defined(__AVX512F__)
template <>
struct Indices<float, IndexBytes<1>> {
  struct I {
    __m128i bytes;
  };
  static constexpr bool kKnown = true;

  static AIA_INLINE I splat(int64_t index) { return {_mm_set1_epi8(static_cast<char>(index))}; }
  static AIA_INLINE I counting(int64_t first) {
    const __m128i lane = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm_add_epi8(lane, _mm_set1_epi8(static_cast<char>(first)))};
  }
  static AIA_INLINE I from(IVec<float> index) { return {_mm512_cvtepi32_epi8(detail::bit_cast<__m512i>(index))}; }
  static AIA_INLINE I load(const char* p, int, Part n) { return {_mm_maskz_loadu_epi8(detail::first_lanes(n), p)}; }
  static AIA_INLINE I load(const char* p, int, int n) {
    return {n < kLanes ? _mm_maskz_loadu_epi8(detail::first_lanes(n), p)
                       : _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))};
  }
  static AIA_INLINE I halves(I first, I second) { return {_mm_unpacklo_epi64(first.bytes, second.bytes)}; }
  static AIA_INLINE I halves_swapped(I index) { return {_mm_shuffle_epi32(index.bytes, 0x4e)}; }
  static AIA_INLINE Vec<float> add_where_equal(I a, I b, Vec<float> v, Vec<float> addend) {
    const __m512 from = detail::bit_cast<__m512>(v);
    return detail::bit_cast<Vec<float>>(
        _mm512_mask_add_ps(from, _mm_cmpeq_epi8_mask(a.bytes, b.bytes), from, detail::bit_cast<__m512>(addend)));
  }
  static AIA_INLINE int64_t least_where(IVec<float> condition, I index) {
    const __mmask16 mask = _mm512_movepi32_mask(detail::bit_cast<__m512i>(condition));
    const __m128i found = _mm_mask_mov_epi8(_mm_set1_epi8(-1), mask, index.bytes);
    const __m128i least = _mm_and_si128(_mm_min_epu8(found, _mm_srli_epi16(found, 8)), _mm_set1_epi16(255));
    return _mm_extract_epi16(_mm_minpos_epu16(least), 0);
  }
  template <bool numbers>
  static AIA_INLINE void max_first(Vec<float> v, I index, Vec<float>& best, I& best_index) {
    const __m512 value = detail::bit_cast<__m512>(v), old = detail::bit_cast<__m512>(best);
    __mmask16 take;
    if constexpr (numbers) {
      take = _mm512_cmp_ps_mask(value, old, _CMP_GT_OQ);
      best = larger<float>(v, best);
    } else {
      take = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(old, old, _CMP_ORD_Q), value, old, _CMP_NLE_UQ);
      best = detail::bit_cast<Vec<float>>(_mm512_mask_mov_ps(old, take, value));
    }
    best_index.bytes = _mm_mask_mov_epi8(best_index.bytes, take, index.bytes);
  }
  static AIA_INLINE void store(uint8_t* p, I index, int n) {
    if (n >= kLanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), index.bytes);
    _mm_mask_storeu_epi8(p, detail::first_lanes(n), index.bytes);
  }
  template <class T>
  static AIA_INLINE void store(T* p, I index, int n) {
    store_index<float>(p, detail::bit_cast<IVec<float>>(_mm512_cvtepu8_epi32(index.bytes)), n);
  }
};

// Only to be compared: where C > 256.
template <>
struct Indices<float, IndexBytes<2>> {
  struct I {
    __m256i words;
  };

  static AIA_INLINE I splat(int64_t index) { return {_mm256_set1_epi16(static_cast<int16_t>(index))}; }
  static AIA_INLINE I counting(int64_t first) {
    const __m128i lane = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm256_add_epi16(_mm256_cvtepu8_epi16(lane), _mm256_set1_epi16(static_cast<int16_t>(first)))};
  }
  static AIA_INLINE I load(const char* p, int, Part n) { return {_mm256_maskz_loadu_epi16(detail::first_lanes(n), p)}; }
  static AIA_INLINE I load(const char* p, int, int n) {
    return {n < kLanes ? _mm256_maskz_loadu_epi16(detail::first_lanes(n), p)
                       : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  static AIA_INLINE I halves(I first, I second) {
    return {_mm256_inserti128_si256(first.words, _mm256_castsi256_si128(second.words), 1)};
  }
  static AIA_INLINE Vec<float> add_where_equal(I a, I b, Vec<float> v, Vec<float> addend) {
    const __m512 from = detail::bit_cast<__m512>(v);
    return detail::bit_cast<Vec<float>>(
        _mm512_mask_add_ps(from, _mm256_cmpeq_epi16_mask(a.words, b.words), from, detail::bit_cast<__m512>(addend)));
  }
};
#endif

}  // namespace aia::cpu::AIA_CPU_LEVEL
