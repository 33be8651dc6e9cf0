// The arguments of the operators for losses of features and of maps, checked, for every device.
#pragma once

#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"

namespace at_fused {

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

inline Reduction reduction_of(const std::string& reduction) {
  if (reduction == "sum") return Reduction::sum;
  if (reduction == "none") return Reduction::none;
  STD_TORCH_CHECK(reduction == "sample",
                  "at_fused: reduction must be 'sum', 'none' or 'sample', got '", reduction, "'");
  return Reduction::sample;
}

// The options that the losses of features and of maps share, for a list of pairs.
struct LossOptions {
  std::vector<double> weights;
  Form form;
  Reduction reduction;
  EpsMode eps_mode;
  double eps;
  Device device;
  bool fp64 = false;  // the loss's dtype

  LossOptions(const Tensors& student, const Tensors& teacher, std::vector<double> weights,
              const std::string& form, const std::string& reduction, const std::string& eps_mode,
              double eps)
      : weights(std::move(weights)),
        form(form_of(form)),
        reduction(reduction_of(reduction)),
        eps_mode(eps_mode_of(eps_mode)),
        eps(eps) {
    STD_TORCH_CHECK(!student.empty() && teacher.size() == student.size(),
                    "at_fused: as many teachers as students, got ", student.size(), " and ",
                    teacher.size());
    check_weights(this->weights, student.size());
    STD_TORCH_CHECK(eps > 0 && std::isfinite(eps),
                    "at_fused: eps must be a finite number > 0, got ", eps);
    device = device_of(student[0]);
  }

  // What a sample of a pair counts in the loss, before a division by N.
  double sample_weight(size_t pair, int64_t B) const {
    const double weight = weights.empty() ? 1.0 : weights[pair];
    return reduction == Reduction::sample ? weight : weight / double(B);
  }

 protected:
  void check_batch(int64_t B, int64_t first) const {
    STD_TORCH_CHECK(reduction != Reduction::sample || B == first,
                    "at_fused: a loss for each sample needs pairs of one batch size");
  }

  Tensor new_loss(int64_t pairs, int64_t B) const {
    const int64_t sizes[] = {pairs, B}, strides[] = {B, 1}, one[] = {1};
    const int64_t rank = reduction == Reduction::sum ? 0 : reduction == Reduction::none ? 1 : 2;
    return new_tensor(rank, sizes, rank == 2 ? strides : one, accumulate_dtype(fp64), device);
  }
};

// The students' part of a list for both sides; LossArguments refuses one of another length.
inline std::vector<int64_t> skip_of_students(const std::vector<int64_t>& skip_tokens,
                                             size_t pairs) {
  const bool both = skip_tokens.size() == 2 * pairs;
  return {skip_tokens.begin(), skip_tokens.begin() + int64_t(both ? pairs : 0)};
}

// Pairs of features, and the options of their loss.
struct LossArguments : LossOptions {
  struct Pair {
    Feature student, teacher;
    double student_scale, teacher_scale;
    const void* mask;  // (B, N), fp64 where a side is and fp32 otherwise; null: ones

    bool fp64() const { return accumulates_fp64(student) || accumulates_fp64(teacher); }
    const void* mask_of(int64_t b) const {
      return mask ? static_cast<const char*>(mask) + b * student.N * accumulate_size(fp64())
                  : nullptr;
    }
  };
  std::vector<Pair> pairs;
  double p;

  // The number of each pair.
  std::vector<int64_t> numbers() const {
    std::vector<int64_t> numbers(pairs.size());
    std::iota(numbers.begin(), numbers.end(), 0);
    return numbers;
  }

  // Features without a native layout, and masks that are not contiguous, are replaced by copies.
  LossArguments(Tensors& student, Tensors& teacher, Tensors& masks,
                const std::vector<double>& weights, const std::vector<int64_t>& skip_tokens,
                double p, const std::string& collapse, const std::string& form,
                const std::string& reduction, const std::string& eps_mode, double eps)
      : LossOptions(student, teacher, weights, form, reduction, eps_mode, eps), p(p) {
    check_exponent(p);
    const Collapse collapsed = collapse_of(collapse);
    STD_TORCH_CHECK(collapsed != Collapse::max, "at_fused: collapse must be 'mean' or 'sum' here");
    const size_t n = student.size();
    STD_TORCH_CHECK(masks.empty() || masks.size() == n, "at_fused: a mask per pair, got ",
                    masks.size(), " for ", n);
    Tensors features;
    if (!skip_tokens.empty()) {
      features = student;
      features.insert(features.end(), teacher.begin(), teacher.end());
    }
    const SkipTokens skip(skip_tokens, features);
    for (size_t i = 0; i < n; ++i) {
      Pair pair;
      pair.student = without_first(native_feature(student[i], device), skip.of(i));
      pair.teacher = without_first(native_feature(teacher[i], device), skip.of(n + i));
      STD_TORCH_CHECK(pair.student.B == pair.teacher.B && pair.student.N == pair.teacher.N,
                      "at_fused: student and teacher of a pair must have the same B and positions");
      pair.student_scale = collapse_scale(collapsed, pair.student);
      pair.teacher_scale = collapse_scale(collapsed, pair.teacher);
      pair.mask = masks.empty() ? nullptr : checked_mask(masks[i], pair);
      fp64 |= pair.fp64();
      pairs.push_back(pair);
      check_batch(pair.student.B, pairs[0].student.B);
    }
  }

  Tensor new_loss() const {
    return LossOptions::new_loss(int64_t(pairs.size()), pairs[0].student.B);
  }

 private:
  const void* checked_mask(Tensor& mask, const Pair& pair) const {
    STD_TORCH_CHECK(
        mask.dim() == 2 && mask.size(0) == pair.student.B && mask.size(1) == pair.student.N &&
            device_of(mask) == device &&
            mask.scalar_type() == (pair.fp64() ? ScalarType::Double : ScalarType::Float),
        "at_fused: a mask must be (B, N) on the features' device, float64 where a "
        "feature of the pair is and float32 otherwise");
    if (!mask.is_contiguous()) mask = torch::stable::contiguous(mask);
    return mask.const_data_ptr();
  }
};

// Pairs of raw maps (B, N), and the options of their loss.
struct MapLossArguments : LossOptions {
  struct Pair {
    const void* student;
    const void* teacher;
    bool student_fp64, teacher_fp64;
    int64_t B, N;

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
  std::vector<Pair> pairs;

  // Maps that are not contiguous are replaced by copies.
  MapLossArguments(Tensors& student, Tensors& teacher, const std::vector<double>& weights,
                   const std::string& form, const std::string& reduction,
                   const std::string& eps_mode, double eps)
      : LossOptions(student, teacher, weights, form, reduction, eps_mode, eps) {
    for (size_t i = 0; i < student.size(); ++i) {
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
      check_batch(student[i].size(0), student[0].size(0));
      const Pair& pair = pairs.emplace_back(Pair{
          student[i].const_data_ptr(), teacher[i].const_data_ptr(),
          student[i].scalar_type() == ScalarType::Double,
          teacher[i].scalar_type() == ScalarType::Double, student[i].size(0), student[i].size(1)});
      fp64 |= pair.student_fp64 || pair.teacher_fp64;
    }
  }

  Tensor new_loss() const { return LossOptions::new_loss(int64_t(pairs.size()), pairs[0].B); }
};

}  // namespace at_fused
