// Stand-in for CUDA's header of this name: what the package uses of half precision.
#pragma once

#include <bit>

struct alignas(2) __half {
  unsigned short __x;
};

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
