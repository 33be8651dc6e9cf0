// |x|^p and its derivative over p: |x|^(p-1) * sign(x).
#pragma once

#include <cuda_runtime.h>

namespace at_fused {

// How many rows a thread has under way: with three blocks on a multiprocessor 4 x 16 bytes a
// thread are more than twice what the memory's latency needs; fewer where a power makes long code.
struct Square {
  static constexpr int rows_in_flight = 4;
  static constexpr bool short_code = true;
  template <class A>
  __device__ __forceinline__ A power(A x) const {
    return x * x;
  }
  template <class A>
  __device__ __forceinline__ A slope(A x) const {
    return x;
  }
  __device__ explicit Square(double) {}
};

// x^p for x >= 0 as 2^(e p) m^p with x = 2^e m and m around 1: the whole part of the exponent,
// which says nothing of the digits, must not take bits from its fraction.
__device__ __forceinline__ float positive_power(float x, float p, float p_low) {
  if (!(x > 0) || x * 0 != 0) return x;  // 0, infinity, NaN
  const bool tiny = x < 0x1p-126f;       // subnormal: made normal first
  const unsigned bits = __float_as_uint(tiny ? x * 0x1p24f : x);
  const int exponent = int(bits - 0x3f400000u) >> 23;
  const float m = __uint_as_float(bits - (unsigned(exponent) << 23));  // in [0.75, 1.5)
  const float e = float(tiny ? exponent - 24 : exponent);
  const float whole = rintf(fminf(fmaxf(p * e, -512.0f), 512.0f));
  const float rest = fmaf(p, e, -whole) + fmaf(p, log2f(m), p_low * e);
  // By two factors: the result may be subnormal. Beyond their reach it is 0 or infinite anyway.
  const int n = int(whole), half = n / 2;
  const auto power_of_two = [](int k) {
    return __uint_as_float(unsigned(k < -126 ? 1 : k > 127 ? 254 : k + 127) << 23);
  };
  return exp2f(rest) * power_of_two(half) * power_of_two(n - half);
}
__device__ __forceinline__ double positive_power(double x, double p, double) { return pow(x, p); }

// Any exponent, 1, 2 and 4 by multiplication. The branch is the same in all threads.
struct AnyPower {
  static constexpr int rows_in_flight = 2;
  static constexpr bool short_code = false;
  double p;
  float p_high, p_low, q_high, q_low;  // p and p - 1, each in two parts

  __device__ explicit AnyPower(double p)
      // From 1e30 on every power is 0, 1 or infinite; fp32 must not make p itself infinite.
      : p(p < 1e30 ? p : 1e30),
        p_high(float(this->p)),
        p_low(float(this->p - p_high)),
        q_high(float(this->p - 1)),
        q_low(float(this->p - 1 - q_high)) {}

  __device__ __forceinline__ float raise(float x, bool slope) const {
    return slope ? positive_power(x, q_high, q_low) : positive_power(x, p_high, p_low);
  }
  __device__ __forceinline__ double raise(double x, bool slope) const {
    return positive_power(x, slope ? p - 1 : p, 0);
  }
  template <class A>
  __device__ __forceinline__ A power(A x) const {
    const A square = x * x, absolute = x < 0 ? -x : x;
    return p == 2 ? square : p == 1 ? absolute : p == 4 ? square * square : raise(absolute, false);
  }
  template <class A>
  __device__ __forceinline__ A slope(A x) const {
    const A sign = x > 0 ? A(1) : x < 0 ? A(-1) : x;  // 0 and NaN stay
    return p == 2 ? x : p == 1 ? sign : p == 4 ? x * x * x : raise(x < 0 ? -x : x, true) * sign;
  }
};

}  // namespace at_fused
