// The operators for losses, on every device: their arguments are checked and brought to plain
// structs here; cpu/operators.cpp and cuda/losses.cpp compute.
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

// One of the names of an enum's values.
template <class Option>
Option option_of(const char* option, const std::string& given,
                 std::initializer_list<const char*> names) {
  std::string list;
  for (size_t i = 0; i < names.size(); ++i) {
    const char* name = names.begin()[i];
    if (given == name) return Option(i);
    list += (i == 0 ? "'" : i + 1 < names.size() ? ", '" : " or '") + std::string(name) + "'";
  }
  STD_TORCH_CHECK(false, "at_fused: ", option, " must be ", list, ", got '", given, "'");
}

inline Collapse collapse_of(const std::string& collapse) {
  return option_of<Collapse>("collapse", collapse, {"mean", "sum", "max"});
}

// What stands before the channel sum: 1/C for "mean", 1 for the others.
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
  bool fp64 = false;  // the loss's dtype

  LossArguments(const Tensors& student, const Tensors& teacher, Weights given,
                const std::string& form, const std::string& reduction, const std::string& eps_mode,
                double eps)
      : weights(std::move(given)),
        form(option_of<Form>("form", form, {"code", "paper"})),
        reduction(option_of<Reduction>("reduction", reduction, {"sum", "none", "sample"})),
        eps_mode(option_of<EpsMode>("eps_mode", eps_mode, {"max", "add"})),
        eps(eps) {
    STD_TORCH_CHECK(!student.empty() && teacher.size() == student.size(),
                    "at_fused: as many teachers as students, got ", student.size(), " and ",
                    teacher.size());
    STD_TORCH_CHECK(weights.empty() || weights.size() == student.size(),
                    "at_fused: a weight per pair, got ", weights.size(), " for ", student.size());
    STD_TORCH_CHECK(eps > 0 && std::isfinite(eps),
                    "at_fused: eps must be a finite number > 0, got ", eps);
    device = device_of(student[0]);
  }

  // Features without a native layout, and masks that are not contiguous, are replaced by copies.
  void take_features(Tensors& student, Tensors& teacher, Tensors& masks, const Ints& skip_tokens,
                     double exponent, const std::string& collapse) {
    check_exponent(p = exponent);
    const Collapse collapsed = collapse_of(collapse);
    STD_TORCH_CHECK(collapsed != Collapse::max, "at_fused: collapse must be 'mean' or 'sum' here");
    const size_t n = student.size();
    STD_TORCH_CHECK(masks.empty() || masks.size() == n, "at_fused: a mask per pair, got ",
                    masks.size(), " for ", n);
    const auto feature_of = [&](Tensor& tensor, size_t at) {
      const int64_t first = skipped(skip_tokens, 2 * n, at, tensor);
      return without_first(native_feature(tensor, device), first);
    };
    for (size_t i = 0; i < n; ++i) {
      Pair pair{feature_of(student[i], i), feature_of(teacher[i], n + i)};
      STD_TORCH_CHECK(pair.student.B == pair.teacher.B && pair.student.N == pair.teacher.N,
                      "at_fused: student and teacher of a pair must have the same B and positions");
      pair.student_scale = collapse_scale(collapsed, pair.student);
      pair.teacher_scale = collapse_scale(collapsed, pair.teacher);
      if (!masks.empty()) {
        pair.mask = contiguous_map(masks[i], pair.student, device, accumulate_dtype(pair.fp64()),
                                   "at_fused: a mask must be (B, N) on the features' device, "
                                   "float64 where a feature of the pair is and float32 otherwise")
                        .first;
      }
      add(pair);
    }
  }

  // Maps that are not contiguous are replaced by copies.
  void take_maps(Tensors& student, Tensors& teacher) {
    for (size_t i = 0; i < student.size(); ++i) {
      const auto feature_of = [&](Tensor& map) {
        const ScalarType dtype = map.scalar_type();
        STD_TORCH_CHECK(map.dim() == 2 && map.numel() > 0 && device_of(map) == device &&
                            (dtype == ScalarType::Float || dtype == ScalarType::Double) &&
                            map.size(0) == student[i].size(0) && map.size(1) == student[i].size(1),
                        "at_fused: maps must be (B, N), not empty, float32 or float64, on one "
                        "device, and both of a pair of one size");
        if (!map.is_contiguous()) map = torch::stable::contiguous(map);
        const int64_t B = map.size(0), N = map.size(1);
        return Feature{map.const_data_ptr(), dtype_of(map), Layout::planar, B, 1, N, N, N};
      };
      const Feature of_student = feature_of(student[i]);
      add({of_student, feature_of(teacher[i])});
    }
  }

  // What a sample of a pair counts in the loss, before a division by N.
  double sample_weight(size_t pair) const {
    const double weight = weights.empty() ? 1.0 : weights[pair];
    return reduction == Reduction::sample ? weight : weight / double(pairs[pair].student.B);
  }

  Tensor new_loss() const {
    const int64_t B = pairs[0].student.B;
    const int64_t sizes[] = {int64_t(pairs.size()), B}, strides[] = {B, 1}, one[] = {1};
    const int64_t rank = reduction == Reduction::sum ? 0 : reduction == Reduction::none ? 1 : 2;
    return new_tensor(rank, sizes, rank == 2 ? strides : one, accumulate_dtype(fp64), device);
  }

 private:
  void add(const Pair& pair) {
    pairs.push_back(pair);
    fp64 |= pair.fp64();
    STD_TORCH_CHECK(reduction != Reduction::sample || pair.student.B == pairs[0].student.B,
                    "at_fused: a loss for each sample needs pairs of one batch size");
  }
};

// ---- operators --------------------------------------------------------------------------------

// A device's own part. The maps become, where a gradient is asked for, coefficient maps; else they
// are raw and masked.
Tensor compute_loss(const LossArguments& loss, bool student_grad, bool teacher_grad,
                    Tensors& student_maps, Tensors& teacher_maps);
Tensor compute_value_and_grad(const LossArguments& loss, const Gradients& gradients,
                              const LossGradient& loss_gradient, double scale);
// A side whose coefficients nobody asked for has no maps.
Tensor compute_map_loss(const LossArguments& loss, const std::vector<Maps>& student_maps,
                        const std::vector<Maps>& teacher_maps);

inline std::tuple<Tensor, Tensors> at_loss(Tensors student, Tensors teacher, Tensors masks,
                                           Weights weights, Ints skip_tokens, double p,
                                           std::string collapse, std::string form,
                                           std::string reduction, std::string eps_mode, double eps,
                                           bool student_grad, bool teacher_grad) {
  LossArguments loss(student, teacher, weights, form, reduction, eps_mode, eps);
  loss.take_features(student, teacher, masks, skip_tokens, p, collapse);
  Tensors maps, teacher_maps;
  Tensor result = compute_loss(loss, student_grad, teacher_grad, maps, teacher_maps);
  // With a gradient to come both sides' maps are kept: k where it is asked for, else the raw map,
  // which a second derivative needs (and which is cheaper to keep than the features).
  if (!student_grad && !teacher_grad) return {result, {}};
  maps.insert(maps.end(), teacher_maps.begin(), teacher_maps.end());
  return {result, maps};
}

inline std::tuple<Tensor, Tensors> at_value_and_grad(
    Tensors student, Tensors teacher, Tensors masks, Weights weights, Ints skip_tokens, double p,
    std::string collapse, std::string form, std::string reduction, std::string eps_mode, double eps,
    double scale, std::optional<Tensor> loss_gradient) {
  LossArguments loss(student, teacher, weights, form, reduction, eps_mode, eps);
  // First: they settle in which layout a student is read.
  Gradients gradients(student, skip_tokens, 2 * student.size());
  loss.take_features(student, teacher, masks, skip_tokens, p, collapse);
  const LossGradient above(loss_gradient, student);
  Tensor result = compute_value_and_grad(loss, gradients, above, scale);
  return {std::move(result), gradients.finish()};
}

inline std::tuple<Tensor, Tensors> map_loss(Tensors student, Tensors teacher, Weights weights,
                                            std::string form, std::string reduction,
                                            std::string eps_mode, double eps, bool student_grad,
                                            bool teacher_grad) {
  LossArguments loss(student, teacher, weights, form, reduction, eps_mode, eps);
  loss.take_maps(student, teacher);
  Tensors results;
  const auto new_maps = [&](bool wanted, Feature Pair::* side) {
    std::vector<Maps> maps(loss.pairs.size());
    for (size_t i = 0; wanted && i < maps.size(); ++i) {
      maps[i] = Maps(results.emplace_back(new_map(loss.pairs[i].*side, loss.device)));
    }
    return maps;
  };
  const std::vector<Maps> of_students = new_maps(student_grad, &Pair::student);
  const std::vector<Maps> of_teachers = new_maps(teacher_grad, &Pair::teacher);
  return {compute_map_loss(loss, of_students, of_teachers), results};
}

}  // namespace at_fused
