// Stand-in for CUDA's header of this name: what the package uses of half precision.
#pragma once

#include <bit>

#include "simt_vector_types.h"

struct alignas(2) __half {
  unsigned short __x;
};
struct alignas(4) __half2 {
  __half x, y;
  __half2() = default;
  constexpr __half2(__half a, __half b) : x(a), y(b) {}
};
typedef __half half;
typedef __half2 half2;

inline __half __ushort_as_half(unsigned short bits) { return __half{bits}; }
inline unsigned short __half_as_ushort(__half v) { return v.__x; }

inline float __half2float(__half v) {
  unsigned sign = (v.__x & 0x8000u) << 16;
  unsigned magnitude = v.__x & 0x7fffu;
  if (magnitude >= 0x7c00u)  // infinity and NaN
    return std::bit_cast<float>(sign | 0x7f800000u | (magnitude << 13));
  // The scaling moves the exponent's bias, subnormals included, and is exact.
  float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<unsigned>(scaled));
}

inline __half __float2half_rn(float f) {
  unsigned bits = std::bit_cast<unsigned>(f);
  unsigned sign = (bits >> 16) & 0x8000u;
  unsigned magnitude = bits & 0x7fffffffu;
  unsigned out;
  if (magnitude > 0x7f800000u) return __half{0x7fff};  // CUDA's NaN
  if (magnitude >= 0x47800000u) {
    out = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // The addition rounds at 2^-24, half's last place, and leaves the result in the low bits.
    out = std::bit_cast<unsigned>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    out = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return __half{static_cast<unsigned short>(sign | out)};
}

inline __half __float2half(float f) { return __float2half_rn(f); }
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }
inline __half2 __halves2half2(__half a, __half b) { return __half2(a, b); }
inline float2 __half22float2(__half2 v) { return make_float2(__low2float(v), __high2float(v)); }
inline __half2 __floats2half2_rn(float a, float b) {
  return __half2(__float2half_rn(a), __float2half_rn(b));
}
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
