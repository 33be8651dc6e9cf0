// The CPU implementations of the losses among torch.ops.at_fused.*. Their schemas are in _ops.

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../box.h"
#include "../loss_arguments.h"
#include "kernels.h"
#include "losses.h"
#include "tasks.h"

namespace at_fused {
namespace {

// ---- at_loss ----------------------------------------------------------------------------------

// A pair at work: its maps, and what becomes of its samples.
struct Pair : LossArguments::Pair {
  Maps student_maps, teacher_maps;
  // For samples that are cut: how many of its pieces are still missing.
  std::unique_ptr<std::atomic<int64_t>[]> missing;
  std::unique_ptr<double[]> losses;

  explicit Pair(const LossArguments::Pair& pair)
      : LossArguments::Pair(pair), losses(new double[pair.student.B]) {}
  int64_t bytes() const { return sample_bytes(student) + sample_bytes(teacher); }
};

// Tasks over positions for a list of pairs, and the countdowns of samples that are cut.
std::vector<Task> cut_pairs(std::vector<Pair>& pairs, int64_t total) {
  std::vector<Task> tasks;
  for (size_t i = 0; i < pairs.size(); ++i) {
    Pair& pair = pairs[i];
    const size_t before = tasks.size();
    cut(tasks, int64_t(i), pair.student.B, pair.student.N, pair.bytes(), task_bytes(total),
        kPositionStep);
    if (tasks[before].end == pair.student.N) continue;
    const int64_t pieces = int64_t(tasks.size() - before) / pair.student.B;
    pair.missing.reset(new std::atomic<int64_t>[pair.student.B]);
    for (int64_t b = 0; b < pair.student.B; ++b) pair.missing[b] = pieces;
  }
  return tasks;
}

// The maps of a task's samples, student's and teacher's.
void map_samples(const Pair& pair, const Task& task, int64_t b0, int64_t b1, double p) {
  // Two long runs through memory, the student's last: the backward pass reads it again.
  for (int64_t b = b0; b < b1; ++b) {
    kernels().attention_map(pair.teacher, b, task.begin, task.end, p, pair.teacher_scale,
                            pair.teacher_maps.of(b));
  }
  for (int64_t b = b0; b < b1; ++b) {
    kernels().attention_map(pair.student, b, task.begin, task.end, p, pair.student_scale,
                            pair.student_maps.of(b));
  }
}

// Multiplies a map, or its coefficients, by the sample's mask.
void apply_mask(const Pair& pair, int64_t b, bool map_fp64, void* map) {
  const void* mask = pair.mask_of(b);
  if (!mask) return;
  const auto multiply = [&](auto* values, const auto* factors) {
    for (int64_t n = 0; n < pair.student.N; ++n) values[n] *= factors[n];
  };
  if (map_fp64) {
    multiply(static_cast<double*>(map), static_cast<const double*>(mask));
  } else if (pair.fp64()) {
    multiply(static_cast<float*>(map), static_cast<const double*>(mask));
  } else {
    multiply(static_cast<float*>(map), static_cast<const float*>(mask));
  }
}

// Computes a sample's loss and coefficient maps, once all pieces of its maps are there.
void finish_sample(Pair& pair, int64_t b, const LossArguments& loss, double weight,
                   bool student_grad, bool teacher_grad) {
  // Whoever brings the last piece of a sample finishes it, and must see all the others'.
  if (pair.missing && pair.missing[b].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  const bool student_fp64 = accumulates_fp64(pair.student);
  const bool teacher_fp64 = accumulates_fp64(pair.teacher);
  void* student = pair.student_maps.of(b);
  void* teacher = pair.teacher_maps.of(b);
  apply_mask(pair, b, student_fp64, student);
  apply_mask(pair, b, teacher_fp64, teacher);
  pair.losses[b] = kernels().sample_loss(
      {student, teacher, student_grad ? student : nullptr, teacher_grad ? teacher : nullptr,
       student_fp64, teacher_fp64, pair.student.N, loss.form, loss.eps_mode, loss.eps, weight,
       loss.p * pair.student_scale, loss.p * pair.teacher_scale});
  if (student_grad) apply_mask(pair, b, student_fp64, student);
  if (teacher_grad) apply_mask(pair, b, teacher_fp64, teacher);
}

int64_t batch_of(const LossArguments::Pair& pair) { return pair.student.B; }
int64_t batch_of(const MapLossArguments::Pair& pair) { return pair.B; }

// Writes the losses of samples, one row per pair, reduced as asked for: added in order, so that
// neither threads nor tasks can change a bit.
template <class Pairs, class F>
void write_losses(Tensor& loss, const LossOptions& options, const Pairs& pairs, F losses_of) {
  std::vector<double> losses;
  for (size_t i = 0; i < pairs.size(); ++i) {
    const double* of_samples = losses_of(i);
    if (options.reduction == Reduction::sample) {
      losses.insert(losses.end(), of_samples, of_samples + batch_of(pairs[i]));
      continue;
    }
    double of_pair = 0;
    for (int64_t b = 0; b < batch_of(pairs[i]); ++b) of_pair += of_samples[b];
    if (options.reduction == Reduction::none || losses.empty()) {
      losses.push_back(of_pair);
    } else {
      losses[0] += of_pair;
    }
  }
  write_loss(loss, options.fp64, losses);
}

Tensor total_loss(const LossArguments& arguments, const std::vector<Pair>& pairs) {
  Tensor loss = arguments.new_loss();
  write_losses(loss, arguments, pairs, [&](size_t i) { return pairs[i].losses.get(); });
  return loss;
}

// Pairs with new maps; `total` gets the bytes that will be read.
std::vector<Pair> begin_pairs(const LossArguments& arguments, Tensors& student_maps,
                              Tensors& teacher_maps, int64_t& total) {
  std::vector<Pair> pairs;
  for (const LossArguments::Pair& given : arguments.pairs) {
    Pair& pair = pairs.emplace_back(given);
    student_maps.push_back(new_map(pair.student, arguments.device));
    teacher_maps.push_back(new_map(pair.teacher, arguments.device));
    pair.student_maps = Maps(student_maps.back(), pair.student);
    pair.teacher_maps = Maps(teacher_maps.back(), pair.teacher);
    total += pair.student.B * pair.bytes();
  }
  return pairs;
}

std::tuple<Tensor, Tensors> at_loss(Tensors student, Tensors teacher, Tensors masks,
                                    std::vector<double> weights, std::vector<int64_t> skip_tokens,
                                    double p, std::string collapse, std::string form,
                                    std::string reduction, std::string eps_mode, double eps,
                                    bool student_grad, bool teacher_grad) {
  const LossArguments arguments(student, teacher, masks, weights, skip_tokens, p, collapse, form,
                                reduction, eps_mode, eps);
  Tensors maps, teacher_maps;
  int64_t total = 0;
  std::vector<Pair> pairs = begin_pairs(arguments, maps, teacher_maps, total);
  run(cut_pairs(pairs, total), total, [&](const Task& task) {
    Pair& pair = pairs[task.index];
    map_samples(pair, task, task.b0, task.b1, p);
    const double weight = arguments.sample_weight(size_t(task.index), pair.student.B);
    for (int64_t b = task.b0; b < task.b1; ++b) {
      finish_sample(pair, b, arguments, weight, student_grad, teacher_grad);
    }
  });
  // With a gradient to come both sides' maps are kept: k where it is asked for, else the masked raw
  // map, which a second derivative needs (and which is cheaper to keep than the features).
  for (Tensor& map : teacher_maps) maps.push_back(std::move(map));
  if (!student_grad && !teacher_grad) maps.clear();
  return {total_loss(arguments, pairs), std::move(maps)};
}

// ---- at_value_and_grad ------------------------------------------------------------------------

std::tuple<Tensor, Tensors> at_value_and_grad(Tensors student, Tensors teacher, Tensors masks,
                                              std::vector<double> weights,
                                              std::vector<int64_t> skip_tokens, double p,
                                              std::string collapse, std::string form,
                                              std::string reduction, std::string eps_mode,
                                              double eps, double scale,
                                              std::optional<Tensor> loss_gradient) {
  const size_t n = student.size();
  // First: it settles in which layout a student is read.
  Gradients gradients(student, skip_of_students(skip_tokens, n));
  const LossArguments arguments(student, teacher, masks, weights, skip_tokens, p, collapse, form,
                                reduction, eps_mode, eps);
  const LossGradient gradient(loss_gradient, arguments.numbers(), student);
  Tensors student_maps, teacher_maps;
  int64_t total = 0, student_total = 0;
  std::vector<Pair> pairs = begin_pairs(arguments, student_maps, teacher_maps, total);
  for (size_t i = 0; i < n; ++i) {
    const int64_t bytes = batch_of(pairs[i]) * sample_bytes(pairs[i].student);
    advise_huge_pages(gradients.written[i].mutable_data_ptr(), bytes);
    student_total += bytes;
  }
  const bool stream = writes_past_caches(student_total);
  const auto sweep = [&](const Task& task, int64_t b, int64_t begin, int64_t end) {
    kernels().attention_map_backward(
        gradients.features[task.index], b, begin, end, p, scale * value_of(gradient, task.index, b),
        pairs[task.index].student_maps.of(b), gradients.out[task.index], stream);
  };
  run(cut_pairs(pairs, total), total, [&](const Task& task) {
    Pair& pair = pairs[task.index];
    const double weight = arguments.sample_weight(size_t(task.index), pair.student.B);
    if (pair.missing) {
      map_samples(pair, task, task.b0, task.b1, p);
      finish_sample(pair, task.b0, arguments, weight, true, false);
      return;
    }
    // Sample by sample: the student's is read again while it is in the second-level cache.
    for (int64_t b = task.b0; b < task.b1; ++b) {
      map_samples(pair, task, b, b + 1, p);
      finish_sample(pair, b, arguments, weight, true, false);
      sweep(task, b, 0, lines(pair.student));
    }
  });
  // A sample that was cut is too large for that cache: all threads share its gradient.
  std::vector<Task> rest;
  for (size_t i = 0; i < n; ++i) {
    if (!pairs[i].missing) continue;
    const Feature& feature = pairs[i].student;
    cut(rest, int64_t(i), feature.B, lines(feature), sample_bytes(feature),
        task_bytes(student_total), 1);
  }
  run(rest, student_total, [&](const Task& task) {
    for (int64_t b = task.b0; b < task.b1; ++b) sweep(task, b, task.begin, task.end);
  });
  return {total_loss(arguments, pairs), gradients.finish()};
}

// ---- map_loss ---------------------------------------------------------------------------------

std::tuple<Tensor, Tensors> map_loss(Tensors student, Tensors teacher, std::vector<double> weights,
                                     std::string form, std::string reduction, std::string eps_mode,
                                     double eps, bool student_grad, bool teacher_grad) {
  const MapLossArguments arguments(student, teacher, weights, form, reduction, eps_mode, eps);
  const size_t n = arguments.pairs.size();
  Tensors found;
  std::vector<Maps> student_maps(n), teacher_maps(n);
  std::vector<Task> tasks;
  int64_t total = 0, samples = 0;
  std::vector<int64_t> first_sample;
  for (const MapLossArguments::Pair& pair : arguments.pairs) total += pair.B * pair.bytes();
  for (size_t i = 0; i < n; ++i) {
    const MapLossArguments::Pair& pair = arguments.pairs[i];
    first_sample.push_back(samples);
    samples += pair.B;
    cut(tasks, int64_t(i), pair.B, 1, pair.bytes(), task_bytes(total), 1);
  }
  const auto new_maps = [&](std::vector<Maps>& maps, bool MapLossArguments::Pair::* wide) {
    for (size_t i = 0; i < n; ++i) {
      const MapLossArguments::Pair& pair = arguments.pairs[i];
      found.push_back(new_rows(pair.B, pair.N, accumulate_dtype(pair.*wide), arguments.device));
      maps[i] = Maps(found.back(), pair.N, accumulate_size(pair.*wide));
    }
  };
  if (student_grad) new_maps(student_maps, &MapLossArguments::Pair::student_fp64);
  if (teacher_grad) new_maps(teacher_maps, &MapLossArguments::Pair::teacher_fp64);
  std::vector<double> losses(samples);
  run(tasks, total, [&](const Task& task) {
    const MapLossArguments::Pair& pair = arguments.pairs[task.index];
    const double weight = arguments.sample_weight(size_t(task.index), pair.B);
    for (int64_t b = task.b0; b < task.b1; ++b) {
      losses[first_sample[task.index] + b] = kernels().sample_loss(
          {pair.student_of(b), pair.teacher_of(b), student_maps[task.index].of(b),
           teacher_maps[task.index].of(b), pair.student_fp64, pair.teacher_fp64, pair.N,
           arguments.form, arguments.eps_mode, arguments.eps, weight, 1.0, 1.0});
    }
  });
  Tensor loss = arguments.new_loss();
  write_losses(loss, arguments, arguments.pairs,
               [&](size_t i) { return losses.data() + first_sample[i]; });
  return {std::move(loss), std::move(found)};
}

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(at_fused, CPU, m) {
  m.impl("at_loss", AT_FUSED_BOX(at_loss));
  m.impl("at_value_and_grad", AT_FUSED_BOX(at_value_and_grad));
  m.impl("map_loss", AT_FUSED_BOX(map_loss));
}
