// What the operators need of the device that their tensors are on.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "../features.h"
#include "plan.h"

#if defined(AT_FUSED_SIMT)  // the kernels run on the CPU: tests/simt
#define AT_FUSED_NAMESPACE at_fused_simt
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
#if defined(AT_FUSED_SIMT)
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
#if !defined(AT_FUSED_SIMT)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

inline Limits limits_of(Device device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, std::max(0, device.index)));
    return value;
  };
  STD_TORCH_CHECK(attribute(cudaDevAttrComputeCapabilityMajor) >= 8,
                  "at_fused: the CUDA kernels need a device of compute capability 8.0 or later; "
                  "at_fused.use_backend(\"triton\") or \"eager\" runs on others");
  return {attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

// Zeroed counters for one launch after another on a stream. Kernels leave them at 0, so they are
// zeroed when they are allocated and never again. In a graph that is being captured they are its
// own: it may be replayed while its stream does something else.
class Counters {
 public:
  Counters(Device device, void* stream, int64_t count) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
    if (status != cudaStreamCaptureStatusNone) {
      tensor_ = allocate(device, stream, count);
      return;
    }
    // Never destroyed: at the end of the process the allocator may be gone before it.
    static auto* kept = new std::map<std::pair<int32_t, void*>, Tensor>;
    static auto* mutex = new std::mutex;
    const std::lock_guard<std::mutex> lock(*mutex);
    auto found = kept->find({device.index, stream});
    if (found == kept->end() || found->second.numel() < count) {
      const int64_t room = power_of_two_up(std::max<int64_t>(count, 4096));
      found = kept->insert_or_assign({device.index, stream}, allocate(device, stream, room)).first;
    }
    tensor_ = found->second;
  }

  uint32_t* data() const { return static_cast<uint32_t*>(tensor_->mutable_data_ptr()); }

 private:
  static Tensor allocate(Device device, void* stream, int64_t count) {
    const int64_t stride = 1;
    Tensor tensor = new_tensor(1, &count, &stride, aoti_torch_dtype_int32(), device);
    check_cuda(cudaMemsetAsync(tensor.mutable_data_ptr(), 0, size_t(count) * 4,
                               static_cast<cudaStream_t>(stream)));
    return tensor;
  }

  std::optional<Tensor> tensor_;
};

}  // namespace at_fused
