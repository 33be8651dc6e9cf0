// Stand-ins for CUDA's device functions.
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
#define __constant__ const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// One copy per OS thread; the scheduler exchanges its contents when it changes block.
#define __shared__ static thread_local
#ifndef __restrict__
#define __restrict__ __restrict
#endif

#define SIMT_INLINE inline __attribute__((always_inline))
// The compiler may not look into these, nor report their loads and stores as a thread's own.
#define SIMT_RAW __attribute__((noinline, no_sanitize("thread")))

#pragma GCC visibility push(hidden)
// Defined without const in simt.cpp. To one thread they are constants, so g++ needs to report no
// access of them.
extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;
#pragma GCC visibility pop
inline constexpr int warpSize = 32;

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

// Barriers.
SIMT_INLINE void __syncthreads(simt::Site site = simt::Site::current()) {
  simt::block_barrier(simt::BarrierKind::kPlain, 0, site);
}
SIMT_INLINE int __syncthreads_or(int p, simt::Site site = simt::Site::current()) {
  return simt::block_barrier(simt::BarrierKind::kOr, p, site);
}
SIMT_INLINE int __syncthreads_and(int p, simt::Site site = simt::Site::current()) {
  return simt::block_barrier(simt::BarrierKind::kAnd, p, site);
}
SIMT_INLINE int __syncthreads_count(int p, simt::Site site = simt::Site::current()) {
  return simt::block_barrier(simt::BarrierKind::kCount, p, site);
}
SIMT_INLINE void __syncwarp(unsigned mask = ~0u, simt::Site site = simt::Site::current()) {
  simt::warp_op(simt::WarpKind::kSync, mask, 0, 0, 32, site);
}

// Shuffles and votes.
template <simt::Word T>
SIMT_INLINE T __shfl_sync(unsigned mask, T v, int lane, int width = 32,
                          simt::Site site = simt::Site::current()) {
  return simt::from_bits<T>(
      simt::warp_op(simt::WarpKind::kShfl, mask, simt::to_bits(v), lane, width, site));
}
template <simt::Word T>
SIMT_INLINE T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32,
                             simt::Site site = simt::Site::current()) {
  return simt::from_bits<T>(simt::warp_op(simt::WarpKind::kUp, mask, simt::to_bits(v),
                                          static_cast<int>(delta), width, site));
}
template <simt::Word T>
SIMT_INLINE T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32,
                               simt::Site site = simt::Site::current()) {
  return simt::from_bits<T>(simt::warp_op(simt::WarpKind::kDown, mask, simt::to_bits(v),
                                          static_cast<int>(delta), width, site));
}
template <simt::Word T>
SIMT_INLINE T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32,
                              simt::Site site = simt::Site::current()) {
  return simt::from_bits<T>(
      simt::warp_op(simt::WarpKind::kXor, mask, simt::to_bits(v), lanes, width, site));
}
SIMT_INLINE unsigned __ballot_sync(unsigned mask, int p, simt::Site site = simt::Site::current()) {
  return static_cast<unsigned>(simt::warp_op(simt::WarpKind::kBallot, mask, p != 0, 0, 32, site));
}
SIMT_INLINE int __any_sync(unsigned mask, int p, simt::Site site = simt::Site::current()) {
  return static_cast<int>(simt::warp_op(simt::WarpKind::kAny, mask, p != 0, 0, 32, site));
}
SIMT_INLINE int __all_sync(unsigned mask, int p, simt::Site site = simt::Site::current()) {
  return static_cast<int>(simt::warp_op(simt::WarpKind::kAll, mask, p != 0, 0, 32, site));
}
template <class T>
  requires std::is_same_v<T, int> || std::is_same_v<T, unsigned>
SIMT_INLINE T __reduce_add_sync(unsigned mask, T v, simt::Site site = simt::Site::current()) {
  return static_cast<T>(
      simt::warp_op(simt::WarpKind::kAdd, mask, static_cast<uint64_t>(v), 0, 32, site));
}
// Sign extension would order negative ints above: the offset keeps the order in unsigned.
SIMT_INLINE unsigned __reduce_min_sync(unsigned mask, unsigned v,
                                       simt::Site site = simt::Site::current()) {
  return static_cast<unsigned>(simt::warp_op(simt::WarpKind::kMin, mask, v, 0, 32, site));
}
SIMT_INLINE unsigned __reduce_max_sync(unsigned mask, unsigned v,
                                       simt::Site site = simt::Site::current()) {
  return static_cast<unsigned>(simt::warp_op(simt::WarpKind::kMax, mask, v, 0, 32, site));
}
SIMT_INLINE int __reduce_min_sync(unsigned mask, int v, simt::Site site = simt::Site::current()) {
  return static_cast<int>(__reduce_min_sync(mask, static_cast<unsigned>(v) ^ 0x80000000u, site) ^
                          0x80000000u);
}
SIMT_INLINE int __reduce_max_sync(unsigned mask, int v, simt::Site site = simt::Site::current()) {
  return static_cast<int>(__reduce_max_sync(mask, static_cast<unsigned>(v) ^ 0x80000000u, site) ^
                          0x80000000u);
}
inline unsigned __activemask() { return simt::active_mask(); }

// Fences and waiting.
inline void __threadfence() { simt::fence(true); }
inline void __threadfence_system() { simt::fence(true); }
inline void __threadfence_block() { simt::fence(false); }
SIMT_INLINE void __nanosleep(unsigned, simt::Site site = simt::Site::current()) {
  simt::nanosleep(site);
}
[[noreturn]] SIMT_INLINE void __trap(simt::Site site = simt::Site::current()) { simt::trap(site); }

// Loads and stores with cache hints. All but __ldcv are plain: g++ reports them as such.
template <class T>
SIMT_INLINE T __ldg(const T* p) {
  return *p;
}
template <class T>
SIMT_INLINE T __ldcg(const T* p) {
  return *p;
}
template <class T>
SIMT_INLINE T __ldca(const T* p) {
  return *p;
}
template <class T>
SIMT_INLINE T __ldcs(const T* p) {
  return *p;
}
template <class T>
SIMT_INLINE T __ldcv(const T* p, simt::Site site = simt::Site::current()) {
  simt::poll(p, sizeof(T), site);
  return simt::raw_load(p);
}
template <class T>
SIMT_INLINE void __stcs(T* p, std::type_identity_t<T> v) {
  *p = v;
}
template <class T>
SIMT_INLINE void __stcg(T* p, std::type_identity_t<T> v) {
  *p = v;
}
template <class T>
SIMT_INLINE void __stwb(T* p, std::type_identity_t<T> v) {
  *p = v;
}
template <class T>
SIMT_INLINE void __stwt(T* p, std::type_identity_t<T> v) {
  *p = v;
}

// Atomics.
#define SIMT_ATOMIC(name, expression)                                                            \
  template <class T>                                                                             \
  SIMT_INLINE T name(T* p, std::type_identity_t<T> v, simt::Site site = simt::Site::current()) { \
    simt::atomic_begin(p, sizeof(T), site);                                                      \
    return simt::modify(p, [v](T old) { return static_cast<T>(expression); });                   \
  }
SIMT_ATOMIC(atomicAdd, old + v)
SIMT_ATOMIC(atomicSub, old - v)
SIMT_ATOMIC(atomicExch, ((void)old, v))
SIMT_ATOMIC(atomicMax, old < v ? v : old)
SIMT_ATOMIC(atomicMin, v < old ? v : old)
SIMT_ATOMIC(atomicAnd, old& v)
SIMT_ATOMIC(atomicOr, old | v)
SIMT_ATOMIC(atomicXor, old ^ v)
SIMT_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
SIMT_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1)
#undef SIMT_ATOMIC
template <class T>
SIMT_INLINE T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> v,
                        simt::Site site = simt::Site::current()) {
  simt::atomic_begin(p, sizeof(T), site);
  return simt::modify(p, [compare, v](T old) { return old == compare ? v : old; });
}

// Bits and numbers.
SIMT_INLINE unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
SIMT_INLINE int __float_as_int(float v) { return std::bit_cast<int>(v); }
SIMT_INLINE float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
SIMT_INLINE float __int_as_float(int v) { return std::bit_cast<float>(v); }
SIMT_INLINE long long __double_as_longlong(double v) { return std::bit_cast<long long>(v); }
SIMT_INLINE double __longlong_as_double(long long v) { return std::bit_cast<double>(v); }
SIMT_INLINE int __popc(unsigned v) { return std::popcount(v); }
SIMT_INLINE int __popcll(unsigned long long v) { return std::popcount(v); }
SIMT_INLINE int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
SIMT_INLINE int __ffs(int v) { return __builtin_ffs(v); }
SIMT_INLINE float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
SIMT_INLINE double rsqrt(double v) { return 1.0 / std::sqrt(v); }
SIMT_INLINE float rsqrt(float v) { return rsqrtf(v); }
SIMT_INLINE float __saturatef(float v) { return v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f; }
SIMT_INLINE float __fmul_rn(float a, float b) { return a * b; }
SIMT_INLINE float __fadd_rn(float a, float b) { return a + b; }
SIMT_INLINE float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
SIMT_INLINE float __fdividef(float a, float b) { return a / b; }

#define SIMT_MIN_MAX(T)                                           \
  SIMT_INLINE constexpr T min(T a, T b) { return b < a ? b : a; } \
  SIMT_INLINE constexpr T max(T a, T b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
// As CUDA's: a NaN gives way to a number.
SIMT_INLINE float min(float a, float b) { return std::fmin(a, b); }
SIMT_INLINE float max(float a, float b) { return std::fmax(a, b); }
SIMT_INLINE double min(double a, double b) { return std::fmin(a, b); }
SIMT_INLINE double max(double a, double b) { return std::fmax(a, b); }
