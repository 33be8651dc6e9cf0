// Tensors as the kernels see them: (B, C, N) in one of the two native layouts.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "feature.h"

namespace at_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

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

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, "at_fused: features must be float16, bfloat16, float32 or float64");
  }
}

// The strides of (B, C, *spatial) as those of (B, C, N); false where no native layout has them.
inline bool describe(const Tensor& tensor, Feature& feature) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t rank = tensor.dim();
  feature.dtype = dtype_of(tensor);
  feature.data = tensor.const_data_ptr();
  feature.B = sizes[0];
  feature.C = sizes[1];
  feature.N = 1;
  int64_t position = 0;  // the stride from one position to the next
  for (int64_t d = rank - 1; d >= 2; --d) {
    if (sizes[d] == 1) continue;
    if (feature.N == 1) position = strides[d];
    if (strides[d] != position * feature.N) return false;
    feature.N *= sizes[d];
  }
  feature.batch = strides[0];
  const int64_t channel = strides[1];
  if (feature.N > 1 && position == 1) {
    feature.layout = Layout::planar;
    feature.line = channel;
    return true;
  }
  if (channel == 1 || feature.C == 1) {
    feature.layout = Layout::interleaved;
    feature.line = position;
    return true;
  }
  feature.layout = Layout::planar;
  feature.line = channel;
  return feature.N == 1;
}

// The stride and size of every dimension of more than one, from `first` on, the innermost first.
inline std::vector<std::pair<int64_t, int64_t>> extents(const Tensor& tensor, int64_t first) {
  std::vector<std::pair<int64_t, int64_t>> extents;
  for (int64_t d = first; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) extents.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(extents.begin(), extents.end());
  return extents;
}

// An expanded tensor may have more elements than any memory: few enough here that sums of bytes, of
// lists too, are never beyond 64 bits.
inline void check_count(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.numel() <= int64_t(1) << 44, "at_fused: at most 2^44 elements, got ",
                  tensor.numel());
}

// A native view of the tensor; `tensor` is replaced by a contiguous copy where it has none.
inline Feature native_feature(Tensor& tensor, Device device) {
  STD_TORCH_CHECK(tensor.dim() >= 3, "at_fused: features must be (B, C, *spatial)");
  STD_TORCH_CHECK(tensor.numel() > 0, "at_fused: features must not be empty");
  check_count(tensor);
  STD_TORCH_CHECK(device_of(tensor) == device, "at_fused: all features must be on the same device");
  Feature feature;
  if (!describe(tensor, feature)) {
    tensor = torch::stable::contiguous(tensor);
    STD_TORCH_CHECK(describe(tensor, feature), "at_fused: a contiguous copy has no layout");
  }
  return feature;
}

// How many tokens in front of each feature (B, C, N) have no part in its map.
class SkipTokens {
 public:
  SkipTokens(const std::vector<int64_t>& counts, const Tensors& features) : counts_(counts) {
    STD_TORCH_CHECK(counts.empty() || counts.size() == features.size(),
                    "at_fused: skip_tokens must have one number per feature, got ", counts.size(),
                    " for ", features.size());
    for (size_t i = 0; i < counts.size(); ++i) {
      STD_TORCH_CHECK(
          counts[i] == 0 ||
              (features[i].dim() == 3 && counts[i] > 0 && counts[i] < features[i].size(2)),
          "at_fused: skip_tokens must be >= 0 and leave a token of a feature (B, C, N), got ",
          counts[i]);
    }
  }

  int64_t of(size_t feature) const { return counts_.empty() ? 0 : counts_[feature]; }

 private:
  const std::vector<int64_t>& counts_;
};

// The features that maps are made of: without their skipped tokens.
inline std::vector<Feature> native_features(Tensors& tensors,
                                            const std::vector<int64_t>& skip_tokens = {}) {
  const SkipTokens skip(skip_tokens, tensors);
  std::vector<Feature> features;
  if (tensors.empty()) return features;
  const Device device = device_of(tensors[0]);
  features.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    features.push_back(without_first(native_feature(tensors[i], device), skip.of(i)));
  }
  return features;
}

// Why torch's last function failed. It says so from 2.13 on, which the libraries do not need.
inline std::string last_reason() {
  using Function = const char*();
  const auto what = reinterpret_cast<Function*>(
      dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return what ? what() : "torch could not make one, for lack of memory most likely";
}

// A new tensor. torch::stable::new_empty and empty_like look their operators up by name in every
// call, which for a list of small features takes longer than the arithmetic.
inline Tensor new_tensor(int64_t rank, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                         Device device) {
  AtenTensorHandle handle = nullptr;
  const auto error =
      aoti_torch_empty_strided(rank, sizes, strides, dtype, device.type, device.index, &handle);
  if (error) {
    int64_t count = 1;
    for (int64_t d = 0; d < rank; ++d) count *= sizes[d];
    STD_TORCH_CHECK(false, "at_fused: no result of ", count, " elements: ", last_reason());
  }
  return Tensor(handle);
}

inline int32_t accumulate_dtype(bool fp64) {
  return fp64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// torch.empty_like: the strides of a dense tensor, those that empty_like finds for any other.
inline Tensor new_like(const Tensor& tensor, const Feature& feature) {
  const int64_t line = feature.layout == Layout::planar ? feature.N : feature.C;
  if (feature.line != line || feature.batch != feature.C * feature.N) {
    return torch::stable::empty_like(tensor);
  }
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return new_tensor(tensor.dim(), tensor.sizes().data(), tensor.strides().data(), dtype,
                    device_of(tensor));
}

inline Tensor new_rows(int64_t B, int64_t N, int32_t dtype, Device device) {
  const int64_t sizes[] = {B, N}, strides[] = {N, 1};
  return new_tensor(2, sizes, strides, dtype, device);
}

inline Tensor new_map(const Feature& feature, Device device) {
  return new_rows(feature.B, feature.N, accumulate_dtype(accumulates_fp64(feature)), device);
}

// The map of each sample in such a tensor.
struct Maps {
  char* first = nullptr;
  int64_t bytes = 0;

  Maps() = default;
  Maps(const Tensor& maps, int64_t positions, int64_t element_bytes)
      : first(static_cast<char*>(maps.mutable_data_ptr())), bytes(positions * element_bytes) {}
  Maps(const Tensor& maps, const Feature& feature)
      : Maps(maps, feature.N, map_element_size(feature)) {}
  void* of(int64_t b) const { return first ? first + b * bytes : nullptr; }
};

}  // namespace at_fused
