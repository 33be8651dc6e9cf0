// Numbers in device code: 16-bit types, loads of many at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "../loss.h"
#include "params.h"

namespace at_fused {

// ---- types ------------------------------------------------------------------------------------

// Sums are fp64 for fp64 and fp32 for all others.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

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

// The value, from here on only. Without it the compiler takes what every variant of a loop would
// need out of the loop around them all, and runs out of registers.
__device__ __forceinline__ int here(int x) {
#if !defined(AT_FUSED_SIMT)
  asm volatile("" : "+r"(x));
#endif
  return x;
}
__device__ __forceinline__ double here(double x) {
#if !defined(AT_FUSED_SIMT)
  asm volatile("" : "+d"(x));
#endif
  return x;
}

// ---- loads and stores ---------------------------------------------------------------------------

template <int bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<8> {
  using type = unsigned long long;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// n adjacent elements, moved by one instruction.
template <class T, int n>
struct Pack {
  using Word = typename WordOf<sizeof(T) * n>::type;
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
