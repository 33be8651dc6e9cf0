// Stand-ins for the part of CUDA's runtime API that the package calls.
#pragma once

#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../simt.h"
#include "simt_vector_types.h"

// Numbers as CUDA's.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
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
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorLaunchFailure:
      return simt_last_error();
  }
  return "unrecognized error code";
}

inline cudaError_t cudaGetLastError() { return static_cast<cudaError_t>(simt::take_last_error()); }

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
  simt::LaunchShape shape{config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes};
  return static_cast<cudaError_t>(simt::launch(reinterpret_cast<const void*>(kernel), shape, body,
                                               static_cast<void*>(&call), sizeof(call)));
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attr, int) {
  *value = simt::device_attribute(attr);
  return cudaSuccess;
}

template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute, int value) {
  return static_cast<cudaError_t>(
      simt::set_max_dynamic_shared(reinterpret_cast<const void*>(kernel), value));
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
