// |x|^p and its derivative over p: |x|^(p-1) * sign(x).
#pragma once

#include <cmath>

#include "numbers.h"

namespace at_fused {
namespace {

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

template <class A, class F>
AT_FUSED_INLINE void with_exponent(double p, F f) {
  if (p == 2) {
    f(Two<A>(p));
  } else if (p == 1) {
    f(One<A>(p));
  } else if (p == 4) {
    f(Four<A>(p));
  } else {
    f(AnyExponent<A>(p));
  }
}

// Any exponent in one, by branches that all lanes go alike: a smaller library than an instance
// each.
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
  if (p == 2) {
    f(Two<A>(p));
  } else {
    f(Branching<A>(p));
  }
}

}  // namespace
}  // namespace at_fused
