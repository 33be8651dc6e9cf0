// The operators' arguments, checked and brought to what the kernels take, for every device.
#pragma once

#include <cmath>
#include <cstdint>
#include <numeric>
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

inline Form form_of(const std::string& form) {
  if (form == "code") return Form::code;
  STD_TORCH_CHECK(form == "paper", "at_fused: form must be 'code' or 'paper', got '", form, "'");
  return Form::paper;
}

inline EpsMode eps_mode_of(const std::string& eps_mode) {
  if (eps_mode == "max") return EpsMode::max;
  STD_TORCH_CHECK(eps_mode == "add", "at_fused: eps_mode must be 'max' or 'add', got '", eps_mode,
                  "'");
  return EpsMode::add;
}

inline void check_eps(double eps) {
  STD_TORCH_CHECK(eps > 0 && std::isfinite(eps), "at_fused: eps must be a finite number > 0, got ",
                  eps);
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

// What stands before the channel sum: 1/C for "mean", 1 for the others.
inline double collapse_scale(Collapse collapse, const Feature& feature) {
  return collapse == Collapse::mean ? 1.0 / double(feature.C) : 1.0;
}

// |A|^p, and where it goes: x^p with its sign, which only an odd p without "absolute" has; or the
// largest of them.
struct MapPower {
  bool keeps_sign, max;

  MapPower(double p, bool absolute, bool max)
      : keeps_sign(!absolute && std::fmod(p, 2.0) == 1.0), max(max) {
    STD_TORCH_CHECK(absolute || p == std::floor(p),
                    "at_fused: without absolute, p must be a whole number, got ", p);
    STD_TORCH_CHECK(!(keeps_sign && max), "at_fused: collapse 'max' takes absolute values");
  }
};

inline int32_t size_of_map(int64_t positions) {
  STD_TORCH_CHECK(positions <= INT32_MAX, "at_fused: at most 2^31 - 1 positions in a row, got ",
                  positions);
  return int32_t(positions);
}

// How each of some features (B, C, *spatial) is pooled before the power; `sizes` as in _ops.
inline std::vector<Pool> pools_of(const Tensors& tensors, const std::vector<int64_t>& sizes) {
  std::vector<Pool> pools;
  size_t at = 0;
  for (const Tensor& tensor : tensors) {
    Pool& pool = pools.emplace_back(Pool{{1, 1, 1}, {1, 1, 1}});
    const int64_t rank = tensor.dim() - 2;
    if (rank > 3) {  // never pooled; one long row
      STD_TORCH_CHECK(sizes.empty(), "at_fused: sizes are for one to three spatial dimensions");
      int64_t positions = 1;
      for (int64_t d = 2; d < tensor.dim(); ++d) positions *= tensor.size(d);
      pool.in[2] = pool.out[2] = size_of_map(positions);
      continue;
    }
    for (int64_t d = 0; d < rank; ++d) {
      const int64_t in = tensor.size(2 + d);
      int64_t out = in;
      if (!sizes.empty()) {
        STD_TORCH_CHECK(at < sizes.size(), "at_fused: sizes are too few for the features");
        out = sizes[at++];
        STD_TORCH_CHECK(out >= 1 && out <= in, "at_fused: sizes must be from 1 to the feature's, ",
                        in, ", got ", out);
      }
      pool.in[3 - rank + d] = size_of_map(in);
      pool.out[3 - rank + d] = int32_t(out);
    }
  }
  STD_TORCH_CHECK(at == sizes.size(), "at_fused: sizes are too many for the features");
  return pools;
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
      : p(p), eps(eps), form(form_of(form)), sum(sums_pairs(reduction)), fp64(false) {
    const size_t n = student.size();
    STD_TORCH_CHECK(n > 0 && teacher.size() == n, "at_fused: as many teachers as students, got ", n,
                    " and ", teacher.size());
    check_weights(weights, n);
    check_eps(eps);
    check_exponent(p);
    const Collapse collapsed = collapse_of(collapse);
    STD_TORCH_CHECK(collapsed != Collapse::max, "at_fused: collapse must be 'mean' or 'sum' here");
    device = device_of(student[0]);
    pairs.resize(n);
    for (size_t i = 0; i < n; ++i) {
      Pair& pair = pairs[i];
      pair.student = native_feature(student[i], device);
      pair.teacher = native_feature(teacher[i], device);
      STD_TORCH_CHECK(pair.student.B == pair.teacher.B && pair.student.N == pair.teacher.N,
                      "at_fused: student and teacher of a pair must have the same B and positions");
      pair.student_collapse = collapse_scale(collapsed, pair.student);
      pair.teacher_collapse = collapse_scale(collapsed, pair.teacher);
      pair.weight = weights.empty() ? 1.0 : weights[i];
      fp64 |= accumulates_fp64(pair.student) || accumulates_fp64(pair.teacher);
    }
  }

  Tensor new_loss() const { return new_losses(sum, int64_t(pairs.size()), fp64, device); }
};

// Pairs of raw maps (B, N) and the options of their loss.
struct MapLossArguments {
  struct Pair {
    const void* student;
    const void* teacher;
    bool student_fp64, teacher_fp64;
    int64_t B, N;
    double weight;

    int64_t bytes() const {
      return N * (accumulate_size(student_fp64) + accumulate_size(teacher_fp64));
    }
    const void* student_of(int64_t b) const {
      return static_cast<const char*>(student) + b * N * accumulate_size(student_fp64);
    }
    const void* teacher_of(int64_t b) const {
      return static_cast<const char*>(teacher) + b * N * accumulate_size(teacher_fp64);
    }
  };
  Device device;
  std::vector<Pair> pairs;
  Form form;
  EpsMode eps_mode;
  double eps;
  bool sum, samples;  // the loss: a sum over pairs; one of each sample; else one of each pair
  bool fp64;          // the loss's dtype

  // Maps that are not contiguous are replaced by copies.
  MapLossArguments(Tensors& student, Tensors& teacher, const std::vector<double>& weights,
                   const std::string& form, const std::string& reduction,
                   const std::string& eps_mode, double eps)
      : form(form_of(form)),
        eps_mode(eps_mode_of(eps_mode)),
        eps(eps),
        sum(reduction == "sum"),
        samples(reduction == "sample"),
        fp64(false) {
    const size_t n = student.size();
    STD_TORCH_CHECK(n > 0 && teacher.size() == n, "at_fused: as many teachers as students, got ", n,
                    " and ", teacher.size());
    check_weights(weights, n);
    STD_TORCH_CHECK(sum || samples || reduction == "none",
                    "at_fused: reduction must be 'sum', 'none' or 'sample', got '", reduction, "'");
    check_eps(eps);
    device = device_of(student[0]);
    for (size_t i = 0; i < n; ++i) {
      for (Tensor* map : {&student[i], &teacher[i]}) {
        STD_TORCH_CHECK(map->dim() == 2 && map->numel() > 0 && device_of(*map) == device &&
                            (map->scalar_type() == ScalarType::Float ||
                             map->scalar_type() == ScalarType::Double) &&
                            map->size(0) == student[i].size(0) &&
                            map->size(1) == student[i].size(1),
                        "at_fused: maps must be (B, N), not empty, float32 or float64, on one "
                        "device, and both of a pair of one size");
        if (!map->is_contiguous()) *map = torch::stable::contiguous(*map);
      }
      STD_TORCH_CHECK(!samples || student[i].size(0) == student[0].size(0),
                      "at_fused: a loss for each sample needs pairs of one batch size");
      const Pair& pair = pairs.emplace_back(
          Pair{student[i].const_data_ptr(), teacher[i].const_data_ptr(),
               student[i].scalar_type() == ScalarType::Double,
               teacher[i].scalar_type() == ScalarType::Double, student[i].size(0),
               student[i].size(1), weights.empty() ? 1.0 : weights[i]});
      fp64 |= pair.student_fp64 || pair.teacher_fp64;
    }
  }

  // What a sample of a pair counts in the loss, before a division by N.
  double sample_weight(const Pair& pair) const {
    return samples ? pair.weight : pair.weight / double(pair.B);
  }

  Tensor new_loss() const {
    const int64_t sizes[] = {int64_t(pairs.size()), pairs[0].B}, strides[] = {pairs[0].B, 1};
    const int64_t one[] = {1};
    return new_tensor(sum       ? 0
                      : samples ? 2
                                : 1,
                      sizes, samples ? strides : one, accumulate_dtype(fp64), device);
  }
};

// What comes with each feature of attention_map_backward.
inline void check_sweep(const Tensors& features, const Tensors& coefficients,
                        const Tensors& channels, const std::vector<int64_t>& pairs, double p) {
  STD_TORCH_CHECK(coefficients.size() == features.size(),
                  "at_fused: a coefficient map per feature");
  STD_TORCH_CHECK(channels.empty() || channels.size() == features.size(),
                  "at_fused: a map of channels per feature, or none");
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

// New tensors with the strides that a caller was promised, and those that are written for them: the
// same, or plainer ones.
class Results {
 public:
  Tensors written;

  // A tensor that a caller will get, before `finish`.
  const Tensor& result(size_t i) const { return results_[i]; }

  // All of them.
  Tensors finish() {
    for (size_t i = 0; i < written.size(); ++i) {
      if (written[i].get() != results_[i].get()) torch::stable::copy_(results_[i], written[i]);
    }
    return std::move(results_);
  }

 protected:
  Tensors results_;
};

// New gradients for a list of features, written in a layout that is the feature's own.
class Gradients : public Results {
 public:
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
};

// A coefficient map (B, positions) for a feature, contiguous.
inline Maps coefficient_map(Tensor& map, const Feature& feature, int64_t positions, Device device) {
  STD_TORCH_CHECK(
      map.dim() == 2 && map.size(0) == feature.B && map.size(1) == positions &&
          device_of(map) == device &&
          (map.scalar_type() == ScalarType::Double) == accumulates_fp64(feature) &&
          (map.scalar_type() == ScalarType::Double || map.scalar_type() == ScalarType::Float),
      "at_fused: a coefficient map must be (B, N), float64 for float64 features and "
      "float32 otherwise");
  if (!map.is_contiguous()) map = torch::stable::contiguous(map);
  return Maps(map, positions, map_element_size(feature));
}

// The channels that won each position's maximum, (B, positions) int32, contiguous.
inline Maps channel_map(Tensor& map, const Feature& feature, int64_t positions, Device device) {
  STD_TORCH_CHECK(map.dim() == 2 && map.size(0) == feature.B && map.size(1) == positions &&
                      device_of(map) == device && map.scalar_type() == ScalarType::Int,
                  "at_fused: a map of channels must be (B, N) of int32");
  if (!map.is_contiguous()) map = torch::stable::contiguous(map);
  return Maps(map, positions, 4);
}

}  // namespace at_fused
