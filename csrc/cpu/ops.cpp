// The CPU implementations of torch.ops.at_fused.*. Their schemas are in _ops.py.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "features.h"
#include "kernels.h"
#include "tasks.h"

namespace at_fused {
namespace {

void check_exponent(double p) {
  STD_TORCH_CHECK(p >= 1 && std::isfinite(p), "at_fused: p must be a finite number >= 1, got ", p);
}

// ---- attention_map ----------------------------------------------------------------------------

constexpr int64_t kPositionStep = 256;  // a cut through a row keeps runs of at least this length

Tensors attention_map(Tensors tensors, double p, std::string collapse) {
  check_exponent(p);
  const std::vector<Feature> features = native_features(tensors);
  Tensors maps;
  std::vector<Maps> out;
  int64_t total = 0;
  for (size_t i = 0; i < features.size(); ++i) {
    maps.push_back(new_map(features[i]));
    out.emplace_back(maps[i], features[i]);
    total += features[i].B * sample_bytes(features[i]);
  }
  std::vector<Task> tasks;
  for (size_t i = 0; i < features.size(); ++i) {
    cut(tasks, int64_t(i), features[i].B, features[i].N, sample_bytes(features[i]),
        task_bytes(total), kPositionStep);
  }
  run(tasks, total, [&](const Task& task) {
    const Feature& feature = features[task.index];
    const double scale = collapse_scale(collapse, feature);
    for (int64_t b = task.b0; b < task.b1; ++b) {
      kernels().attention_map(feature, b, task.begin, task.end, p, scale, out[task.index].of(b));
    }
  });
  return maps;
}

// ---- at_loss ----------------------------------------------------------------------------------

struct Pair {
  Feature student, teacher;
  double student_collapse, teacher_collapse;
  double weight;
  Maps student_maps, teacher_maps;
  // For samples that are cut: how many of its pieces are still missing.
  std::unique_ptr<std::atomic<int64_t>[]> missing;
  std::unique_ptr<double[]> losses;
};

std::tuple<Tensor, Tensors> at_loss(Tensors student, Tensors teacher, std::vector<double> weights,
                                    double p, std::string collapse, std::string form,
                                    std::string reduction, double eps, bool student_grad,
                                    bool teacher_grad) {
  const size_t n = student.size();
  STD_TORCH_CHECK(n > 0 && teacher.size() == n, "at_fused: as many teachers as students, got ", n,
                  " and ", teacher.size());
  STD_TORCH_CHECK(weights.empty() || weights.size() == n, "at_fused: a weight per pair, got ",
                  weights.size(), " for ", n);
  STD_TORCH_CHECK(form == "code" || form == "paper",
                  "at_fused: form must be 'code' or 'paper', got '", form, "'");
  STD_TORCH_CHECK(reduction == "sum" || reduction == "none",
                  "at_fused: reduction must be 'sum' or 'none', got '", reduction, "'");
  STD_TORCH_CHECK(eps > 0 && std::isfinite(eps), "at_fused: eps must be a finite number > 0, got ",
                  eps);
  check_exponent(p);

  std::vector<Pair> pairs(n);
  Tensors maps, teacher_maps;
  int64_t total = 0;
  bool loss_fp64 = false;
  for (size_t i = 0; i < n; ++i) {
    Pair& pair = pairs[i];
    pair.student = native_feature(student[i]);
    pair.teacher = native_feature(teacher[i]);
    STD_TORCH_CHECK(pair.student.B == pair.teacher.B && pair.student.N == pair.teacher.N,
                    "at_fused: student and teacher of a pair must have the same B and positions");
    pair.student_collapse = collapse_scale(collapse, pair.student);
    pair.teacher_collapse = collapse_scale(collapse, pair.teacher);
    pair.weight = weights.empty() ? 1.0 : weights[i];
    maps.push_back(new_map(pair.student));
    teacher_maps.push_back(new_map(pair.teacher));
    pair.student_maps = Maps(maps.back(), pair.student);
    pair.teacher_maps = Maps(teacher_maps.back(), pair.teacher);
    pair.losses.reset(new double[pair.student.B]);
    total += pair.student.B * (sample_bytes(pair.student) + sample_bytes(pair.teacher));
    loss_fp64 |= accumulates_fp64(pair.student) || accumulates_fp64(pair.teacher);
  }

  std::vector<Task> tasks;
  for (size_t i = 0; i < n; ++i) {
    Pair& pair = pairs[i];
    const size_t before = tasks.size();
    cut(tasks, int64_t(i), pair.student.B, pair.student.N,
        sample_bytes(pair.student) + sample_bytes(pair.teacher), task_bytes(total), kPositionStep);
    if (tasks[before].end == pair.student.N) continue;
    const int64_t pieces = int64_t(tasks.size() - before) / pair.student.B;
    pair.missing.reset(new std::atomic<int64_t>[pair.student.B]);
    for (int64_t b = 0; b < pair.student.B; ++b) pair.missing[b] = pieces;
  }

  run(tasks, total, [&](const Task& task) {
    Pair& pair = pairs[task.index];
    // All of the student's samples, then all of the teacher's: two long runs through memory.
    for (int64_t b = task.b0; b < task.b1; ++b) {
      kernels().attention_map(pair.student, b, task.begin, task.end, p, pair.student_collapse,
                              pair.student_maps.of(b));
    }
    for (int64_t b = task.b0; b < task.b1; ++b) {
      kernels().attention_map(pair.teacher, b, task.begin, task.end, p, pair.teacher_collapse,
                              pair.teacher_maps.of(b));
    }
    for (int64_t b = task.b0; b < task.b1; ++b) {
      // Whoever brings the last piece of a sample finishes it, and must see all the others'.
      if (pair.missing && pair.missing[b].fetch_sub(1, std::memory_order_acq_rel) != 1) continue;
      pair.losses[b] = kernels().sample_loss(
          {pair.student_maps.of(b), pair.teacher_maps.of(b), accumulates_fp64(pair.student),
           accumulates_fp64(pair.teacher), student_grad, teacher_grad, pair.student.B,
           pair.student.N, form == "code" ? Form::code : Form::paper, eps, pair.weight,
           p * pair.student_collapse, p * pair.teacher_collapse});
    }
  });

  // Summed here, in order, so that neither threads nor tasks can change a bit of it.
  std::vector<double> losses;
  for (const Pair& pair : pairs) {
    double sum = 0;
    for (int64_t b = 0; b < pair.student.B; ++b) sum += pair.losses[b];
    if (reduction == "none" || losses.empty()) {
      losses.push_back(sum);
    } else {
      losses[0] += sum;
    }
  }
  const int64_t sizes[] = {int64_t(n)}, strides[] = {1};
  Tensor loss =
      new_tensor(reduction == "none" ? 1 : 0, sizes, strides, accumulate_dtype(loss_fp64));
  for (size_t i = 0; i < losses.size(); ++i) {
    if (loss_fp64) {
      static_cast<double*>(loss.mutable_data_ptr())[i] = losses[i];
    } else {
      static_cast<float*>(loss.mutable_data_ptr())[i] = float(losses[i]);
    }
  }
  // With a gradient to come both sides' maps are kept: k where it is asked for, else the raw map,
  // which a second derivative needs (and which is cheaper to keep than the features).
  for (Tensor& map : teacher_maps) maps.push_back(std::move(map));
  if (!student_grad && !teacher_grad) maps.clear();
  return {std::move(loss), std::move(maps)};
}

// ---- attention_map_backward -------------------------------------------------------------------

// The gradient of each pair's loss, from a scalar (all pairs alike), a vector, or nothing (1).
auto pair_gradients(const std::optional<Tensor>& gradient) {
  std::vector<double> values = {1.0};
  if (gradient) {
    STD_TORCH_CHECK(gradient->is_cpu() && gradient->dim() <= 1,
                    "at_fused: the loss gradient must be a scalar or a vector on the CPU");
    const bool fp64 = gradient->scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(fp64 || gradient->scalar_type() == ScalarType::Float,
                    "at_fused: the loss gradient must be float32 or float64");
    values.resize(gradient->numel());
    const int64_t stride = gradient->dim() == 1 ? gradient->stride(0) : 0;
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = fp64 ? static_cast<const double*>(gradient->const_data_ptr())[i * stride]
                       : static_cast<const float*>(gradient->const_data_ptr())[i * stride];
    }
  }
  const bool same = !gradient || gradient->dim() == 0;
  return [values, same](int64_t pair) {
    STD_TORCH_CHECK(same || (pair >= 0 && size_t(pair) < values.size()), "at_fused: pair number ",
                    pair, " is out of range");
    return values[same ? 0 : pair];
  };
}

Tensors attention_map_backward(Tensors tensors, Tensors coefficients,
                               std::optional<Tensor> loss_gradient, std::vector<int64_t> pairs,
                               double p) {
  const size_t n = tensors.size();
  STD_TORCH_CHECK(coefficients.size() == n, "at_fused: a coefficient map per feature");
  STD_TORCH_CHECK(pairs.size() == n, "at_fused: a pair number per feature");
  check_exponent(p);
  const auto gradient_of = pair_gradients(loss_gradient);

  const Tensors given = tensors;
  std::vector<Feature> features = native_features(tensors);
  Tensors gradients, written;
  std::vector<Feature> out(n);
  std::vector<Maps> k(n);
  std::vector<double> gradient(n);
  int64_t total = 0;
  for (size_t i = 0; i < n; ++i) {
    Feature& feature = features[i];
    Tensor& map = coefficients[i];
    STD_TORCH_CHECK(map.dim() == 2 && map.size(0) == feature.B && map.size(1) == feature.N &&
                        map.is_cpu() && map.scalar_type() == map_dtype(feature),
                    "at_fused: a coefficient map must be (B, N), float64 for float64 features and "
                    "float32 otherwise");
    if (!map.is_contiguous()) map = torch::stable::contiguous(map);
    k[i] = Maps(map, feature);
    gradient[i] = gradient_of(pairs[i]);
    // A feature that was copied to have a layout need not have the strides of `given`.
    gradients.push_back(given[i].get() == tensors[i].get() ? new_like(given[i], feature)
                                                           : torch::stable::empty_like(given[i]));
    written.push_back(gradients[i]);
    // Strides that no layout has (H and W transposed, say) are written through a plain tensor.
    if (!describe(written[i], out[i]) || out[i].layout != feature.layout) {
      tensors[i] = torch::stable::contiguous(tensors[i]);
      written[i] = torch::stable::new_empty(tensors[i], tensors[i].sizes());
      describe(tensors[i], feature);
      describe(written[i], out[i]);
    }
    total += feature.B * sample_bytes(feature);
  }
  std::vector<Task> tasks;
  for (size_t i = 0; i < n; ++i) {
    const Feature& feature = features[i];
    advise_huge_pages(written[i].mutable_data_ptr(), feature.B * sample_bytes(feature));
    cut(tasks, int64_t(i), feature.B, feature.layout == Layout::planar ? feature.C : feature.N,
        sample_bytes(feature), task_bytes(total), 1);
  }
  const bool stream = total > last_level_cache_bytes();
  run(tasks, total, [&](const Task& task) {
    const Feature& feature = features[task.index];
    for (int64_t b = task.b0; b < task.b1; ++b) {
      kernels().attention_map_backward(feature, b, task.begin, task.end, p, gradient[task.index],
                                       k[task.index].of(b), out[task.index], stream);
    }
  });
  for (size_t i = 0; i < n; ++i) {
    if (written[i].get() != gradients[i].get()) torch::stable::copy_(gradients[i], written[i]);
  }
  return gradients;
}

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(at_fused, CPU, m) {
  m.impl("attention_map", TORCH_BOX(&at_fused::attention_map));
  m.impl("at_loss", TORCH_BOX(&at_fused::at_loss));
  m.impl("attention_map_backward", TORCH_BOX(&at_fused::attention_map_backward));
}
