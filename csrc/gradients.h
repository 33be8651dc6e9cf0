// Gradients: the loss's from above, and new ones of features.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "tensors.h"

namespace at_fused {

// The gradient of the loss that came from above: nothing (1), a scalar, one value per pair, or one
// per pair and sample.
struct LossGradient {
  const void* data = nullptr;
  bool fp64 = false;
  int64_t pair_stride = 0, sample_stride = 0;

  // `pairs` numbers each feature's pair; empty: 0, 1, 2 ...
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
                      "at_fused: the loss gradient has no value for pair number ", pair);
      STD_TORCH_CHECK(rank < 2 || gradient->size(1) == features[i].size(0),
                      "at_fused: a loss gradient (pairs, B) must have the batch size of the "
                      "features, ",
                      features[i].size(0), ", got ", gradient->size(1));
    }
  }

  // The address of a pair's first value; null for none.
  const void* of(int64_t pair) const {
    return data ? static_cast<const char*>(data) + pair * pair_stride * accumulate_size(fp64)
                : nullptr;
  }
  double value(int64_t pair, int64_t b) const {
    return factor_of(of(pair), fp64, b * sample_stride);
  }
};

// Finds what a gradient is written to, in its feature's layout: `out` itself, or, where it has
// strides of another or of none (H and W transposed, say), a plain tensor, which takes a plain
// feature too.
inline Tensor written_for(const Tensor& out, Tensor& tensor, Feature& feature, Feature& written) {
  if (describe(out, written) && written.layout == feature.layout) return out;
  tensor = torch::stable::contiguous(tensor);
  Tensor plain = torch::stable::new_empty(tensor, tensor.sizes());
  describe(tensor, feature);
  describe(plain, written);
  return plain;
}

// New gradients for a list of features, with the strides that a caller was promised, and the
// tensors that are written for them in a layout that is the feature's own: the same, or plainer
// ones.
class Gradients {
 public:
  std::vector<Feature> features, out;

  // Features without a native layout are replaced by copies. The gradient of skipped tokens is 0.
  // The tensors are the first of `listed` ones that skip_tokens may have a number for.
  Gradients(Tensors& tensors, const Ints& skip_tokens, size_t listed) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const int64_t first = skipped(skip_tokens, listed, i, tensors[i]);
      const Tensor given = tensors[i];
      Feature feature = native_feature(tensors[i], device_of(tensors[0])), written;
      results_.push_back(new_like(given));
      written_.push_back(written_for(results_[i], tensors[i], feature, written));
      if (first > 0) {
        Tensor zeros = torch::stable::narrow(written_[i], 2, 0, first);
        torch::stable::zero_(zeros);
      }
      features.push_back(without_first(feature, first));
      out.push_back(without_first(written, first));
    }
  }

  Tensors finish() {
    for (size_t i = 0; i < written_.size(); ++i) {
      if (written_[i].get() != results_[i].get()) torch::stable::copy_(results_[i], written_[i]);
    }
    return std::move(results_);
  }

 private:
  Tensors written_, results_;
};

// ---- maps that come with features -------------------------------------------------------------

// A map (B, N) of a feature, contiguous.
inline Maps contiguous_map(Tensor& map, const Feature& feature, Device device, ScalarType dtype,
                           const char* wrong) {
  STD_TORCH_CHECK(map.scalar_type() == dtype && map.dim() == 2 && map.size(0) == feature.B &&
                      map.size(1) == feature.N && device_of(map) == device,
                  wrong);
  if (!map.is_contiguous()) map = torch::stable::contiguous(map);
  return Maps(map);
}

inline Maps coefficient_map(Tensor& map, const Feature& feature, Device device) {
  return contiguous_map(map, feature, device, accumulate_dtype(accumulates_fp64(feature)),
                        "at_fused: a coefficient map must be (B, N), float64 for float64 features "
                        "and float32 otherwise");
}

// The channels that won each position's maximum.
inline Maps channel_map(Tensor& map, const Feature& feature, Device device) {
  return contiguous_map(map, feature, device, ScalarType::Int,
                        "at_fused: a map of channels must be (B, N) of int32");
}

// ---- gradients that are written in place ------------------------------------------------------

inline void check_no_overlap(const Tensor& gradient) {
  std::vector<std::pair<int64_t, int64_t>> extents;  // strides and sizes
  for (int64_t d = 0; d < gradient.dim(); ++d) {
    if (gradient.size(d) > 1) extents.emplace_back(gradient.stride(d), gradient.size(d));
  }
  std::sort(extents.begin(), extents.end());
  int64_t reach = 1;
  for (const auto& [stride, size] : extents) {
    STD_TORCH_CHECK(stride >= reach,
                    "at_fused: a gradient that is written in place must not be expanded, nor "
                    "overlap itself");
    reach += (size - 1) * stride;
  }
}

inline uintptr_t memory_of(const Tensor& tensor) {
  int64_t offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  // A number: the pointer of an empty tensor is null.
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) -
         uintptr_t(offset) * uintptr_t(tensor.element_size());
}

// What may lie where the gradient is written is read from a copy.
inline void read_before(const Tensor& gradient, Tensor& read) {
  if (memory_of(read) == memory_of(gradient)) read = torch::stable::clone(read);
}

}  // namespace at_fused
