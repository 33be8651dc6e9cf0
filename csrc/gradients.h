// Gradients: the loss's from above, and new ones of features.
#pragma once

#include <algorithm>
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

  LossGradient(const std::optional<Tensor>& gradient, const Ints& pairs, const Tensors& features) {
    if (!gradient) return;
    const int64_t rank = gradient->dim();
    STD_TORCH_CHECK(rank <= 2 && device_of(*gradient) == device_of(features[0]),
                    "at_fused: the loss gradient must be a scalar, (pairs,) or (pairs, B), on the "
                    "inputs' device");
    fp64 = gradient->scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(fp64 || gradient->scalar_type() == ScalarType::Float,
                    "at_fused: the loss gradient must be float32 or float64");
    data = gradient->const_data_ptr();
    if (rank == 0) return;
    pair_stride = gradient->stride(0);
    for (int64_t pair : pairs) {
      STD_TORCH_CHECK(pair >= 0 && pair < gradient->size(0), "at_fused: pair number ", pair,
                      " is out of range");
    }
    if (rank == 1) return;
    sample_stride = gradient->stride(1);
    for (const Tensor& feature : features) {
      STD_TORCH_CHECK(gradient->size(1) == feature.size(0),
                      "at_fused: a loss gradient (pairs, B) must have the batch size of the "
                      "features, ",
                      feature.size(0), ", got ", gradient->size(1));
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

// New gradients for a list of features, with the strides that a caller was promised, and the
// tensors that are written for them in a layout that is the feature's own: the same, or plainer
// ones.
class Gradients {
 public:
  std::vector<Feature> features, out;

  // Features without a native layout are replaced by copies. The gradient of skipped tokens is 0.
  explicit Gradients(Tensors& tensors, const Ints& skip_tokens = {}) {
    check_skip_tokens(skip_tokens, tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const int64_t first = skipped(skip_tokens, i, tensors[i]);
      const Tensor given = tensors[i];
      Feature feature = native_feature(tensors[i], device_of(tensors[0])), written;
      // A feature that was copied to have a layout need not have the strides of `given`.
      results_.push_back(given.get() == tensors[i].get() ? new_like(given, feature)
                                                         : torch::stable::empty_like(given));
      written_.push_back(results_[i]);
      // Strides that no layout has (H and W transposed, say) are written through a plain tensor.
      if (!describe(written_[i], written) || written.layout != feature.layout) {
        tensors[i] = torch::stable::contiguous(tensors[i]);
        written_[i] = torch::stable::new_empty(tensors[i], tensors[i].sizes());
        describe(tensors[i], feature);
        describe(written_[i], written);
      }
      if (first > 0) {
        Tensor zeros = torch::stable::narrow(written_[i], 2, 0, first);
        torch::stable::zero_(zeros);
      }
      features.push_back(without_first(feature, first));
      out.push_back(without_first(written, first));
    }
  }

  const Tensor& written(size_t i) const { return written_[i]; }

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
inline Maps contiguous_map(Tensor& map, const Feature& feature, Device device, bool dtype_fits,
                           const char* wrong) {
  STD_TORCH_CHECK(dtype_fits && map.dim() == 2 && map.size(0) == feature.B &&
                      map.size(1) == feature.N && device_of(map) == device,
                  wrong);
  if (!map.is_contiguous()) map = torch::stable::contiguous(map);
  return Maps(map);
}

inline Maps coefficient_map(Tensor& map, const Feature& feature, Device device) {
  const ScalarType dtype = accumulates_fp64(feature) ? ScalarType::Double : ScalarType::Float;
  return contiguous_map(map, feature, device, map.scalar_type() == dtype,
                        "at_fused: a coefficient map must be (B, N), float64 for float64 features "
                        "and float32 otherwise");
}

// The channels that won each position's maximum.
inline Maps channel_map(Tensor& map, const Feature& feature, Device device) {
  return contiguous_map(map, feature, device, map.scalar_type() == ScalarType::Int,
                        "at_fused: a map of channels must be (B, N) of int32");
}

// ---- gradients that are written in place ------------------------------------------------------

// The stride and size of every dimension of more than one, the innermost first.
inline std::vector<std::pair<int64_t, int64_t>> extents(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> extents;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) extents.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(extents.begin(), extents.end());
  return extents;
}

inline void check_no_overlap(const Tensor& gradient) {
  int64_t reach = 1;
  for (const auto& [stride, size] : extents(gradient)) {
    STD_TORCH_CHECK(stride >= reach,
                    "at_fused: a gradient that is written in place must not be expanded, nor "
                    "overlap itself");
    reach += (size - 1) * stride;
  }
}

// The addresses from a tensor's first byte to behind its last.
inline std::pair<uintptr_t, uintptr_t> bytes_of(const Tensor& tensor) {
  int64_t last = 0;
  for (const auto& [stride, size] : extents(tensor)) last += (size - 1) * stride;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return {begin, begin + uintptr_t(last + 1) * tensor.element_size()};
}

// What may lie where the gradient is written is read from a copy.
inline void read_before(const Tensor& gradient, Tensor& read) {
  const auto [begin, end] = bytes_of(gradient);
  const auto [first, last] = bytes_of(read);
  if (first < end && begin < last) read = torch::stable::clone(read);
}

}  // namespace at_fused
