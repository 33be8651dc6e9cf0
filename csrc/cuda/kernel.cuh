// Building blocks of the kernels: conversions, powers, vector loads, block reductions, launches.
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

// Calls f(T{}) with the type of a dtype. Instances without fp64 have no code for it, which halves
// their registers.
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

// Blocks per multiprocessor that registers must allow; fp64 needs more registers.
template <bool fp64>
constexpr int kMinBlocks = fp64 ? 2 : kBlocksPerMultiprocessor;

// Hides a value from the optimiser. Otherwise nvcc hoists the loop invariants of all variants of a
// loop out of the enclosing loop, and spills registers.
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

// ---- power(x) = |x|^p, slope(x) = (d/dx |x|^p) / p = |x|^(p-1) * sign(x) -----------------------

// rows_in_flight is the number of rows that a thread loads before it uses them. With three blocks
// per multiprocessor, 4 loads of 16 bytes per thread are over twice what hides the memory latency.
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

// Any exponent; 1, 2 and 4 by multiplication. The branch is uniform. Fewer rows in flight, because
// the code of a power is long.
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
    const A sign = x > 0 ? A(1) : x < 0 ? A(-1) : x;  // keeps 0 and NaN
    return p == 2 ? x : p == 1 ? sign : p == 4 ? x * x * x : pow(x < 0 ? -x : x, A(p - 1)) * sign;
  }
};

// ---- loads and stores ---------------------------------------------------------------------------

template <int bytes>
using WordOf = std::conditional_t<
    bytes == 16, uint4,
    std::conditional_t<bytes == 8, unsigned long long,
                       std::conditional_t<bytes == 4, unsigned, unsigned short>>>;

// n adjacent elements, loaded or stored by one instruction.
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

// Calls f(n) with the elements per load as a compile-time constant.
template <class T, class F>
__device__ __forceinline__ void with_vector(const Access& access, F f) {
  if (access.vector > 1) {
    f(std::integral_constant<int, kVector<T>>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

// More rows in flight for planar features read by single elements, because these are fewer bytes.
template <int V>
constexpr int kRowFactor = V == 1 ? 2 : 1;

// Loads rows row, row + height, ... (U of them, `step` elements apart) that are below `rows`. Zeros
// the others, so that their registers do not stay live across iterations. `constant` selects the
// read-only cache, for global memory that no thread writes during the launch.
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

// State of a block's reductions, at the start of its shared memory.
struct Control {
  double sums[3 * kWarps];
  bool last;
};
static_assert(sizeof(Control) <= kControlBytes && kMaxPairs <= 3 * kWarps);

__device__ inline double warp_sum(double value) {
  for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(kAllLanes, value, d);
  return value;
}

// Sums each of n values over the block. All threads get the same bits.
template <int n>
__device__ void block_sum(double (&value)[n], Control& control) {
  static_assert(n <= 3);
  __syncthreads();  // other threads may still read the previous sums
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

// Atomic addition with acquire-release order, which is cheaper than two full fences.
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

// Adds `arrivals` to a counter after the writes of this block. Returns true in the block that
// brings the counter to `total`; that block sees the writes of all others.
__device__ inline bool arrives_last(uint32_t* counter, uint32_t arrivals, uint32_t total,
                                    Control& control) {
  __syncthreads();
  if (threadIdx.x == 0) {
    control.last = fetch_add_acq_rel(counter, arrivals) + arrivals == total;
  }
  __syncthreads();
  return control.last;
}

// Returns the index of the feature or pair that owns a task.
template <class Members>
__device__ __forceinline__ int member_of(const Members& members, int count, int task) {
  int i = 0;
  while (i + 1 < count && task >= members[i + 1].first_task) ++i;
  return i;
}

// ---- launches ---------------------------------------------------------------------------------

// Launches the kernel's instance with or without fp64.
#define AT_FUSED_LAUNCH_DTYPES(kernel, params, launch) \
  launch_kernel(#kernel, launch.fp64 ? kernel<true> : kernel<false>, params, launch)
// p = 2, the usual exponent, has its own instance. Others, and lists with fp64, branch at run time.
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
  // Sets the device's maximum, because another thread may launch the same kernel with more.
  if (launch.shared_bytes > kDefaultSharedBytes) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(launch.max_shared_bytes));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(launch.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(launch.shared_bytes);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, params);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which is thrown here
  throw std::runtime_error(std::string("at_fused: ") + name + ": " + cudaGetErrorString(error));
}

}  // namespace at_fused
