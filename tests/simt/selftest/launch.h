// What the cases share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

// Exported under its name: returns a cudaError_t, or -1 for a wrong result.
#define CASE(name) extern "C" __attribute__((visibility("default"))) int name()

template <class T>
__device__ T* shared() {
  return reinterpret_cast<T*>(simt::dynamic_shared());
}

template <class... Exp, class... Act>
int run(unsigned grid, unsigned block, size_t shared_bytes, void (*kernel)(Exp...), Act&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Act>(args)...);
}

inline std::vector<float> ramp(size_t n) {
  std::vector<float> v(n);
  for (size_t i = 0; i < n; ++i) v[i] = static_cast<float>(i % 97);
  return v;
}
