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

// The gradient of the loss that came from above: nothing (1), a scalar, one value per pair, or one
// per pair and sample.
struct LossGradient {
  const void* data = nullptr;
  bool fp64 = false;
  int64_t pair_stride = 0, sample_stride = 0;

  LossGradient(const std::optional<Tensor>& gradient, const std::vector<int64_t>& pairs,
               const Tensors& features) {
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
};

// New gradients for a list of features, with the strides that a caller was promised, and the
// tensors that are written for them in a layout that is the feature's own: the same, or plainer
// ones.
class Gradients {
 public:
  Tensors written;
  std::vector<Feature> features;
  std::vector<Feature> out;

  // Features without a native layout are replaced by copies. The gradient of skipped tokens is 0.
  explicit Gradients(Tensors& tensors, const std::vector<int64_t>& skip_tokens = {}) {
    const SkipTokens skip(skip_tokens, tensors);
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
      if (const int64_t first = skip.of(i)) {
        Tensor skipped = torch::stable::narrow(written[i], 2, 0, first);
        torch::stable::zero_(skipped);
        features[i] = without_first(features[i], first);
        out[i] = without_first(out[i], first);
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
