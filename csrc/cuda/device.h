// What the operators need of the device that their tensors are on.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <vector>

#include "../tensors.h"
#include "plan.h"

#if defined(AT_FUSED_EMULATED)  // the kernels run on the CPU: tests/kernels/emulator
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

// Makes a device current for a scope, with its current stream.
class OnDevice {
 public:
  explicit OnDevice(Device device)
#if defined(AT_FUSED_EMULATED)
  {
    STD_TORCH_CHECK(device.type == aoti_torch_device_type_cpu(), "at_fused: not a CPU tensor");
  }
#else
      : guard_(device.index) {
    // The CUDA runtime in this library has a current device of its own.
    check_cuda(cudaSetDevice(device.index));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &stream_));
  }
#endif
  void* stream() const { return stream_; }

 private:
#if !defined(AT_FUSED_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

inline Limits ask_limits(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  STD_TORCH_CHECK(attribute(cudaDevAttrComputeCapabilityMajor) >= 8,
                  "at_fused: the CUDA kernels need a device of compute capability 8.0 or later; "
                  "at_fused.use_backend(\"triton\") or \"eager\" runs on others");
  return {attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

inline Limits limits_of(Device device) {
#if defined(AT_FUSED_EMULATED)  // tests change the device
  return ask_limits(0);
#else
  static thread_local std::vector<std::optional<Limits> > known;
  const size_t at = size_t(device.index);
  if (known.size() <= at) known.resize(at + 1);
  if (!known[at]) known[at] = ask_limits(device.index);
  return *known[at];
#endif
}

}  // namespace at_fused
