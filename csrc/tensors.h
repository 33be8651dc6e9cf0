// Converts tensors to features (B, C, N) in one of the two native layouts; allocates tensors.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "feature.h"

namespace at_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

struct Device {
  int32_t type, index;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

inline Device device_of(const Tensor& tensor) {
  Device device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
  return device;
}

// ---- features of tensors ----------------------------------------------------------------------

inline Dtype dtype_of(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "at_fused: features must be float16, bfloat16, float32 or float64");
  return dtype == ScalarType::Float    ? Dtype::float32
         : dtype == ScalarType::Double ? Dtype::float64
         : dtype == ScalarType::Half   ? Dtype::float16
                                       : Dtype::bfloat16;
}

// Views (B, C, *spatial) as (B, C, N). Returns false if the strides match no native layout.
inline bool view_as_feature(const Tensor& tensor, Feature& feature) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t N = 1, position = 0;  // stride of the flattened positions
  for (int64_t d = tensor.dim() - 1; d >= 2; --d) {
    if (sizes[d] == 1) continue;
    if (N == 1) position = strides[d];
    if (strides[d] != position * N) return false;
    N *= sizes[d];
  }
  const int64_t channel = strides[1];
  const bool planar = N > 1 && position == 1;
  const bool interleaved = !planar && (channel == 1 || sizes[1] == 1);
  feature = {tensor.const_data_ptr(),
             dtype_of(tensor),
             interleaved ? Layout::interleaved : Layout::planar,
             sizes[0],
             sizes[1],
             N,
             strides[0],
             interleaved ? position : channel};
  return planar || interleaved || N == 1;
}

// Returns the tensor as a feature. Replaces it by a contiguous copy if it has no native layout.
inline Feature native_feature(Tensor& tensor, Device device) {
  STD_TORCH_CHECK(tensor.dim() >= 3, "at_fused: features must be (B, C, *spatial)");
  STD_TORCH_CHECK(tensor.numel() > 0, "at_fused: features must not be empty");
  // Expanded tensors can be larger than memory: this bound keeps sums of bytes below 2^63.
  STD_TORCH_CHECK(tensor.numel() <= int64_t(1) << 44,
                  "at_fused: features may have at most 2^44 elements, got ", tensor.numel());
  STD_TORCH_CHECK(device_of(tensor) == device, "at_fused: all features must be on the same device");
  Feature feature;
  if (!view_as_feature(tensor, feature)) {
    tensor = torch::stable::contiguous(tensor);
    view_as_feature(tensor, feature);
  }
  return feature;
}

inline int64_t total_bytes(const std::vector<Feature>& features) {
  int64_t total = 0;
  for (const Feature& feature : features) total += total_bytes(feature);
  return total;
}

// Returns the number of leading tokens that the map of feature `index` skips.
inline int64_t skipped_tokens(const Ints& skip_tokens, size_t features, size_t index,
                              const Tensor& feature) {
  if (skip_tokens.empty()) return 0;
  STD_TORCH_CHECK(skip_tokens.size() == features,
                  "at_fused: skip_tokens must have one number per feature, got ",
                  skip_tokens.size(), " for ", features);
  const int64_t count = skip_tokens[index];
  STD_TORCH_CHECK(
      count == 0 || (feature.dim() == 3 && count > 0 && count < feature.size(2)),
      "at_fused: skip_tokens must be >= 0 and leave a token of a feature (B, C, N), got ", count);
  return count;
}

// ---- new tensors ------------------------------------------------------------------------------

// Returns torch's last error message. Only torch 2.13 and later have the function for it.
inline std::string last_error_message() {
  using Function = const char*();
  const auto message = reinterpret_cast<Function*>(
      dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return message ? message() : "probably out of memory";
}

// torch::stable::new_empty and empty_like look up their operators by name in every call. For a list
// of small features that takes longer than the arithmetic.
inline Tensor new_tensor(int64_t rank, const int64_t* sizes, const int64_t* strides,
                         ScalarType dtype, Device device) {
  using torch::stable::detail::from, torch::stable::detail::to;
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(rank, sizes, strides, to<int32_t>(from(dtype)), device.type,
                               device.index, &handle)) {
    int64_t count = 1;
    for (int64_t d = 0; d < rank; ++d) count *= sizes[d];
    STD_TORCH_CHECK(false, "at_fused: cannot allocate a result of ", count,
                    " elements: ", last_error_message());
  }
  return Tensor(handle);
}

// torch.empty_like, with a fast path for dense tensors.
inline Tensor new_like(const Tensor& tensor) {
  Feature feature;
  if (tensor.dim() < 3 || !view_as_feature(tensor, feature) ||
      feature.line_stride != line_length(feature) ||
      feature.batch_stride != feature.C * feature.N) {
    return torch::stable::empty_like(tensor);
  }
  return new_tensor(tensor.dim(), tensor.sizes().data(), tensor.strides().data(),
                    tensor.scalar_type(), device_of(tensor));
}

inline ScalarType accumulate_dtype(bool fp64) {
  return fp64 ? ScalarType::Double : ScalarType::Float;
}

// Allocates a map (B, N) of values, or of argmax channels.
inline Tensor new_map(const Feature& feature, Device device, bool holds_channels = false) {
  const int64_t sizes[] = {feature.B, feature.N}, strides[] = {feature.N, 1};
  return new_tensor(2, sizes, strides,
                    holds_channels ? ScalarType::Int : accumulate_dtype(accumulates_fp64(feature)),
                    device);
}

// Pointers to the maps of each sample in a (B, N) tensor; null if there is no tensor.
struct Maps {
  char* data = nullptr;
  int64_t sample_bytes = 0;

  Maps() = default;
  explicit Maps(const Tensor& maps)
      : data(static_cast<char*>(maps.mutable_data_ptr())),
        sample_bytes(maps.size(1) * int64_t(maps.element_size())) {}
  void* sample(int64_t b) const { return data ? data + b * sample_bytes : nullptr; }
  int32_t* channels(int64_t b) const { return static_cast<int32_t*>(sample(b)); }
};

}  // namespace at_fused
