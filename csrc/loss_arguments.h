// The arguments of the operators for losses of features and of maps, checked, for every device.
#pragma once

#include <cmath>
#include <numeric>
#include <string>
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

inline void check_eps(double eps) {
  STD_TORCH_CHECK(eps > 0 && std::isfinite(eps), "at_fused: eps must be a finite number > 0, got ",
                  eps);
}

// How many there are.
inline size_t check_pairs(const Tensors& student, const Tensors& teacher,
                          const std::vector<double>& weights) {
  const size_t n = student.size();
  STD_TORCH_CHECK(n > 0 && teacher.size() == n, "at_fused: as many teachers as students, got ", n,
                  " and ", teacher.size());
  check_weights(weights, n);
  return n;
}

// The pairs of a loss and its options.
struct LossArguments {
  struct Pair {
    Feature student, teacher;
    double student_scale, teacher_scale;
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
    const size_t n = check_pairs(student, teacher, weights);
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
      pair.student_scale = collapse_scale(collapsed, pair.student);
      pair.teacher_scale = collapse_scale(collapsed, pair.teacher);
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
    const size_t n = check_pairs(student, teacher, weights);
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

}  // namespace at_fused
