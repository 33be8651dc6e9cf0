// What every kernel is made of: numbers, loads of many at once, what the threads of a block do
// together, and its launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <string>
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

__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

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
#if defined(AT_FUSED_EMULATED)
#define AT_FUSED_OPAQUE(constraint, x)
#else
#define AT_FUSED_OPAQUE(constraint, x) asm volatile("" : constraint(x))
#endif
__device__ __forceinline__ int opaque(int x) {
  AT_FUSED_OPAQUE("+r", x);
  return x;
}
__device__ __forceinline__ float opaque(float x) {
  AT_FUSED_OPAQUE("+f", x);
  return x;
}
__device__ __forceinline__ double opaque(double x) {
  AT_FUSED_OPAQUE("+d", x);
  return x;
}

// ---- powers ------------------------------------------------------------------------------------

// |x|^p and its derivative over p: |x|^(p-1) * sign(x).

// How many rows a thread has under way: with three blocks on a multiprocessor 4 x 16 bytes a
// thread are more than twice what the memory's latency needs; fewer where a power makes long code.
struct Square {
  static constexpr int rows_in_flight = 4;
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

// Any exponent, the usual ones by multiplication. The branch is the same in all threads.
struct AnyPower {
  static constexpr int rows_in_flight = 2;
  double p;

  __device__ explicit AnyPower(double p) : p(p) {}

  template <class A>
  __device__ __forceinline__ A power(A x) const {
    const A square = x * x, absolute = x < 0 ? -x : x;
    return p == 2 ? square : p == 1 ? absolute : p == 4 ? square * square : pow(absolute, A(p));
  }
  template <class A>
  __device__ __forceinline__ A slope(A x) const {
    const A sign = x > 0 ? A(1) : x < 0 ? A(-1) : x;  // 0 and NaN stay
    return p == 2 ? x : p == 1 ? sign : p == 4 ? x * x * x : pow(x < 0 ? -x : x, A(p - 1)) * sign;
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
    for (int j = 0; j < n; ++j) narrow(from[j], element[j]);
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

// A factor of the rows under way in planar features: single elements are a fraction of the bytes.
template <int V>
constexpr int kTimesRows = V == 1 ? 2 : 1;

// U rows, `step` elements and `height` row numbers apart, as far as they are below `rows`. The
// others are zeroed: left alone, their registers would be taken for values of the round before.
// `constant`: in global memory that no thread writes during the launch.
template <bool constant, class T, int n, int U>
__device__ __forceinline__ void load_rows(Pack<T, n> (&pack)[U], const T* from, int64_t step,
                                          int row, int height, int rows) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    pack[u] = {};
    if (row + u * height < rows) {
      const auto* word = reinterpret_cast<const typename Pack<T, n>::Word*>(from + u * step);
      pack[u].word = constant ? __ldg(word) : *word;
    }
  }
}

template <class T, int n>
__device__ __forceinline__ void store(T* to, Pack<T, n> pack) {
  *reinterpret_cast<typename Pack<T, n>::Word*>(to) = pack.word;
}

// ---- blocks -----------------------------------------------------------------------------------

#if defined(AT_FUSED_EMULATED)
#define AT_FUSED_DYNAMIC_SHARED(name) char* name = emulator::dynamic_shared()
#else
#define AT_FUSED_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#endif

constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The first bytes of every block's shared memory.
struct Control {
  double sums[3 * kWarps];
  bool last;
};
static_assert(sizeof(Control) <= kControlBytes && kMaxPairs <= 3 * kWarps);

__device__ inline double warp_sum(double value) {
  for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(kAllLanes, value, d);
  return value;
}

// The sum over the block of each of n values, the same bits in every thread.
template <int n>
__device__ void block_sum(double (&value)[n], Control& control) {
  static_assert(n <= 3);
  __syncthreads();  // the last sums may still be read
#pragma unroll
  for (int i = 0; i < n; ++i) {
    value[i] = warp_sum(value[i]);
    if (threadIdx.x % 32 == 0) control.sums[threadIdx.x / 32 * n + i] = value[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    value[i] = 0;
    for (int warp = 0; warp < kWarps; ++warp) value[i] += control.sums[warp * n + i];
  }
}

// The addition is a release of what this thread has seen, and an acquire of what was released by
// those who added before: less than a full fence on either side.
__device__ inline uint32_t fetch_add_acq_rel(uint32_t* counter, uint32_t value) {
#if defined(AT_FUSED_EMULATED)
  return emulator::atomic_add(counter, value, std::memory_order_acq_rel);
#else
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
#endif
}

// Adds `arrivals` to a counter, after all that this block has written. True in the one block that
// makes it `total`, which then sees what all the others wrote.
__device__ inline bool arrives_last(uint32_t* counter, uint32_t arrivals, uint32_t total,
                                    Control& control) {
  __syncthreads();
  if (threadIdx.x == 0) {
    control.last = fetch_add_acq_rel(counter, arrivals) + arrivals == total;
  }
  __syncthreads();
  return control.last;
}

// The list's member whose tasks `task` is among.
template <class Members>
__device__ __forceinline__ int member_of(const Members& members, int count, int task) {
  int i = 0;
  while (i + 1 < count && task >= members[i + 1].first_task) ++i;
  return i;
}

// ---- launches ---------------------------------------------------------------------------------

// Launches the instance for the list's dtypes: with fp64, or without.
#define AT_FUSED_LAUNCH_DTYPES(kernel, params, launch) \
  launch_kernel(#kernel, launch.fp64 ? kernel<true> : kernel<false>, params, launch)
// p = 2 has its own, for it is what nearly everybody uses; other exponents, and lists with fp64,
// take theirs by branches that all threads go alike.
#define AT_FUSED_LAUNCH_POWERS(kernel, params, launch)     \
  launch_kernel(#kernel,                                   \
                launch.fp64     ? kernel<AnyPower, true>   \
                : params.p == 2 ? kernel<Square, false>    \
                                : kernel<AnyPower, false>, \
                params, launch)

template <class Params>
void launch_kernel(const char* name, void (*kernel)(Params), const Params& params,
                   const Launch& launch) {
  cudaError_t error = cudaSuccess;
  // All that there is: another thread may be about to launch the kernel with more than this one.
  if (launch.shared_bytes > kSharedBytesWithoutAsking) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(launch.most_shared_bytes));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(launch.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(launch.shared_bytes);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, params);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // errors of a launch are not to be reported a second time
  throw std::runtime_error(std::string("at_fused: ") + name + ": " + cudaGetErrorString(error));
}

}  // namespace at_fused
