// From a kernel's instances to a launch.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "numbers.cuh"

// Launches the instance for the list's dtypes: with fp64, or without.
#define AT_FUSED_LAUNCH_DTYPES(kernel, params, launch) \
  launch_instance<kernel<false>, kernel<true>>(#kernel, launch, params)
// p = 2 has its own, for it is what nearly everybody uses; other exponents, and lists with fp64,
// take theirs by branches that all threads go alike.
#define AT_FUSED_LAUNCH_POWERS(kernel, params, launch)                                          \
  params.p == 2                                                                                 \
      ? launch_instance<kernel<Square, false>, kernel<AnyPower, true>>(#kernel, launch, params) \
      : launch_instance<kernel<AnyPower, false>, kernel<AnyPower, true>>(#kernel, launch, params)

namespace at_fused {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // errors of a launch are not to be reported a second time
    throw std::runtime_error(std::string("at_fused: ") + what + ": " + cudaGetErrorString(error));
  }
}

// Lets a kernel have all the shared memory of the current device: one call for each, and thread.
template <auto kernel>
void ask_for_shared_memory(const char* name, int32_t bytes) {
  constexpr int kDevices = 64;
  static thread_local int allowed[kDevices];
  int device = 0, most = 0;
  check(cudaGetDevice(&device), name);
  if (device < kDevices && bytes <= allowed[device]) return;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, most),
        name);
  if (device < kDevices) allowed[device] = most;
}

template <auto kernel, class Params>
void launch_kernel(const char* name, const Launch& launch, const Params& params) {
  if (launch.shared_bytes > kSharedBytesWithoutAsking) {
    ask_for_shared_memory<kernel>(name, launch.shared_bytes);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(launch.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(launch.shared_bytes);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  check(cudaLaunchKernelEx(&config, kernel, params), name);
}

template <auto narrow, auto wide, class Params>
void launch_instance(const char* name, const Launch& launch, const Params& params) {
  launch.fp64 ? launch_kernel<wide>(name, launch, params)
              : launch_kernel<narrow>(name, launch, params);
}

}  // namespace at_fused
