// Device guard, stream and limits for the CUDA operators.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../operators.h"
#include "plan.h"

#if defined(AT_FUSED_EMULATED)  // the CUDA emulator of the tests: tests/kernels/emulator
#define AT_FUSED_NAMESPACE at_fused_emulated
#define AT_FUSED_DEVICE_KEY CPU
#else
#define AT_FUSED_NAMESPACE at_fused
#define AT_FUSED_DEVICE_KEY CUDA
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace at_fused {

inline void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "at_fused: ", cudaGetErrorString(error));
}

// Makes a device current within a scope.
class DeviceScope {
 public:
  void* stream = nullptr;
  Limits limits;

  explicit DeviceScope(Device device)
#if !defined(AT_FUSED_EMULATED)
      : guard_(device.index) {
    // The CUDA runtime linked into this library has its own current device.
    check_cuda(cudaSetDevice(device.index));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &stream));
#else
  {
#endif
    const auto get = [&](cudaDeviceAttr attribute) {
      int value = 0;
      check_cuda(cudaDeviceGetAttribute(&value, attribute, device.index));
      return value;
    };
    STD_TORCH_CHECK(get(cudaDevAttrComputeCapabilityMajor) >= 8,
                    "at_fused: the CUDA kernels need a device of compute capability 8.0 or later; "
                    "at_fused.use_backend(\"triton\") or \"eager\" runs on others");
    limits = {get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
              get(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  }

  Launch launch(int64_t blocks, int64_t shared_bytes, bool fp64) const {
    STD_TORCH_CHECK(blocks <= kMaxBlocks, "at_fused: the launch needs too many blocks: ", blocks);
    return {blocks, shared_bytes, limits.shared_bytes_per_block, fp64, stream};
  }

#if !defined(AT_FUSED_EMULATED)
 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline void check_extent(const Feature& x, int64_t samples) {
  STD_TORCH_CHECK(x.C <= kMaxExtent && x.N <= kMaxExtent,
                  "at_fused: features may have at most 2^30 channels and 2^30 positions, got ", x.C,
                  " and ", x.N);
  STD_TORCH_CHECK(samples <= kMaxExtent, "at_fused: lists may have at most 2^30 samples, got ",
                  samples);
}

}  // namespace at_fused
