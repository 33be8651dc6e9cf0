// Stores of what gradients are made of: 16-bit elements, pairs of vectors, and stores past the
// caches.
#pragma once

#include "numbers.h"

namespace at_fused {
namespace {

AT_FUSED_INLINE HalfWord narrow_bits(Word bits) {
#if AT_FUSED_VECTOR_BYTES == 64
  return (HalfWord)_mm512_cvtepi32_epi16((__m512i)bits);
#elif AT_FUSED_VECTOR_BYTES == 32
  return (HalfWord)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)bits),
                                    _mm256_extracti128_si256((__m256i)bits, 1));
#else
  return __builtin_convertvector(bits, HalfWord);
#endif
}

// Round to nearest even; a NaN stays one (the rounding could carry its payload away).
AT_FUSED_INLINE HalfWord narrow(Vec<float> value, BFloat16) {
  const Word bits = bit_cast<Word>(value);
  const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Word nan = (bits >> 16) | 0x40u;
  const Word is_nan = (Word)(value != value);
  return narrow_bits((is_nan & nan) | (~is_nan & rounded));
}

AT_FUSED_INLINE HalfWord narrow(Vec<float> value, Half) {
#if AT_FUSED_VECTOR_BYTES == 64
  return (HalfWord)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif AT_FUSED_VECTOR_BYTES == 32
  return (HalfWord)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
  // Adding 2^(exponent + 13) lets the fp32 adder round to nearest even at fp16's last bit.
  const Word bits = bit_cast<Word>(value);
  const Word sign = (bits >> 16) & 0x8000u;
  const Word magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: the unit of the last place stays at 2^-24.
  const Word exponent = magnitude & 0x7f800000u;
  const Word least = Word{} + 0x38800000u;
  const Word small = (Word)(exponent < least);
  const Word base = ((small & least) | (~small & exponent)) + (13u << 23);
  const Vec<float> anchor = bit_cast<Vec<float>>(base);
  const Word rounded = bit_cast<Word>(bit_cast<Vec<float>>(magnitude) + anchor);
  // rounded = anchor + units, so its low bits count fp16 units of the last place.
  const Word units = rounded - base;
  const Word half_exponent = (((base - (13u << 23)) >> 23) - 113u) << 10;
  Word result = half_exponent + units;
  const Word overflow = (Word)(magnitude >= 0x477ff000u);
  result = (overflow & 0x7c00u) | (~overflow & result);
  const Word is_nan = (Word)(magnitude > 0x7f800000u);
  result = (is_nan & 0x7e00u) | (~is_nan & result);
  return narrow_bits(result | sign);
#endif
}

template <class T>
AT_FUSED_INLINE void store(T* to, Vec<float> v) {
  const HalfWord bits = narrow(v, T{});
  std::memcpy(to, &bits, sizeof(bits));
}

template <class T, class V>
AT_FUSED_INLINE void store_both(T* to, Both<V> v) {
  store(to, v.low);
  store(to + vector_elements<T>, v.high);
}

#if AT_FUSED_VECTOR_BYTES == 64
// Upper halves are the nearest bf16, of all but NaNs (see narrow()).
AT_FUSED_INLINE __m512i rounded_bits(Vec<float> value) {
  const Word bits = bit_cast<Word>(value);
  return (__m512i)(bits + 0x7fffu + ((bits >> 16) & 1u));
}

AT_FUSED_INLINE __m512i narrow_both(Both<Vec<float>> v) {
  if (__builtin_expect(_mm512_cmp_ps_mask((__m512)v.low, (__m512)v.high, _CMP_UNORD_Q) != 0, 0)) {
    return _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)narrow(v.low, BFloat16{})),
                              (__m256i)narrow(v.high, BFloat16{}), 1);
  }
  VectorOf<uint16_t, 32>::type upper;
  for (int i = 0; i < 32; ++i) upper[i] = uint16_t(2 * i + 1);
  return _mm512_permutex2var_epi16(rounded_bits(v.low), (__m512i)upper, rounded_bits(v.high));
}

AT_FUSED_INLINE void store_both(BFloat16* to, Both<Vec<float>> v) {
  _mm512_storeu_si512(to, narrow_both(v));
}
#endif

template <class T>
AT_FUSED_INLINE void store_partial(T* to, Vec<float> v, int count) {
  const HalfWord bits = narrow(v, T{});
#if AT_FUSED_VECTOR_BYTES == 64
  _mm256_mask_storeu_epi16(to, (__mmask16)((1u << count) - 1u), (__m256i)bits);
#else
  copy_few(reinterpret_cast<const T*>(&bits), count, to);
#endif
}

// Writes past the caches; `to` must be aligned to the bytes written.
template <class T, class V>
AT_FUSED_INLINE void store_streaming(T* to, V v) {
#if AT_FUSED_VECTOR_BYTES == 64
  if constexpr (sizeof(T) > 2) {
    _mm512_stream_si512((__m512i*)to, (__m512i)v);
  } else {
    _mm256_stream_si256((__m256i*)to, (__m256i)narrow(v, T{}));
  }
#elif AT_FUSED_VECTOR_BYTES == 32
  if constexpr (sizeof(T) > 2) {
    _mm256_stream_si256((__m256i*)to, (__m256i)v);
  } else {
    _mm_stream_si128((__m128i*)to, (__m128i)narrow(v, T{}));
  }
#else
  store(to, v);
#endif
}

template <class T, class V>
AT_FUSED_INLINE void store_both_streaming(T* to, Both<V> v) {
  store_streaming(to, v.low);
  store_streaming(to + vector_elements<T>, v.high);
}

#if AT_FUSED_VECTOR_BYTES == 64
AT_FUSED_INLINE void store_both_streaming(BFloat16* to, Both<Vec<float>> v) {
  _mm512_stream_si512((__m512i*)to, narrow_both(v));
}
#endif

// Streaming stores are weakly ordered: other threads may read only after this.
AT_FUSED_INLINE void streaming_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace at_fused
