// SIMD vectors of one instruction set, their loads and stores, and powers. They are GCC vector
// extensions, so that one source serves x86 and aarch64; intrinsics are used only where compilers
// generate poor code. kernels_*.cpp define AT_FUSED_VECTOR_BYTES; 32 and 64 are for x86 only.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if AT_FUSED_VECTOR_BYTES == 16
#include <torch/headeronly/util/Half.h>
#endif

// Code from here on is compiled for the instruction set; headers above are not (see kernels.h).
#if defined(__clang__) && AT_FUSED_VECTOR_BYTES == 64
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#elif defined(__clang__) && AT_FUSED_VECTOR_BYTES == 32
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif AT_FUSED_VECTOR_BYTES == 64
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#elif AT_FUSED_VECTOR_BYTES == 32
#pragma GCC target("avx2,fma,f16c")
#endif

#define AT_FUSED_INLINE inline __attribute__((always_inline))
#define AT_FUSED_LAMBDA __attribute__((always_inline))

namespace at_fused {
namespace {

// ---- vectors ----------------------------------------------------------------------------------

template <class E, int n>
struct VectorOf {
  typedef E type __attribute__((vector_size(n * sizeof(E))));
};

// Elements per vector after widening: 16-bit elements are computed in fp32.
template <class T>
constexpr int lanes = AT_FUSED_VECTOR_BYTES / (sizeof(T) < 4 ? 4 : sizeof(T));

template <class A>
using Vec = typename VectorOf<A, lanes<A>>::type;

using Word = VectorOf<uint32_t, lanes<float>>::type;      // bits of a Vec<float>
using HalfWord = VectorOf<uint16_t, lanes<float>>::type;  // the same number of 16-bit elements

template <class To, class From>
AT_FUSED_INLINE To bit_cast(const From& from) {
  return __builtin_bit_cast(To, from);
}

template <class A>
AT_FUSED_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};
}

template <class V>
AT_FUSED_INLINE V read(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

// Prevents the compiler from fusing the multiplication that computes v with a following addition.
// With a fused one, the difference of two equal products would not be 0.
template <class V>
AT_FUSED_INLINE V without_fma(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

template <class V>
using MaskOf = decltype(V{} < V{});

template <class V>
AT_FUSED_INLINE V absolute(V x) {
  const auto sign = bit_cast<MaskOf<V>>(-V{});
  return bit_cast<V>(bit_cast<MaskOf<V>>(x) & ~sign);
}

// Selects lanes i... of the concatenation of a and b. GCC before 12 lacks __builtin_shufflevector.
template <int... i, class V>
AT_FUSED_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, i...);
#else
  return __builtin_shuffle(a, b, MaskOf<V>{i...});
#endif
}

// Takes from each segment of a and b the half that starts at lane `begin`. A segment of the result
// is a's half followed by b's half.
template <int segment, int begin, class V, int... i>
AT_FUSED_INLINE V join_halves(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int half = segment / 2, width = sizeof...(i);
  return shuffle<(i / segment * segment + i % half + begin + (i % segment < half ? 0 : width))...>(
      a, b);
}

// Reduces each of the vectors v[0 ... count) to one lane of the result, with a third of the
// instructions of separate horizontal reductions. Each step combines the halves of every vector, so
// the order of a reduction depends only on the vector width.
template <int count, class V, size_t width, class F>
AT_FUSED_INLINE V reduce_each(V (&v)[width], F combine) {
  if constexpr (count > 1) {
    constexpr std::make_integer_sequence<int, width> indices;
    for (int i = 0; i < count / 2; ++i) {
      const V a = v[i], b = v[i + count / 2];
      v[i] = combine(join_halves<count, 0>(a, b, indices),
                     join_halves<count, count / 2>(a, b, indices));
    }
    return reduce_each<count / 2>(v, combine);
  } else {
    return v[0];
  }
}

template <class A, int count = lanes<A>>
AT_FUSED_INLINE Vec<A> sum_each(Vec<A> (&v)[lanes<A>]) {
  return reduce_each<count>(v, [](Vec<A> a, Vec<A> b) AT_FUSED_LAMBDA { return a + b; });
}

// ---- memory ----------------------------------------------------------------------------------

template <class T>
AT_FUSED_INLINE auto load(const T* from) {
  if constexpr (sizeof(T) == 2) {
    return widen(read<HalfWord>(from), T{});
  } else {
    return read<Vec<T>>(from);
  }
}

template <class V>
struct VectorPair {
  V low, high;
};

template <class T>
AT_FUSED_INLINE auto load_pair(const T* from) {
  return VectorPair<decltype(load(from))>{load(from), load(from + lanes<T>)};
}

// Identity for 32 and 64 bits; elements.h has the 16-bit overloads.
AT_FUSED_INLINE Vec<float> narrow(Vec<float> v, float) { return v; }
AT_FUSED_INLINE Vec<double> narrow(Vec<double> v, double) { return v; }

template <class T, class V>
AT_FUSED_INLINE void store(T* to, V v) {
  const auto elements = narrow(v, T{});
  std::memcpy(to, &elements, sizeof(elements));
}

// Copies count < 2 * piece elements in pieces of compile-time sizes.
template <class T, int piece = lanes<T> / 2>
AT_FUSED_INLINE void copy_partial(const T* from, int count, T* to) {
  if (count & piece) {
    std::memcpy(to, from, piece * sizeof(T));
    from += piece, to += piece;
  }
  if constexpr (piece > 1) copy_partial<T, piece / 2>(from, count, to);
}

// A mask of the first `count` lanes: 32-bit ones, or also 16-bit ones with AVX-512.
#if AT_FUSED_VECTOR_BYTES == 64
AT_FUSED_INLINE __mmask16 mask_of_first(int count) { return __mmask16((1u << count) - 1u); }
#elif AT_FUSED_VECTOR_BYTES == 32
AT_FUSED_INLINE __m256i mask_of_first(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// Loads `count` elements and zeros for the rest. Does not read past them.
template <class T>
AT_FUSED_INLINE auto load_partial(const T* from, int count) {
  [[maybe_unused]] constexpr int words = sizeof(T) / 4;
#if AT_FUSED_VECTOR_BYTES == 64
  if constexpr (words > 0) {
    return (Vec<T>)_mm512_maskz_loadu_epi32(mask_of_first(count * words), from);
  } else {
    return widen((HalfWord)_mm256_maskz_loadu_epi16(mask_of_first(count), from), T{});
  }
#else
#if AT_FUSED_VECTOR_BYTES == 32
  if constexpr (words > 0) {
    return (Vec<T>)_mm256_maskload_epi32((const int*)from, mask_of_first(count * words));
  }
#endif
  T padded[lanes<T>] = {};
  copy_partial(from, count, padded);
  return load(padded);
#endif
}

template <class T, class V>
AT_FUSED_INLINE void store_partial(T* to, V v, int count) {
  [[maybe_unused]] constexpr int words = sizeof(T) / 4;
  const auto elements = narrow(v, T{});
#if AT_FUSED_VECTOR_BYTES == 64
  if constexpr (words > 0) {
    _mm512_mask_storeu_epi32(to, mask_of_first(count * words), (__m512i)elements);
  } else {
    _mm256_mask_storeu_epi16(to, mask_of_first(count), (__m256i)elements);
  }
#else
#if AT_FUSED_VECTOR_BYTES == 32
  if constexpr (words > 0) {
    return _mm256_maskstore_epi32((int*)to, mask_of_first(count * words), (__m256i)elements);
  }
#endif
  copy_partial(reinterpret_cast<const T*>(&elements), count, to);
#endif
}

// A full or a partial vector.
template <class T>
AT_FUSED_INLINE auto load_up_to(const T* from, int count) {
  return count == lanes<T> ? load(from) : load_partial(from, count);
}
template <class T, class V>
AT_FUSED_INLINE void store_up_to(T* to, V v, int count) {
  count == lanes<T> ? store(to, v) : store_partial(to, v, count);
}

constexpr uintptr_t kCacheLine = 64;  // bytes

// Prefetches 8 KB ahead of `data` into the L2 cache: hardware prefetchers stop at a page boundary.
template <int elements, class T>
AT_FUSED_INLINE void prefetch_ahead(const T* data) {
  const char* next = reinterpret_cast<const char*>(data) + 8192;
  const char* end = next + elements * sizeof(T);
  for (; next < end; next += kCacheLine) __builtin_prefetch(next, 0, 2);
}

// ---- power(x) = |x|^p, slope(x) = (d/dx |x|^p) / p = |x|^(p-1) * sign(x) -----------------------

// x^p = 2^(p * log2(x)) for x >= 0, within a few ulp; NaN is kept. log2(x) is an integer exponent
// of at most 8 bits plus the log2 of the mantissa. `high` is p truncated to 12 bits, so high *
// exponent is exact in fp32.
AT_FUSED_INLINE Vec<float> positive_power(Vec<float> x, double p) {
  using Whole = MaskOf<Vec<float>>;
  const float high = bit_cast<float>(bit_cast<uint32_t>(float(p)) & 0xfffff000u);
  const float low = float(p - high);
  const auto subnormal = x < 0x1p-126f;
  const Word bits = bit_cast<Word>(subnormal ? x * 0x1p24f : x);
  // Subtracting the bits of sqrt(1/2) yields a mantissa in [sqrt(1/2), sqrt(2)).
  const Whole whole = (Whole)(bits - 0x3f3504f3u) >> 23;
  const Vec<float> mantissa = bit_cast<Vec<float>>(bits - ((Word)whole << 23));
  const Vec<float> exponent =
      __builtin_convertvector(whole, Vec<float>) - (subnormal ? splat(24.0f) : Vec<float>{});
  const Vec<float> s = (mantissa - 1) / (mantissa + 1);
  const Vec<float> z = s * s;
  const Vec<float> log2_mantissa =
      s * (2.88539008f +
           z * (0.961796694f + z * (0.577078016f + z * (0.412198583f + z * 0.320598898f))));

  const Vec<float> tail = (high + low) * log2_mantissa + low * exponent;
  Vec<float> y = high * exponent + tail;
  y = y > 192.0f ? splat(192.0f) : y;
  y = y < -192.0f ? splat(-192.0f) : y;
  const Vec<float> rounded = (y + 0x1.8p23f) - 0x1.8p23f;
  // The integer part cancels exactly before `tail` is added, so no bits of tail are lost.
  Vec<float> f = (high * exponent - rounded) + tail;
  f = absolute(y) >= 192.0f ? Vec<float>{} : f;
  const Vec<float> e =
      1 + f * (0.693147181f +
               f * (0.240226507f +
                    f * (0.0555041087f +
                         f * (0.00961812911f + f * (0.00133335581f + f * (0.000154035304f +
                                                                          f * 1.52527338e-05f))))));
  // 2^rounded as two factors, so that results may be subnormal or infinite.
  const Whole n = __builtin_convertvector(rounded, Whole), half = n >> 1;
  const Vec<float> power =
      e * bit_cast<Vec<float>>((half + 127) << 23) * bit_cast<Vec<float>>((n - half + 127) << 23);
  return (x == 0) | (x != x) | (x == __builtin_inff()) ? x : power;
}

AT_FUSED_INLINE Vec<double> positive_power(Vec<double> x, double p) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::pow(x[i], p);
  return x;
}

template <class V>
AT_FUSED_INLINE V signed_like(V magnitude, V x) {
  const auto sign = bit_cast<MaskOf<V>>(-V{});
  const V value =
      bit_cast<V>((bit_cast<MaskOf<V>>(magnitude) & ~sign) | (bit_cast<MaskOf<V>>(x) & sign));
  return (x == 0) | (x != x) ? x : value;  // sign(0) = 0; NaN is kept
}

// An exponent p. `known` is p if it has a specialisation, else 0.
template <int known>
struct Exponent {
  double p;

  template <class V>
  AT_FUSED_INLINE V power(V x) const {
    if constexpr (known == 1) return absolute(x);
    if constexpr (known == 2) return x * x;
    if constexpr (known == 4) return (x * x) * (x * x);
    return positive_power(absolute(x), p);
  }
  template <class V>
  AT_FUSED_INLINE V slope(V x) const {
    if constexpr (known == 1) return signed_like(V{} + 1, x);
    if constexpr (known == 2) return x;
    if constexpr (known == 4) return (x * x) * x;
    return signed_like(positive_power(absolute(x), p - 1), x);
  }
};

template <class F>
AT_FUSED_INLINE void with_exponent(double p, F f) {
  p == 2   ? f(Exponent<2>{p})
  : p == 1 ? f(Exponent<1>{p})
  : p == 4 ? f(Exponent<4>{p})
           : f(Exponent<0>{p});
}

}  // namespace
}  // namespace at_fused
