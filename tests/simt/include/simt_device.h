// Stand-ins for CUDA's device functions: those that the kernels call.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../simt.h"
#include "simt_vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#define SIMT_INLINE inline __attribute__((always_inline))

#pragma GCC visibility push(hidden)
// Defined without const in simt.cpp. To one thread they are constants, so g++ needs to report no
// access of them.
extern const dim3 threadIdx, blockIdx, blockDim, gridDim;
#pragma GCC visibility pop

namespace simt {

template <class T>
concept Word = std::is_trivially_copyable_v<T> && sizeof(T) <= 8;

template <Word T>
SIMT_INLINE uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <Word T>
SIMT_INLINE T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

// Barriers, fences and shuffles.
SIMT_INLINE void __syncthreads(simt::Site site = simt::Site::current()) {
  simt::block_barrier(site);
}
template <simt::Word T>
SIMT_INLINE T __shfl_xor_sync(unsigned mask, T v, int lanes,
                              simt::Site site = simt::Site::current()) {
  return simt::from_bits<T>(simt::shuffle_xor(mask, simt::to_bits(v), lanes, site));
}

inline void __threadfence() { simt::fence(); }

SIMT_INLINE unsigned atomicAdd(unsigned* p, unsigned v, simt::Site site = simt::Site::current()) {
  return simt::atomic_add(p, v, site);
}

// Plain: g++ reports it as such.
template <class T>
SIMT_INLINE T __ldg(const T* p) {
  return *p;
}

// Numbers.
SIMT_INLINE unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
SIMT_INLINE float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
SIMT_INLINE constexpr int min(int a, int b) { return b < a ? b : a; }
SIMT_INLINE constexpr int max(int a, int b) { return b < a ? a : b; }
