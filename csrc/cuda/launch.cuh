// From a kernel's instances to a launch.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "launch.h"
#include "numbers.cuh"
#include "power.cuh"

// The instances of a kernel, those of lists with fp64 last.
#define AT_FUSED_DTYPES(kernel) kernel<false>, kernel<true>, #kernel
// p = 2 has its own, for it is what nearly everybody uses; other exponents, and lists with fp64,
// take theirs by branches that all threads go alike.
#define AT_FUSED_POWERS(kernel) \
  kernel<Square, false>, kernel<AnyPower, false>, kernel<AnyPower, true>, #kernel

namespace at_fused {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // errors of a launch are not to be reported a second time
    throw std::runtime_error(std::string("at_fused: ") + what + ": " + cudaGetErrorString(error));
  }
}

template <class... Params>
void launch_kernel(void (*kernel)(Params...), const char* name, const Launch& launch,
                   const Params&... params) {
  if (launch.shared_bytes > kSharedBytesWithoutAsking) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes),
          name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(launch.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(launch.shared_bytes);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  check(cudaLaunchKernelEx(&config, kernel, params...), name);
}

template <class... Params>
void launch_instance(void (*narrow)(Params...), void (*wide)(Params...), const char* name,
                     const Launch& launch, const Params&... params) {
  launch_kernel(launch.fp64 ? wide : narrow, name, launch, params...);
}

template <class... Params>
void launch_instance(void (*square)(Params...), void (*any)(Params...), void (*wide)(Params...),
                     const char* name, double p, const Launch& launch, const Params&... params) {
  launch_instance(p == 2 ? square : any, wide, name, launch, params...);
}

}  // namespace at_fused
