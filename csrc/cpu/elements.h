// Conversions between 16-bit elements and fp32 vectors, and non-temporal stores.
#pragma once

#include "numbers.h"

namespace at_fused {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Calls f(element, accumulator) with values of the types for a dtype.
template <class F>
AT_FUSED_INLINE void with_dtype(Dtype dtype, F f) {
  dtype == Dtype::float32   ? f(float{}, float{})
  : dtype == Dtype::float64 ? f(double{}, double{})
  : dtype == Dtype::float16 ? f(Half{}, float{})
                            : f(BFloat16{}, float{});
}

// __builtin_convertvector compiles to twice as many instructions.
AT_FUSED_INLINE Word widen_bits(HalfWord bits) {
#if AT_FUSED_VECTOR_BYTES == 64
  return (Word)_mm512_cvtepu16_epi32((__m256i)bits);
#elif AT_FUSED_VECTOR_BYTES == 32
  return (Word)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, Word);
#endif
}

AT_FUSED_INLINE Vec<float> widen(HalfWord bits, BFloat16) {
  return bit_cast<Vec<float>>(widen_bits(bits) << 16);
}

AT_FUSED_INLINE Vec<float> widen(HalfWord bits, Half) {
#if AT_FUSED_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps((__m256i)bits);
#elif AT_FUSED_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
#else
  Vec<float> wide;
  for (int i = 0; i < lanes<float>; ++i) wide[i] = bit_cast<torch::headeronly::Half>(bits[i]);
  return wide;
#endif
}

// Like load_pair(), but in any order: bf16 splits fastest into even and odd elements.
template <class T>
AT_FUSED_INLINE auto load_pair_unordered(const T* from) {
  return load_pair(from);
}
AT_FUSED_INLINE VectorPair<Vec<float>> load_pair_unordered(const BFloat16* from) {
  const Word bits = read<Word>(from);
  return {bit_cast<Vec<float>>(bits << 16), bit_cast<Vec<float>>(bits & 0xffff0000u)};
}

#if AT_FUSED_VECTOR_BYTES == 64
// One permutation moves each element to the upper half of its lane. widen() needs two instructions.
AT_FUSED_INLINE VectorPair<Vec<float>> load_pair(const BFloat16* from) {
  const __m512i bits = _mm512_loadu_si512(from);
  VectorOf<uint16_t, 32>::type low, high;
  for (int i = 0; i < 32; ++i) low[i] = uint16_t(i / 2), high[i] = uint16_t(16 + i / 2);
  constexpr __mmask32 upper = 0xaaaaaaaau;
  return {(Vec<float>)_mm512_maskz_permutexvar_epi16(upper, (__m512i)low, bits),
          (Vec<float>)_mm512_maskz_permutexvar_epi16(upper, (__m512i)high, bits)};
}
#endif

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

// Rounds to nearest even: the upper halves are the bf16 values. Not for NaNs, which the carry could
// turn into other values.
AT_FUSED_INLINE Word rounded_bits(Vec<float> value) {
  const Word bits = bit_cast<Word>(value);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

AT_FUSED_INLINE HalfWord narrow(Vec<float> value, BFloat16) {
  const Word quiet_nan = bit_cast<Word>(value) | 0x400000u;
  return narrow_bits((value != value ? quiet_nan : rounded_bits(value)) >> 16);
}

AT_FUSED_INLINE HalfWord narrow(Vec<float> value, Half) {
#if AT_FUSED_VECTOR_BYTES == 64
  return (HalfWord)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif AT_FUSED_VECTOR_BYTES == 32
  return (HalfWord)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
  HalfWord bits;
  for (int i = 0; i < lanes<float>; ++i) bits[i] = torch::headeronly::Half(value[i]).x;
  return bits;
#endif
}

// `stream` selects a non-temporal store. `to` must then be aligned to the size of the vector.
template <bool stream, class V>
AT_FUSED_INLINE void write(void* to, V v) {
#if AT_FUSED_VECTOR_BYTES > 16
  if constexpr (stream && sizeof(V) == 64) return _mm512_stream_si512((__m512i*)to, (__m512i)v);
  if constexpr (stream && sizeof(V) == 32) return _mm256_stream_si256((__m256i*)to, (__m256i)v);
  if constexpr (stream && sizeof(V) == 16) return _mm_stream_si128((__m128i*)to, (__m128i)v);
#endif
  std::memcpy(to, &v, sizeof(v));
}

template <bool stream, class T, class V>
AT_FUSED_INLINE void store_pair(T* to, VectorPair<V> v) {
#if AT_FUSED_VECTOR_BYTES == 64
  // Without NaNs, one permutation gathers the upper halves of both vectors.
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (__builtin_expect(_mm512_cmp_ps_mask((__m512)v.low, (__m512)v.high, _CMP_UNORD_Q) == 0, 1)) {
      VectorOf<uint16_t, 32>::type upper;
      for (int i = 0; i < 32; ++i) upper[i] = uint16_t(2 * i + 1);
      return write<stream>(to,
                           _mm512_permutex2var_epi16((__m512i)rounded_bits(v.low), (__m512i)upper,
                                                     (__m512i)rounded_bits(v.high)));
    }
  }
#endif
  write<stream>(to, narrow(v.low, T{}));
  write<stream>(to + lanes<T>, narrow(v.high, T{}));
}

// Non-temporal stores are weakly ordered. Other threads may read them only after a fence.
AT_FUSED_INLINE void streaming_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace at_fused
