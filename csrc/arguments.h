// The operators' arguments, checked and brought to what the kernels take, for every device.
#pragma once

#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "features.h"

namespace at_fused {

inline void check_exponent(double p) {
  STD_TORCH_CHECK(p >= 1 && std::isfinite(p), "at_fused: p must be a finite number >= 1, got ", p);
}

// What stands before the channel sum: 1/C for "mean", 1 for "sum".
inline double collapse_scale(const std::string& collapse, const Feature& feature) {
  if (collapse == "mean") return 1.0 / double(feature.C);
  STD_TORCH_CHECK(collapse == "sum", "at_fused: collapse must be 'mean' or 'sum', got '", collapse,
                  "'");
  return 1.0;
}

// The pairs of a loss and its options.
struct LossArguments {
  struct Pair {
    Feature student, teacher;
    double student_collapse, teacher_collapse;
    double weight;
  };
  Device device;
  std::vector<Pair> pairs;
  double p, eps;
  Form form;
  bool sum;   // over the pairs; else a loss for each
  bool fp64;  // the loss's dtype

  // The number of each pair.
  std::vector<int64_t> numbers() const {
    std::vector<int64_t> numbers(pairs.size());
    std::iota(numbers.begin(), numbers.end(), 0);
    return numbers;
  }

  // Features without a native layout are replaced by copies.
  LossArguments(Tensors& student, Tensors& teacher, const std::vector<double>& weights, double p,
                const std::string& collapse, const std::string& form, const std::string& reduction,
                double eps)
      : p(p),
        eps(eps),
        form(form == "code" ? Form::code : Form::paper),
        sum(reduction == "sum"),
        fp64(false) {
    const size_t n = student.size();
    STD_TORCH_CHECK(n > 0 && teacher.size() == n, "at_fused: as many teachers as students, got ", n,
                    " and ", teacher.size());
    STD_TORCH_CHECK(weights.empty() || weights.size() == n, "at_fused: a weight per pair, got ",
                    weights.size(), " for ", n);
    STD_TORCH_CHECK(form == "code" || form == "paper",
                    "at_fused: form must be 'code' or 'paper', got '", form, "'");
    STD_TORCH_CHECK(reduction == "sum" || reduction == "none",
                    "at_fused: reduction must be 'sum' or 'none', got '", reduction, "'");
    STD_TORCH_CHECK(eps > 0 && std::isfinite(eps),
                    "at_fused: eps must be a finite number > 0, got ", eps);
    check_exponent(p);
    device = device_of(student[0]);
    pairs.resize(n);
    for (size_t i = 0; i < n; ++i) {
      Pair& pair = pairs[i];
      pair.student = native_feature(student[i], device);
      pair.teacher = native_feature(teacher[i], device);
      STD_TORCH_CHECK(pair.student.B == pair.teacher.B && pair.student.N == pair.teacher.N,
                      "at_fused: student and teacher of a pair must have the same B and positions");
      pair.student_collapse = collapse_scale(collapse, pair.student);
      pair.teacher_collapse = collapse_scale(collapse, pair.teacher);
      pair.weight = weights.empty() ? 1.0 : weights[i];
      fp64 |= accumulates_fp64(pair.student) || accumulates_fp64(pair.teacher);
    }
  }

  Tensor new_loss() const {
    const int64_t sizes[] = {int64_t(pairs.size())}, strides[] = {1};
    return new_tensor(sum ? 0 : 1, sizes, strides, accumulate_dtype(fp64), device);
  }
};

// What comes with each feature of attention_map_backward.
inline void check_sweep(const Tensors& features, const Tensors& coefficients,
                        const std::vector<int64_t>& pairs, double p) {
  STD_TORCH_CHECK(coefficients.size() == features.size(),
                  "at_fused: a coefficient map per feature");
  STD_TORCH_CHECK(pairs.size() == features.size(), "at_fused: a pair number per feature");
  check_exponent(p);
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
                    "at_fused: the loss gradient must be a scalar or a vector on the features' "
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
    return data ? static_cast<const char*>(data) + pair * stride * (fp64 ? 8 : 4) : nullptr;
  }
};

// New gradients for a list of features, written in a layout that is the feature's own.
class Gradients {
 public:
  std::vector<Feature> features;
  std::vector<Feature> out;
  Tensors written;

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

  // The gradients with the strides that the caller was promised.
  Tensors finish() {
    for (size_t i = 0; i < written.size(); ++i) {
      if (written[i].get() != results_[i].get()) torch::stable::copy_(results_[i], written[i]);
    }
    return std::move(results_);
  }

 private:
  Tensors results_;
};

// A coefficient map (B, N) for a feature, contiguous.
inline Maps coefficient_map(Tensor& map, const Feature& feature, Device device) {
  STD_TORCH_CHECK(
      map.dim() == 2 && map.size(0) == feature.B && map.size(1) == feature.N &&
          device_of(map) == device &&
          (map.scalar_type() == ScalarType::Double) == accumulates_fp64(feature) &&
          (map.scalar_type() == ScalarType::Double || map.scalar_type() == ScalarType::Float),
      "at_fused: a coefficient map must be (B, N), float64 for float64 features and "
      "float32 otherwise");
  if (!map.is_contiguous()) map = torch::stable::contiguous(map);
  return Maps(map, feature);
}

}  // namespace at_fused
