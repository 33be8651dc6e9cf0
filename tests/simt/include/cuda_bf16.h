// Stand-in for CUDA's header of this name: what the package uses of bfloat16.
#pragma once

#include <bit>

struct alignas(2) __nv_bfloat16 {
  unsigned short __x;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  return std::bit_cast<float>(static_cast<unsigned>(v.__x) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  unsigned bits = std::bit_cast<unsigned>(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return __nv_bfloat16{0x7fff};  // CUDA's NaN
  return __nv_bfloat16{static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
