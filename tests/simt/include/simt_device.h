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
// The compiler may not look into these, nor report their loads and stores as a thread's own.
#define SIMT_RAW __attribute__((noinline, no_sanitize("thread")))

#pragma GCC visibility push(hidden)
// Defined without const in simt.cpp. To one thread they are constants, so g++ needs to report no
// access of them.
extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;
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

template <class T>
SIMT_RAW T raw_load(const T* p) {
  return *p;
}

template <class T, class F>
SIMT_RAW T modify(T* p, F f) {
  T old = *p;
  T next = f(old);
  *p = next;
  atomic_end(p, std::memcmp(&old, &next, sizeof(T)) != 0);
  return old;
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

// Fences and waiting.
inline void __threadfence() { simt::fence(); }
SIMT_INLINE void __nanosleep(unsigned, simt::Site site = simt::Site::current()) {
  simt::nanosleep(site);
}

// Loads with cache hints. All but __ldcv are plain: g++ reports them as such.
template <class T>
SIMT_INLINE T __ldg(const T* p) {
  return *p;
}
template <class T>
SIMT_INLINE T __ldcg(const T* p) {
  return *p;
}
template <class T>
SIMT_INLINE T __ldcv(const T* p, simt::Site site = simt::Site::current()) {
  simt::poll(p, sizeof(T), site);
  return simt::raw_load(p);
}

// Atomics.
#define SIMT_ATOMIC(name, expression)                                                            \
  template <class T>                                                                             \
  SIMT_INLINE T name(T* p, std::type_identity_t<T> v, simt::Site site = simt::Site::current()) { \
    simt::atomic_begin(p, sizeof(T), site);                                                      \
    return simt::modify(p, [v](T old) { return static_cast<T>(expression); });                   \
  }
SIMT_ATOMIC(atomicAdd, old + v)
SIMT_ATOMIC(atomicExch, ((void)old, v))
#undef SIMT_ATOMIC

// Numbers.
SIMT_INLINE unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
SIMT_INLINE float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
SIMT_INLINE constexpr int min(int a, int b) { return b < a ? b : a; }
