// What several operators take, checked and brought to what the kernels take, for every device.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "features.h"

namespace at_fused {

inline void check_exponent(double p) {
  STD_TORCH_CHECK(p >= 1 && std::isfinite(p), "at_fused: p must be a finite number >= 1, got ", p);
}

inline Collapse collapse_of(const std::string& collapse) {
  if (collapse == "mean") return Collapse::mean;
  if (collapse == "sum") return Collapse::sum;
  STD_TORCH_CHECK(collapse == "max", "at_fused: collapse must be 'mean', 'sum' or 'max', got '",
                  collapse, "'");
  return Collapse::max;
}

// What stands before the channel sum: 1/C for "mean", 1 for the others.
inline double collapse_scale(Collapse collapse, const Feature& feature) {
  return collapse == Collapse::mean ? 1.0 / double(feature.C) : 1.0;
}

inline void check_weights(const std::vector<double>& weights, size_t pairs) {
  STD_TORCH_CHECK(weights.empty() || weights.size() == pairs, "at_fused: a weight per pair, got ",
                  weights.size(), " for ", pairs);
}

// Whether the losses of pairs are added up; else they are a vector.
inline bool sums_pairs(const std::string& reduction) {
  STD_TORCH_CHECK(reduction == "sum" || reduction == "none",
                  "at_fused: reduction must be 'sum' or 'none', got '", reduction, "'");
  return reduction == "sum";
}

// A scalar, or one loss for each pair.
inline Tensor new_losses(bool sum, int64_t pairs, bool fp64, Device device) {
  const int64_t stride = 1;
  return new_tensor(sum ? 0 : 1, &pairs, &stride, accumulate_dtype(fp64), device);
}

// The gradient of the loss that came from above: nothing (1), a scalar, or one value per pair.
struct LossGradient {
  const void* data = nullptr;
  bool fp64 = false;
  int64_t stride = 0;

  LossGradient(const std::optional<Tensor>& gradient, const std::vector<int64_t>& pairs,
               Device device) {
    if (!gradient) return;
    STD_TORCH_CHECK(gradient->dim() <= 1 && device_of(*gradient) == device,
                    "at_fused: the loss gradient must be a scalar or a vector on the inputs' "
                    "device");
    fp64 = gradient->scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(fp64 || gradient->scalar_type() == ScalarType::Float,
                    "at_fused: the loss gradient must be float32 or float64");
    data = gradient->const_data_ptr();
    if (gradient->dim() == 0) return;
    stride = gradient->stride(0);
    for (int64_t pair : pairs) {
      STD_TORCH_CHECK(pair >= 0 && pair < gradient->numel(), "at_fused: pair number ", pair,
                      " is out of range");
    }
  }

  // Where a pair's value lies; null for none.
  const void* of(int64_t pair) const {
    return data ? static_cast<const char*>(data) + pair * stride * accumulate_size(fp64) : nullptr;
  }
};

// New gradients for a list of features, with the strides that a caller was promised, and the
// tensors that are written for them in a layout that is the feature's own: the same, or plainer
// ones.
class Gradients {
 public:
  Tensors written;
  std::vector<Feature> features;
  std::vector<Feature> out;

  // Features without a native layout are replaced by copies.
  explicit Gradients(Tensors& tensors) {
    const size_t n = tensors.size();
    const Tensors given = tensors;
    features = native_features(tensors);
    out.resize(n);
    for (size_t i = 0; i < n; ++i) {
      // A feature that was copied to have a layout need not have the strides of `given`.
      results_.push_back(given[i].get() == tensors[i].get() ? new_like(given[i], features[i])
                                                            : torch::stable::empty_like(given[i]));
      written.push_back(results_[i]);
      // Strides that no layout has (H and W transposed, say) are written through a plain tensor.
      if (!describe(written[i], out[i]) || out[i].layout != features[i].layout) {
        tensors[i] = torch::stable::contiguous(tensors[i]);
        written[i] = torch::stable::new_empty(tensors[i], tensors[i].sizes());
        describe(tensors[i], features[i]);
        describe(written[i], out[i]);
      }
    }
  }

  // A tensor that a caller will get, before `finish`.
  const Tensor& result(size_t i) const { return results_[i]; }

  // All of them.
  Tensors finish() {
    for (size_t i = 0; i < written.size(); ++i) {
      if (written[i].get() != results_[i].get()) torch::stable::copy_(results_[i], written[i]);
    }
    return std::move(results_);
  }

 private:
  Tensors results_;
};

}  // namespace at_fused
