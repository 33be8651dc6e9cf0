// The loss operators, for all devices. They check their arguments and convert them to plain
// structs; cpu/operators.cpp and cuda/losses.cpp compute.
#pragma once

#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gradients.h"

namespace at_fused {

using Weights = std::vector<double>;

// ---- options ----------------------------------------------------------------------------------

// Returns the enum value with the given name. `names` are in the order of the enum.
template <class Option>
Option option_of(const char* option, const std::string& value,
                 std::initializer_list<const char*> names) {
  std::string allowed;
  for (size_t i = 0; i < names.size(); ++i) {
    const char* name = names.begin()[i];
    if (value == name) return Option(i);
    allowed += (i == 0 ? "'" : i + 1 < names.size() ? ", '" : " or '") + std::string(name) + "'";
  }
  STD_TORCH_CHECK(false, "at_fused: ", option, " must be ", allowed, ", got '", value, "'");
}

inline Collapse collapse_of(const std::string& collapse) {
  return option_of<Collapse>("collapse", collapse, {"mean", "sum", "max"});
}

// The factor of the channel sum: 1/C for "mean", else 1.
inline double collapse_scale(Collapse collapse, const Feature& feature) {
  return collapse == Collapse::mean ? 1.0 / double(feature.C) : 1.0;
}

inline void check_exponent(double p) {
  STD_TORCH_CHECK(p >= 1 && std::isfinite(p), "at_fused: p must be a finite number >= 1, got ", p);
}

// ---- arguments --------------------------------------------------------------------------------

struct LossArguments {
  std::vector<Pair> pairs;
  Weights weights;
  Form form;
  Reduction reduction;
  EpsMode eps_mode;
  double eps, p = 1;
  Device device;
  bool fp64 = false;  // dtype of the loss

  LossArguments(const Tensors& student, const Tensors& teacher, Weights pair_weights,
                const std::string& form, const std::string& reduction, const std::string& eps_mode,
                double eps)
      : weights(std::move(pair_weights)),
        form(option_of<Form>("form", form, {"code", "paper"})),
        reduction(option_of<Reduction>("reduction", reduction, {"sum", "none", "sample"})),
        eps_mode(option_of<EpsMode>("eps_mode", eps_mode, {"max", "add"})),
        eps(eps) {
    STD_TORCH_CHECK(!student.empty() && teacher.size() == student.size(),
                    "at_fused: student and teacher must have the same number of tensors, at least "
                    "one, got ",
                    student.size(), " and ", teacher.size());
    STD_TORCH_CHECK(weights.empty() || weights.size() == student.size(),
                    "at_fused: weights must have one number per pair, got ", weights.size(),
                    " for ", student.size());
    STD_TORCH_CHECK(eps > 0 && std::isfinite(eps),
                    "at_fused: eps must be a finite number > 0, got ", eps);
    device = device_of(student[0]);
  }

  // Replaces features without a native layout, and masks that are not contiguous, by copies.
  void set_features(Tensors& student, Tensors& teacher, Tensors& masks, const Ints& skip_tokens,
                    double exponent, const std::string& collapse) {
    check_exponent(p = exponent);
    const Collapse mode = collapse_of(collapse);
    STD_TORCH_CHECK(mode != Collapse::max,
                    "at_fused: collapse must be 'mean' or 'sum' for a loss, got 'max'");
    const size_t n = student.size();
    STD_TORCH_CHECK(masks.empty() || masks.size() == n,
                    "at_fused: masks must have one mask per pair, got ", masks.size(), " for ", n);
    const auto feature_of = [&](Tensor& tensor, size_t index) {
      const int64_t skip = skipped_tokens(skip_tokens, 2 * n, index, tensor);
      return without_first(native_feature(tensor, device), skip);
    };
    for (size_t i = 0; i < n; ++i) {
      Pair pair{feature_of(student[i], i), feature_of(teacher[i], n + i)};
      STD_TORCH_CHECK(pair.student.B == pair.teacher.B && pair.student.N == pair.teacher.N,
                      "at_fused: student and teacher of a pair must have the same B and positions");
      pair.student_scale = collapse_scale(mode, pair.student);
      pair.teacher_scale = collapse_scale(mode, pair.teacher);
      if (!masks.empty()) {
        pair.mask = contiguous_map(masks[i], pair.student, device, accumulate_dtype(pair.fp64()),
                                   "at_fused: a mask must be (B, N) on the features' device, "
                                   "float64 if a feature of the pair is and float32 otherwise")
                        .data;
      }
      add(pair);
    }
  }

  // Replaces maps that are not contiguous by copies.
  void set_maps(Tensors& student, Tensors& teacher) {
    for (size_t i = 0; i < student.size(); ++i) {
      const auto feature_of = [&](Tensor& map) {
        const ScalarType dtype = map.scalar_type();
        STD_TORCH_CHECK(map.dim() == 2 && map.numel() > 0 && device_of(map) == device &&
                            (dtype == ScalarType::Float || dtype == ScalarType::Double) &&
                            map.size(0) == student[i].size(0) && map.size(1) == student[i].size(1),
                        "at_fused: maps must be (B, N), not empty, float32 or float64, on one "
                        "device, and of the same shape in a pair");
        if (!map.is_contiguous()) map = torch::stable::contiguous(map);
        const int64_t B = map.size(0), N = map.size(1);
        return Feature{map.const_data_ptr(), dtype_of(map), Layout::planar, B, 1, N, N, N};
      };
      const Feature student_map = feature_of(student[i]);
      add({student_map, feature_of(teacher[i])});
    }
  }

  // The weight of a sample in the loss, before the division by N.
  double sample_weight(size_t pair) const {
    const double weight = weights.empty() ? 1.0 : weights[pair];
    return reduction == Reduction::sample ? weight : weight / double(pairs[pair].student.B);
  }

  Tensor new_loss() const {
    const int64_t B = pairs[0].student.B;
    const int64_t sizes[] = {int64_t(pairs.size()), B}, strides[] = {B, 1}, unit_stride[] = {1};
    const int64_t rank = reduction == Reduction::sum ? 0 : reduction == Reduction::none ? 1 : 2;
    return new_tensor(rank, sizes, rank == 2 ? strides : unit_stride, accumulate_dtype(fp64),
                      device);
  }

 private:
  void add(const Pair& pair) {
    pairs.push_back(pair);
    fp64 |= pair.fp64();
    STD_TORCH_CHECK(reduction != Reduction::sample || pair.student.B == pairs[0].student.B,
                    "at_fused: reduction 'sample' needs the same batch size in all pairs");
  }
};

// ---- operators --------------------------------------------------------------------------------

// Implemented per device. Maps of a side with a gradient become coefficients, others raw and
// masked.
Tensor compute_loss(const LossArguments& loss, bool student_grad, bool teacher_grad,
                    Tensors& student_maps, Tensors& teacher_maps);
Tensor compute_value_and_grad(const LossArguments& loss, const Gradients& gradients,
                              const LossGradient& loss_gradient, double scale);
// The maps of a side are null unless its coefficients are requested.
Tensor compute_map_loss(const LossArguments& loss, const std::vector<Maps>& student_maps,
                        const std::vector<Maps>& teacher_maps);

inline std::tuple<Tensor, Tensors> at_loss(Tensors student, Tensors teacher, Tensors masks,
                                           Weights weights, Ints skip_tokens, double p,
                                           std::string collapse, std::string form,
                                           std::string reduction, std::string eps_mode, double eps,
                                           bool student_grad, bool teacher_grad) {
  LossArguments loss(student, teacher, weights, form, reduction, eps_mode, eps);
  loss.set_features(student, teacher, masks, skip_tokens, p, collapse);
  Tensors maps, teacher_maps;
  Tensor result = compute_loss(loss, student_grad, teacher_grad, maps, teacher_maps);
  // A backward pass needs the coefficients of one side. A second derivative also needs the raw map
  // of the other, which takes less memory than its features.
  if (!student_grad && !teacher_grad) return {result, {}};
  maps.insert(maps.end(), teacher_maps.begin(), teacher_maps.end());
  return {result, maps};
}

inline std::tuple<Tensor, Tensors> at_value_and_grad(
    Tensors student, Tensors teacher, Tensors masks, Weights weights, Ints skip_tokens, double p,
    std::string collapse, std::string form, std::string reduction, std::string eps_mode, double eps,
    double scale, std::optional<Tensor> loss_gradient) {
  LossArguments loss(student, teacher, weights, form, reduction, eps_mode, eps);
  // Before set_features: this may replace a student by a contiguous copy.
  Gradients gradients(student, skip_tokens, 2 * student.size());
  loss.set_features(student, teacher, masks, skip_tokens, p, collapse);
  const LossGradient upstream(loss_gradient, student);
  Tensor result = compute_value_and_grad(loss, gradients, upstream, scale);
  return {std::move(result), gradients.finish()};
}

inline std::tuple<Tensor, Tensors> map_loss(Tensors student, Tensors teacher, Weights weights,
                                            std::string form, std::string reduction,
                                            std::string eps_mode, double eps, bool student_grad,
                                            bool teacher_grad) {
  LossArguments loss(student, teacher, weights, form, reduction, eps_mode, eps);
  loss.set_maps(student, teacher);
  Tensors results;
  const auto new_maps = [&](bool is_needed, Feature Pair::* side) {
    std::vector<Maps> maps(loss.pairs.size());
    for (size_t i = 0; is_needed && i < maps.size(); ++i) {
      maps[i] = Maps(results.emplace_back(new_map(loss.pairs[i].*side, loss.device)));
    }
    return maps;
  };
  const std::vector<Maps> student_maps = new_maps(student_grad, &Pair::student);
  const std::vector<Maps> teacher_maps = new_maps(teacher_grad, &Pair::teacher);
  return {compute_map_loss(loss, student_maps, teacher_maps), results};
}

}  // namespace at_fused
