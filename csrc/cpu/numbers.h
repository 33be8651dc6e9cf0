// Vectors of one instruction-set level, in the compiler's own vector types, so that one source
// serves x86 and everything else; and loads of any dtype into vectors of the dtype that it is
// computed in; and powers. Intrinsics appear only where the compiler has no good code of its own.
// AT_FUSED_VECTOR_BYTES is set by the including kernels_*.cpp: 32 and 64 are x86's alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../feature.h"

#if defined(__x86_64__)
#include <immintrin.h>
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

template <class A>
constexpr int lanes = AT_FUSED_VECTOR_BYTES / sizeof(A);

template <class A>
using Vec = typename VectorOf<A, lanes<A>>::type;

using Word = VectorOf<uint32_t, lanes<float>>::type;      // the bits of a Vec<float>
using HalfWord = VectorOf<uint16_t, lanes<float>>::type;  // as many 16-bit elements

template <class To, class From>
AT_FUSED_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast changes no size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
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

template <class V, class M>
AT_FUSED_INLINE V select(M mask, V yes, V no) {
  return mask ? yes : no;
}

// The value as rounded here: the compiler must not fuse the multiplication that it comes from with
// what follows, or the difference of two alike values would not be 0.
template <class V>
AT_FUSED_INLINE V rounded(V v) {
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

// The lanes i... of `a` and, behind its own, `b`. gcc before 12 has another builtin for it.
template <int... i, class V>
AT_FUSED_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, i...);
#else
  return __builtin_shuffle(a, b, MaskOf<V>{i...});
#endif
}

// Lane i: of segment i / segment of both, the half that begins at `begin`, a's and then b's.
template <int segment, int begin, class V, int... i>
AT_FUSED_INLINE V halves(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int half = segment / 2, width = sizeof...(i);
  return shuffle<(i / segment * segment + i % half + begin + (i % segment < half ? 0 : width))...>(
      a, b);
}

// The sums of the lanes of `lanes<A>` vectors, as one vector: a third of the instructions of one
// sum after the other. Every sum folds its halves again and again, so its order depends on the
// vector's width alone.
template <class A, int count = lanes<A>>
AT_FUSED_INLINE Vec<A> sum_each(Vec<A> (&v)[lanes<A>]) {
  if constexpr (count > 1) {
    constexpr std::make_integer_sequence<int, lanes<A>> all;
    for (int i = 0; i < count / 2; ++i) {
      const Vec<A> a = v[i], b = v[i + count / 2];
      v[i] = halves<count, 0>(a, b, all) + halves<count, count / 2>(a, b, all);
    }
    return sum_each<A, count / 2>(v);
  } else {
    return v[0];
  }
}

// The lanes of the lower and the upper half in turns.
template <class V, int... i>
AT_FUSED_INLINE V alternate(V v, std::integer_sequence<int, i...>) {
  return shuffle<(i / 2 + i % 2 * int(sizeof...(i) / 2))...>(v, v);
}

AT_FUSED_INLINE Vec<float> alternate(Vec<float> v) {
  return alternate(v, std::make_integer_sequence<int, lanes<float>>{});
}

template <class A>
AT_FUSED_INLINE A sum(Vec<A> v) {
  Vec<A> all[lanes<A>] = {v};
  return sum_each<A>(all)[0];
}

// ---- elements --------------------------------------------------------------------------------

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
  // Exponents are re-biased by a multiplication, which also normalises subnormals.
  const Word wide = widen_bits(bits);
  const Word magnitude = (wide & 0x7fffu) << 13;
  const Vec<float> scaled = bit_cast<Vec<float>>(magnitude) * 0x1p112f;
  const Word special = (Word)((wide & 0x7c00u) == 0x7c00u);  // infinity or NaN
  const Word finite_bits = bit_cast<Word>(scaled);
  const Word result = (special & (magnitude | 0x7f800000u)) | (~special & finite_bits);
  return bit_cast<Vec<float>>(result | ((wide & 0x8000u) << 16));
#endif
}

// ---- memory ----------------------------------------------------------------------------------

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

#if AT_FUSED_VECTOR_BYTES == 64
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

// `count` elements, fewer than twice the first piece, in pieces whose sizes the compiler knows.
template <class T, int piece = vector_elements<T> / 2>
AT_FUSED_INLINE void copy_few(const T* from, int count, T* to) {
  if (count & piece) {
    std::memcpy(to, from, piece * sizeof(T));
    from += piece, to += piece;
  }
  if constexpr (piece > 1) copy_few<T, piece / 2>(from, count, to);
}

#if AT_FUSED_VECTOR_BYTES == 32
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
#if AT_FUSED_VECTOR_BYTES == 64
  const uint32_t mask = (1u << count) - 1u;
  if constexpr (sizeof(T) == 8) {
    return (Vec<double>)_mm512_maskz_loadu_pd((__mmask8)mask, from);
  } else if constexpr (sizeof(T) == 4) {
    return (Vec<float>)_mm512_maskz_loadu_ps((__mmask16)mask, from);
  } else {
    return widen((HalfWord)_mm256_maskz_loadu_epi16((__mmask16)mask, from), T{});
  }
#else
#if AT_FUSED_VECTOR_BYTES == 32
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

AT_FUSED_INLINE void store_partial(float* to, Vec<float> v, int count) {
#if AT_FUSED_VECTOR_BYTES == 64
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1u), (__m512)v);
#elif AT_FUSED_VECTOR_BYTES == 32
  _mm256_maskstore_ps(to, first_words(count), (__m256)v);
#else
  copy_few(reinterpret_cast<const float*>(&v), count, to);
#endif
}
AT_FUSED_INLINE void store_partial(double* to, Vec<double> v, int count) {
#if AT_FUSED_VECTOR_BYTES == 64
  _mm512_mask_storeu_pd(to, (__mmask8)((1u << count) - 1u), (__m512d)v);
#elif AT_FUSED_VECTOR_BYTES == 32
  _mm256_maskstore_pd(to, first_double_words(count), (__m256d)v);
#else
  copy_few(reinterpret_cast<const double*>(&v), count, to);
#endif
}

// A vector's elements, or the first of them.
template <class T>
AT_FUSED_INLINE auto load_up_to(const T* from, int count) {
  return count == vector_elements<T> ? load(from) : load_partial(from, count);
}
template <class T, class V>
AT_FUSED_INLINE void store_up_to(T* to, V v, int count) {
  count == vector_elements<T> ? store(to, v) : store_partial(to, v, count);
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

// ---- powers: |x|^p, and its derivative over p, |x|^(p-1) * sign(x) -----------------------------

// 2^((p_high + p_low) * log2(x)) for x >= 0 (NaN stays), to a few units of the last place: log2(x)
// is a whole number and a small rest, and p_high is short, so that its product with the whole is
// exact.
AT_FUSED_INLINE Vec<float> positive_power(Vec<float> x, float p_high, float p_low) {
  const auto subnormal = x < 0x1p-126f;
  const Vec<float> scaled = select(subnormal, x * 0x1p24f, x);
  const Word bits = bit_cast<Word>(scaled);
  // Mantissa in [sqrt(1/2), sqrt(2)): the offset moves the split of the exponent there.
  const Word shifted = bits - 0x3f3504f3u;
  const VectorOf<int32_t, lanes<float>>::type whole =
      (VectorOf<int32_t, lanes<float>>::type)shifted >> 23;
  const Vec<float> mantissa = bit_cast<Vec<float>>(bits - ((Word)whole << 23));
  const Vec<float> exponent =
      __builtin_convertvector(whole, Vec<float>) - select(subnormal, splat(24.0f), Vec<float>{});
  const Vec<float> s = (mantissa - 1) / (mantissa + 1);
  const Vec<float> z = s * s;
  const Vec<float> log2_mantissa =
      s * (2.88539008f +
           z * (0.961796694f + z * (0.577078016f + z * (0.412198583f + z * 0.320598898f))));

  const Vec<float> tail = (p_high + p_low) * log2_mantissa + p_low * exponent;
  Vec<float> y = p_high * exponent + tail;
  y = select(y > 192.0f, splat(192.0f), y);
  y = select(y < -192.0f, splat(-192.0f), y);
  const Vec<float> rounded = (y + 0x1.8p23f) - 0x1.8p23f;
  // The large product cancels before the small part is added: no digit of it is lost.
  Vec<float> f = (p_high * exponent - rounded) + tail;
  f = select(absolute(y) >= 192.0f, Vec<float>{}, f);
  const Vec<float> e =
      1 + f * (0.693147181f +
               f * (0.240226507f +
                    f * (0.0555041087f +
                         f * (0.00961812911f + f * (0.00133335581f + f * (0.000154035304f +
                                                                          f * 1.52527338e-05f))))));
  // 2^rounded in two factors, so that the result may be subnormal or infinite.
  const auto n = __builtin_convertvector(rounded, VectorOf<int32_t, lanes<float>>::type);
  const auto low = n >> 1;
  const Vec<float> power =
      e * bit_cast<Vec<float>>((low + 127) << 23) * bit_cast<Vec<float>>((n - low + 127) << 23);
  const auto edge = (x == 0) | (x != x) | (x == __builtin_inff());
  return select(edge, x, power);
}

AT_FUSED_INLINE Vec<double> positive_power(Vec<double> x, double p_high, double p_low) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::pow(x[i], p_high + p_low);
  return x;
}

template <class V>
AT_FUSED_INLINE V signed_like(V magnitude, V x) {
  const auto sign = bit_cast<MaskOf<V>>(-V{});
  const V value =
      bit_cast<V>((bit_cast<MaskOf<V>>(magnitude) & ~sign) | (bit_cast<MaskOf<V>>(x) & sign));
  return select((x == 0) | (x != x), x, value);  // sign(0) = 0, and a NaN is not hidden
}

// One exponent p each: `power` is |x|^p, `slope` is |x|^(p-1) * sign(x).
template <class A>
struct One {
  explicit One(double) {}
  AT_FUSED_INLINE Vec<A> power(Vec<A> x) const { return absolute(x); }
  AT_FUSED_INLINE Vec<A> slope(Vec<A> x) const { return signed_like(splat(A(1)), x); }
};

template <class A>
struct Two {
  explicit Two(double) {}
  AT_FUSED_INLINE Vec<A> power(Vec<A> x) const { return x * x; }
  AT_FUSED_INLINE Vec<A> slope(Vec<A> x) const { return x; }
};

template <class A>
struct Four {
  explicit Four(double) {}
  AT_FUSED_INLINE Vec<A> power(Vec<A> x) const { return (x * x) * (x * x); }
  AT_FUSED_INLINE Vec<A> slope(Vec<A> x) const { return (x * x) * x; }
};

// The part of p in 12 bits; the exponents that it multiplies have 8.
inline float short_part(double p, float) {
  return bit_cast<float>(bit_cast<uint32_t>(float(p)) & 0xfffff000u);
}
inline double short_part(double p, double) { return p; }

template <class A>
struct AnyExponent {
  A p, p_low, slope_p, slope_p_low;
  explicit AnyExponent(double exponent)
      : p(short_part(exponent, A())),
        p_low(A(exponent - p)),
        slope_p(short_part(exponent - 1, A())),
        slope_p_low(A(exponent - 1 - slope_p)) {}
  AT_FUSED_INLINE Vec<A> power(Vec<A> x) const { return positive_power(absolute(x), p, p_low); }
  AT_FUSED_INLINE Vec<A> slope(Vec<A> x) const {
    return signed_like(positive_power(absolute(x), slope_p, slope_p_low), x);
  }
};

// Any exponent but 2 in one, by branches that all lanes go alike: a smaller library than an
// instance each.
template <class A>
struct Branching {
  double p;
  One<A> one;
  Four<A> four;
  AnyExponent<A> any;

  explicit Branching(double p) : p(p), one(p), four(p), any(p) {}
  AT_FUSED_INLINE Vec<A> power(Vec<A> x) const {
    return p == 1 ? one.power(x) : p == 4 ? four.power(x) : any.power(x);
  }
  AT_FUSED_INLINE Vec<A> slope(Vec<A> x) const {
    return p == 1 ? one.slope(x) : p == 4 ? four.slope(x) : any.slope(x);
  }
};

template <class A, class F>
AT_FUSED_INLINE void with_few_exponents(double p, F f) {
  p == 2 ? f(Two<A>(p)) : f(Branching<A>(p));
}

template <class A, class F>
AT_FUSED_INLINE void with_exponent(double p, F f) {
  p == 2 ? f(Two<A>(p)) : p == 1 ? f(One<A>(p)) : p == 4 ? f(Four<A>(p)) : f(AnyExponent<A>(p));
}

}  // namespace
}  // namespace at_fused
