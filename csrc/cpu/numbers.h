// Numbers of any dtype, from memory into vectors of the dtype that they are computed in, and back.
// Intrinsics appear only where the compiler has no good code of its own: fp16, masks, streaming.
#pragma once

#include <cstdint>
#include <cstring>

#include "../feature.h"
#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace at_fused {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// f(element, accumulator), of the types that belong to a dtype.
template <class F>
AT_FUSED_INLINE void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32:
      return f(float{}, float{});
    case Dtype::float64:
      return f(double{}, double{});
    case Dtype::float16:
      return f(Half{}, float{});
    case Dtype::bfloat16:
      return f(BFloat16{}, float{});
  }
}

// __builtin_convertvector would do, in twice as many instructions.
AT_FUSED_INLINE Word widen_bits(HalfWord bits) {
#if defined(__x86_64__) && AT_FUSED_VECTOR_BYTES == 64
  return (Word)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__x86_64__) && AT_FUSED_VECTOR_BYTES == 32
  return (Word)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, Word);
#endif
}

AT_FUSED_INLINE HalfWord narrow_bits(Word bits) {
#if defined(__x86_64__) && AT_FUSED_VECTOR_BYTES == 64
  return (HalfWord)_mm512_cvtepi32_epi16((__m512i)bits);
#elif defined(__x86_64__) && AT_FUSED_VECTOR_BYTES == 32
  return (HalfWord)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)bits),
                                    _mm256_extracti128_si256((__m256i)bits, 1));
#else
  return __builtin_convertvector(bits, HalfWord);
#endif
}

// ---- 16-bit floating point, in fp32 registers -------------------------------------------------

AT_FUSED_INLINE Vec<float> widen(HalfWord bits, BFloat16) {
  return bit_cast<Vec<float>>(widen_bits(bits) << 16);
}

// Round to nearest even; a NaN stays one (the rounding could carry its payload away).
AT_FUSED_INLINE HalfWord narrow(Vec<float> value, BFloat16) {
  const Word bits = bit_cast<Word>(value);
  const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Word nan = (bits >> 16) | 0x40u;
  const Word is_nan = (Word)(value != value);
  return narrow_bits((is_nan & nan) | (~is_nan & rounded));
}

#if defined(__x86_64__) && AT_FUSED_VECTOR_BYTES >= 32

AT_FUSED_INLINE Vec<float> widen(HalfWord bits, Half) {
#if AT_FUSED_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps((__m256i)bits);
#else
  return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
#endif
}

AT_FUSED_INLINE HalfWord narrow(Vec<float> value, Half) {
#if AT_FUSED_VECTOR_BYTES == 64
  return (HalfWord)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#else
  return (HalfWord)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#endif
}

#else

// Exponents are re-biased by a multiplication, which also normalises subnormals.
AT_FUSED_INLINE Vec<float> widen(HalfWord bits, Half) {
  const Word wide = widen_bits(bits);
  const Word magnitude = (wide & 0x7fffu) << 13;
  const Vec<float> scaled = bit_cast<Vec<float>>(magnitude) * 0x1p112f;
  const Word special = (Word)((wide & 0x7c00u) == 0x7c00u);  // infinity or NaN
  const Word finite_bits = bit_cast<Word>(scaled);
  const Word result = (special & (magnitude | 0x7f800000u)) | (~special & finite_bits);
  return bit_cast<Vec<float>>(result | ((wide & 0x8000u) << 16));
}

// Adding 2^(exponent + 13) lets the fp32 adder round to nearest even at fp16's last bit.
AT_FUSED_INLINE HalfWord narrow(Vec<float> value, Half) {
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
}

#endif

// ---- memory -----------------------------------------------------------------------------------

AT_FUSED_INLINE Vec<float> load(const float* from) { return read<Vec<float>>(from); }
AT_FUSED_INLINE Vec<double> load(const double* from) { return read<Vec<double>>(from); }
AT_FUSED_INLINE Vec<float> load(const Half* from) { return widen(read<HalfWord>(from), Half{}); }
AT_FUSED_INLINE Vec<float> load(const BFloat16* from) {
  return widen(read<HalfWord>(from), BFloat16{});
}

// The elements of a vector of T: as many as fit once they are widened.
template <class T>
constexpr int vector_elements = AT_FUSED_VECTOR_BYTES / (sizeof(T) < 4 ? 4 : sizeof(T));

// Two vectors of consecutive elements.
template <class V>
struct Both {
  V low, high;
};

template <class T>
AT_FUSED_INLINE auto load_both(const T* from) {
  return Both<decltype(load(from))>{load(from), load(from + vector_elements<T>)};
}

// As load_both(), in whatever order is quickest: bf16 in even and odd elements.
template <class T>
AT_FUSED_INLINE auto load_alternate(const T* from) {
  return load_both(from);
}
AT_FUSED_INLINE Both<Vec<float>> load_alternate(const BFloat16* from) {
  const Word bits = read<Word>(from);
  return {bit_cast<Vec<float>>(bits << 16), bit_cast<Vec<float>>(bits & 0xffff0000u)};
}

#if defined(__x86_64__) && AT_FUSED_VECTOR_BYTES == 64
// One permutation brings each element into the upper half of its lane; widen() takes two steps.
AT_FUSED_INLINE Both<Vec<float>> load_both(const BFloat16* from) {
  const __m512i bits = _mm512_loadu_si512(from);
  VectorOf<uint16_t, 32>::type low, high;
  for (int i = 0; i < 32; ++i) low[i] = uint16_t(i / 2), high[i] = uint16_t(16 + i / 2);
  constexpr __mmask32 upper = 0xaaaaaaaau;
  return {(Vec<float>)_mm512_maskz_permutexvar_epi16(upper, (__m512i)low, bits),
          (Vec<float>)_mm512_maskz_permutexvar_epi16(upper, (__m512i)high, bits)};
}
#endif

AT_FUSED_INLINE void store(float* to, Vec<float> v) { std::memcpy(to, &v, sizeof(v)); }
AT_FUSED_INLINE void store(double* to, Vec<double> v) { std::memcpy(to, &v, sizeof(v)); }
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

#if defined(__x86_64__) && AT_FUSED_VECTOR_BYTES == 64
// Upper halves are the nearest bf16, of all but NaNs (see narrow()).
AT_FUSED_INLINE __m512i rounded_bits(Vec<float> value) {
  const Word bits = bit_cast<Word>(value);
  return (__m512i)(bits + 0x7fffu + ((bits >> 16) & 1u));
}

AT_FUSED_INLINE __m512i narrow_both(Both<Vec<float>> v, BFloat16) {
  if (__builtin_expect(_mm512_cmp_ps_mask((__m512)v.low, (__m512)v.high, _CMP_UNORD_Q) != 0, 0)) {
    return _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)narrow(v.low, BFloat16{})),
                              (__m256i)narrow(v.high, BFloat16{}), 1);
  }
  VectorOf<uint16_t, 32>::type upper;
  for (int i = 0; i < 32; ++i) upper[i] = uint16_t(2 * i + 1);
  return _mm512_permutex2var_epi16(rounded_bits(v.low), (__m512i)upper, rounded_bits(v.high));
}

AT_FUSED_INLINE void store_both(BFloat16* to, Both<Vec<float>> v) {
  _mm512_storeu_si512(to, narrow_both(v, BFloat16{}));
}
#endif

// `count` elements, fewer than twice the first piece, in pieces whose sizes the compiler knows.
template <class T, int piece = vector_elements<T> / 2>
AT_FUSED_INLINE void copy_few(const T* from, int count, T* to) {
  if (count & piece) {
    std::memcpy(to, from, piece * sizeof(T));
    from += piece, to += piece;
  }
  if constexpr (piece > 1) copy_few<T, piece / 2>(from, count, to);
}

#if defined(__x86_64__) && AT_FUSED_VECTOR_BYTES == 32
AT_FUSED_INLINE __m256i first_words(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
AT_FUSED_INLINE __m256i first_double_words(int count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
#endif

// The first `count` elements, zeros behind them. Reads nothing beyond.
template <class T>
AT_FUSED_INLINE auto load_partial(const T* from, int count) {
#if defined(__x86_64__) && AT_FUSED_VECTOR_BYTES == 64
  const uint32_t mask = (1u << count) - 1u;
  if constexpr (sizeof(T) == 8) {
    return (Vec<double>)_mm512_maskz_loadu_pd((__mmask8)mask, from);
  } else if constexpr (sizeof(T) == 4) {
    return (Vec<float>)_mm512_maskz_loadu_ps((__mmask16)mask, from);
  } else {
    return widen((HalfWord)_mm256_maskz_loadu_epi16((__mmask16)mask, from), T{});
  }
#else
#if defined(__x86_64__) && AT_FUSED_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 8) {
    return (Vec<double>)_mm256_maskload_pd((const double*)from, first_double_words(count));
  } else if constexpr (sizeof(T) == 4) {
    return (Vec<float>)_mm256_maskload_ps((const float*)from, first_words(count));
  }
#endif
  T padded[vector_elements<T>] = {};
  copy_few(from, count, padded);
  return load(padded);
#endif
}

template <class T, class V>
AT_FUSED_INLINE void store_partial(T* to, V v, int count) {
#if defined(__x86_64__) && AT_FUSED_VECTOR_BYTES == 64
  const uint32_t mask = (1u << count) - 1u;
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(to, (__mmask8)mask, (__m512d)v);
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, (__mmask16)mask, (__m512)v);
  } else {
    _mm256_mask_storeu_epi16(to, (__mmask16)mask, (__m256i)narrow(v, T{}));
  }
#else
#if defined(__x86_64__) && AT_FUSED_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 8) {
    return _mm256_maskstore_pd((double*)to, first_double_words(count), (__m256d)v);
  } else if constexpr (sizeof(T) == 4) {
    return _mm256_maskstore_ps((float*)to, first_words(count), (__m256)v);
  }
#endif
  T padded[vector_elements<T>];
  store(padded, v);
  copy_few(padded, count, to);
#endif
}

constexpr uintptr_t kCacheLine = 64;  // bytes

// Asks for what is read 8 KB after `data`, into the second-level cache: the hardware does not run
// ahead from one page into the next.
template <int elements, class T>
AT_FUSED_INLINE void prefetch_ahead(const T* data) {
  const char* next = reinterpret_cast<const char*>(data) + 8192;
  const char* end = next + elements * sizeof(T);
  for (; next < end; next += kCacheLine) __builtin_prefetch(next, 0, 2);
}

// Writes past the caches; `to` must be aligned to the bytes written.
template <class T, class V>
AT_FUSED_INLINE void store_streaming(T* to, V v) {
#if defined(__x86_64__) && AT_FUSED_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 8) {
    _mm512_stream_pd(to, (__m512d)v);
  } else if constexpr (sizeof(T) == 4) {
    _mm512_stream_ps(to, (__m512)v);
  } else {
    _mm256_stream_si256((__m256i*)to, (__m256i)narrow(v, T{}));
  }
#elif defined(__x86_64__) && AT_FUSED_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 8) {
    _mm256_stream_pd(to, (__m256d)v);
  } else if constexpr (sizeof(T) == 4) {
    _mm256_stream_ps(to, (__m256)v);
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

#if defined(__x86_64__) && AT_FUSED_VECTOR_BYTES == 64
AT_FUSED_INLINE void store_both_streaming(BFloat16* to, Both<Vec<float>> v) {
  _mm512_stream_si512((__m512i*)to, narrow_both(v, BFloat16{}));
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
