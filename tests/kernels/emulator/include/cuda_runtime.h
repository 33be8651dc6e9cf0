// Stand-in for the parts of CUDA's header that the package uses. With it, g++ compiles kernels for
// the emulator.
#pragma once

#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../emulator.h"

// ---- device -------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

// Has a constructor, unlike CUDA's: g++ would split *p = uint4{...} into four stores, where the GPU
// makes one.
struct alignas(16) uint4 {
  unsigned x, y, z, w;
  uint4() = default;
  constexpr uint4(unsigned a, unsigned b, unsigned c, unsigned d) : x(a), y(b), z(c), w(d) {}
};

struct dim3 {
  unsigned x;
  constexpr dim3(unsigned a = 1) : x(a) {}
};

extern const dim3 threadIdx, blockIdx, blockDim, gridDim;

__forceinline__ void __syncthreads(emulator::Site site = emulator::Site::current()) {
  emulator::block_barrier(site);
}

template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes,
                                  emulator::Site site = emulator::Site::current()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulator::shuffle_xor(mask, bits, lanes, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}

__forceinline__ constexpr int min(int a, int b) { return b < a ? b : a; }

// ---- host: enumerators have the values of CUDA's
// -------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorLaunchFailure = 719,
};

enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

typedef struct CUstream_st* cudaStream_t;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "cudaSuccess"
         : error == cudaErrorInvalidValue ? "cudaErrorInvalidValue"
                                          : emulator_last_error();
}

inline cudaError_t cudaGetLastError() {
  return static_cast<cudaError_t>(emulator::take_last_error());
}

template <class... Exp, class... Act>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Exp...),
                               Act&&... args) {
  struct Call {
    void (*kernel)(Exp...);
    std::tuple<std::remove_cv_t<Exp>...> args;
  } call{kernel, {static_cast<Exp>(std::forward<Act>(args))...}};
  auto body = [](void* p) {
    auto* c = static_cast<Call*>(p);
    std::apply(c->kernel, c->args);
  };
  emulator::LaunchShape shape{config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes};
  return static_cast<cudaError_t>(emulator::launch(reinterpret_cast<const void*>(kernel), shape,
                                                   body, static_cast<void*>(&call), sizeof(call)));
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = emulator::device_attribute(attribute);
  return cudaSuccess;
}

template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute, int value) {
  return static_cast<cudaError_t>(
      emulator::set_max_dynamic_shared(reinterpret_cast<const void*>(kernel), value));
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
