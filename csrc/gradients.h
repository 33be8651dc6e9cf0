// The upstream gradient of a loss, and gradient tensors for features.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "tensors.h"

namespace at_fused {

// The upstream gradient of a loss: none (1), a scalar, (pairs,) or (pairs, B).
struct LossGradient {
  const void* data = nullptr;
  bool fp64 = false;
  int64_t pair_stride = 0, sample_stride = 0;

  // pairs[i] is the index of feature i's pair. Empty means 0, 1, 2 ...
  LossGradient(const std::optional<Tensor>& gradient, const Tensors& features,
               const Ints& pairs = {}) {
    if (!gradient) return;
    const int64_t rank = gradient->dim();
    const ScalarType dtype = gradient->scalar_type();
    fp64 = dtype == ScalarType::Double;
    STD_TORCH_CHECK(rank <= 2 && (fp64 || dtype == ScalarType::Float) &&
                        device_of(*gradient) == device_of(features[0]),
                    "at_fused: the loss gradient must be a scalar, (pairs,) or (pairs, B), float32 "
                    "or float64, on the inputs' device");
    data = gradient->const_data_ptr();
    if (rank > 0) pair_stride = gradient->stride(0);
    if (rank > 1) sample_stride = gradient->stride(1);
    for (size_t i = 0; i < features.size(); ++i) {
      const int64_t pair = pairs.empty() ? int64_t(i) : pairs[i];
      STD_TORCH_CHECK(rank == 0 || (pair >= 0 && pair < gradient->size(0)),
                      "at_fused: the loss gradient has no value for pair ", pair);
      STD_TORCH_CHECK(rank < 2 || gradient->size(1) == features[i].size(0),
                      "at_fused: a loss gradient (pairs, B) must have the batch size of the "
                      "features, ",
                      features[i].size(0), ", got ", gradient->size(1));
    }
  }

  // The address of the pair's first value; null without a gradient.
  const void* address(int64_t pair) const {
    return data ? static_cast<const char*>(data) + pair * pair_stride * accumulate_size(fp64)
                : nullptr;
  }
  double value(int64_t pair, int64_t b) const {
    return value_or_one(address(pair), fp64, b * sample_stride);
  }
};

// Returns the tensor that a kernel writes a gradient to, in the layout of its feature. This is
// `out` if the layouts match. Otherwise (H and W transposed, say) it is a contiguous tensor, and
// the feature is replaced by a contiguous copy.
inline Tensor gradient_buffer(const Tensor& out, Tensor& tensor, Feature& feature,
                              Feature& buffer) {
  if (view_as_feature(out, buffer) && buffer.layout == feature.layout) return out;
  tensor = torch::stable::contiguous(tensor);
  Tensor contiguous = torch::stable::new_empty(tensor, tensor.sizes());
  view_as_feature(tensor, feature);
  view_as_feature(contiguous, buffer);
  return contiguous;
}

// Allocates gradients for a list of features, with the strides of torch.empty_like. Kernels write
// to `out`, which has the layouts of `features`; finish() copies to the results where they differ.
class Gradients {
 public:
  std::vector<Feature> features, out;

  // Features without a native layout are replaced by copies. Skipped tokens get gradient 0.
  // skip_tokens is empty or has skip_count numbers, the first of them for `tensors`.
  Gradients(Tensors& tensors, const Ints& skip_tokens, size_t skip_count) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const int64_t skip = skipped_tokens(skip_tokens, skip_count, i, tensors[i]);
      const Tensor original = tensors[i];
      Feature feature = native_feature(tensors[i], device_of(tensors[0])), buffer;
      results_.push_back(new_like(original));
      buffers_.push_back(gradient_buffer(results_[i], tensors[i], feature, buffer));
      if (skip > 0) {
        Tensor zeros = torch::stable::narrow(buffers_[i], 2, 0, skip);
        torch::stable::zero_(zeros);
      }
      features.push_back(without_first(feature, skip));
      out.push_back(without_first(buffer, skip));
    }
  }

  Tensors finish() {
    for (size_t i = 0; i < buffers_.size(); ++i) {
      if (buffers_[i].get() != results_[i].get()) torch::stable::copy_(results_[i], buffers_[i]);
    }
    return std::move(results_);
  }

 private:
  Tensors buffers_, results_;
};

// ---- maps of features -------------------------------------------------------------------------

// Checks a map (B, N) of a feature, and makes it contiguous.
inline Maps contiguous_map(Tensor& map, const Feature& feature, Device device, ScalarType dtype,
                           const char* message) {
  STD_TORCH_CHECK(map.scalar_type() == dtype && map.dim() == 2 && map.size(0) == feature.B &&
                      map.size(1) == feature.N && device_of(map) == device,
                  message);
  if (!map.is_contiguous()) map = torch::stable::contiguous(map);
  return Maps(map);
}

inline Maps coefficient_map(Tensor& map, const Feature& feature, Device device) {
  return contiguous_map(map, feature, device, accumulate_dtype(accumulates_fp64(feature)),
                        "at_fused: a coefficient map must be (B, N), float64 for float64 features "
                        "and float32 otherwise");
}

// The argmax channel of each position.
inline Maps channel_map(Tensor& map, const Feature& feature, Device device) {
  return contiguous_map(map, feature, device, ScalarType::Int,
                        "at_fused: a map of channels must be (B, N) of int32");
}

// ---- gradients written in place ---------------------------------------------------------------

inline void check_no_overlap(const Tensor& gradient) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // (stride, size)
  for (int64_t d = 0; d < gradient.dim(); ++d) {
    if (gradient.size(d) > 1) dimensions.emplace_back(gradient.stride(d), gradient.size(d));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : dimensions) {
    STD_TORCH_CHECK(stride >= extent,
                    "at_fused: a gradient that is written in place must not be expanded, nor "
                    "overlap itself");
    extent += (size - 1) * stride;
  }
}

inline uintptr_t storage_address(const Tensor& tensor) {
  int64_t offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  // An integer, because arithmetic on the null pointer of an empty tensor is undefined.
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) -
         uintptr_t(offset) * uintptr_t(tensor.element_size());
}

// Replaces an input by a copy if it shares its storage with a gradient that is written in place.
inline void copy_if_aliased(const Tensor& gradient, Tensor& input) {
  if (storage_address(input) == storage_address(gradient)) input = torch::stable::clone(input);
}

}  // namespace at_fused
