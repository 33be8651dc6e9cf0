// Numbers in device code: 16-bit types, powers, loads of many at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "params.h"

namespace at_fused {

// ---- types ------------------------------------------------------------------------------------

// Sums are fp64 for fp64 and fp32 for all others.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(Accumulator<T> x) {
  if constexpr (sizeof(T) == 2) {
    if constexpr (std::is_same_v<T, __half>) {
      return __float2half_rn(x);
    } else {
      return __float2bfloat16_rn(x);
    }
  } else {
    return x;
  }
}

// Calls f(T{}) with the type that a dtype stands for. Kernels for lists without fp64 have no code
// for it, and with that half the registers.
template <bool fp64, class F>
__device__ __forceinline__ void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32:
      return f(float{});
    case Dtype::float16:
      return f(__half{});
    case Dtype::bfloat16:
      return f(__nv_bfloat16{});
    case Dtype::float64:
      if constexpr (fp64) return f(double{});
  }
}

// Blocks that a multiprocessor must have registers for; those for fp64 take more.
template <bool fp64>
constexpr int kBlocks = fp64 ? 2 : kBlocksPerMultiprocessor;

// The value, opaque to the compiler. Else it takes what every variant of a loop would need out of
// the loop around them all, and runs out of registers.
__device__ __forceinline__ int opaque(int x) {
#if !defined(AT_FUSED_EMULATED)
  asm volatile("" : "+r"(x));
#endif
  return x;
}
__device__ __forceinline__ double opaque(double x) {
#if !defined(AT_FUSED_EMULATED)
  asm volatile("" : "+d"(x));
#endif
  return x;
}

// ---- powers ------------------------------------------------------------------------------------

// |x|^p and its derivative over p: |x|^(p-1) * sign(x).

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

// ---- loads and stores ---------------------------------------------------------------------------

template <int bytes>
using WordOf = std::conditional_t<
    bytes == 16, uint4,
    std::conditional_t<bytes == 8, unsigned long long,
                       std::conditional_t<bytes == 4, unsigned, unsigned short>>>;

// n adjacent elements, moved by one instruction.
template <class T, int n>
struct Pack {
  using Word = WordOf<sizeof(T) * n>;
  Word word;

  __device__ __forceinline__ void get(Accumulator<T> (&to)[n]) const {
    T element[n];
    memcpy(element, &word, sizeof(word));
#pragma unroll
    for (int j = 0; j < n; ++j) to[j] = widen(element[j]);
  }
  __device__ __forceinline__ void set(const Accumulator<T> (&from)[n]) {
    T element[n];
#pragma unroll
    for (int j = 0; j < n; ++j) element[j] = narrow<T>(from[j]);
    memcpy(&word, element, sizeof(word));
  }
};

template <class T>
constexpr int kVector = kVectorBytes / sizeof(T);

// Calls f(vector) with the elements that are moved at a time.
template <class T, class F>
__device__ __forceinline__ void with_vector(const Access& access, F f) {
  if (access.vector > 1) {
    f(std::integral_constant<int, kVector<T>>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

// From global memory that no thread writes during the launch.
template <class T, int n>
__device__ __forceinline__ Pack<T, n> load_constant(const T* from) {
  return {__ldg(reinterpret_cast<const typename Pack<T, n>::Word*>(from))};
}

// From any memory.
template <class T, int n>
__device__ __forceinline__ Pack<T, n> load(const T* from) {
  return {*reinterpret_cast<const typename Pack<T, n>::Word*>(from)};
}

// A factor of the rows under way in planar features: single elements are a fraction of the bytes.
template <int V>
constexpr int kTimesRows = V == 1 ? 2 : 1;

// U rows, `step` elements and `height` row numbers apart, as far as they are below `rows`. The
// others are zeroed: left alone, their registers would be taken for values of the round before.
template <bool constant, class T, int n, int U>
__device__ __forceinline__ void load_rows(Pack<T, n> (&pack)[U], const T* from, int64_t step,
                                          int row, int height, int rows) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    pack[u] = {};
    if (row + u * height < rows) {
      pack[u] = constant ? load_constant<T, n>(from + u * step) : load<T, n>(from + u * step);
    }
  }
}

template <class T, int n>
__device__ __forceinline__ void store(T* to, Pack<T, n> pack) {
  *reinterpret_cast<typename Pack<T, n>::Word*>(to) = pack.word;
}

}  // namespace at_fused
