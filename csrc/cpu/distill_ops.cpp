// The CPU implementations of Hinton's loss and of distances. Their schemas are in _ops.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../distill_arguments.h"
#include "kernels.h"
#include "losses.h"
#include "tasks.h"

namespace at_fused {
namespace {

// ---- Hinton's loss ----------------------------------------------------------------------------

// A row's exponentials cost what moving this many of its bytes does.
constexpr int64_t kKdWork = 4;

int64_t label_of(const KdArguments& kd, int64_t b) {
  if (!kd.options.entropy) return kIgnored;
  return class_of(kd.labels[b * kd.label_stride], kd.K, kd.options.ignored);
}

// Rows in tasks; a row is never shared, and its result that of one thread whoever it is.
template <class F>
void run_rows(const KdArguments& kd, const F& f) {
  const int64_t work = kKdWork * kd.bytes();
  std::vector<Task> tasks;
  cut(tasks, 0, kd.B, 1, work / kd.B, task_bytes(work), 1);
  run(tasks, work, [&](const Task& task) {
    for (int64_t b = task.b0; b < task.b1; ++b) {
      f(b, KdRow{kd.student.row(b), kd.teacher.row(b), kd.student.dtype, kd.teacher.dtype, kd.K,
                 label_of(kd, b), &kd.options});
    }
  });
}

Tensor losses_of(const std::vector<double>& values, bool sum, bool fp64, Device device) {
  Tensor losses = new_losses(sum, int64_t(values.size()), fp64, device);
  write_loss(losses, fp64, values);
  return losses;
}

std::tuple<Tensor, Tensor, Tensor> kd_loss(Tensor student, Tensor teacher,
                                           std::optional<Tensor> labels, double temperature,
                                           double alpha, double label_smoothing,
                                           int64_t ignore_index) {
  const KdArguments kd(student, teacher, labels, temperature, alpha, label_smoothing, ignore_index);
  int64_t valid = 0;
  for (int64_t b = 0; b < kd.B; ++b) {
    const int64_t label = label_of(kd, b);
    STD_TORCH_CHECK(label != kWrong, "at_fused: labels must be from 0 to ", kd.K - 1,
                    " or ignore_index (", ignore_index, "), got ", kd.labels[b * kd.label_stride],
                    " in row ", b);
    valid += label >= 0;
  }
  Tensor stats = new_rows(kd.B, kStatistics, aoti_torch_dtype_float64(), kd.device);
  double* rows = static_cast<double*>(stats.mutable_data_ptr());
  run_rows(kd, [&](int64_t b, const KdRow& row) { kernels().kd_row(row, rows + b * kStatistics); });
  double divergence = 0, entropy = 0;
  for (int64_t b = 0; b < kd.B; ++b) {
    divergence += rows[b * kStatistics + kDivergence];
    entropy += rows[b * kStatistics + kEntropy];
  }
  double loss = 0;
  if (kd.options.divergence) {
    loss += divergence * (alpha * temperature * temperature / double(kd.B));
  }
  if (kd.options.entropy) loss += (1 - alpha) * entropy / double(valid);
  return {losses_of({loss}, true, kd.fp64, kd.device), stats,
          losses_of({double(valid)}, true, true, kd.device)};
}

Tensors kd_loss_backward(Tensor student, Tensor teacher, std::optional<Tensor> labels, Tensor stats,
                         Tensor valid, Tensor gradient, double temperature, double alpha,
                         double label_smoothing, int64_t ignore_index, bool student_grad,
                         bool teacher_grad) {
  std::optional<LogitsGradient> to_student, to_teacher;
  if (student_grad) to_student.emplace(student);
  if (teacher_grad) to_teacher.emplace(teacher);
  const KdArguments kd(student, teacher, labels, temperature, alpha, label_smoothing, ignore_index);
  const KdBackward backward(stats, valid, gradient, kd);
  const double g = backward.gradient_fp64 ? *static_cast<const double*>(backward.gradient)
                                          : *static_cast<const float*>(backward.gradient);
  const double divergence = g * alpha * temperature / double(kd.B);
  const double entropy = g * (1 - alpha) / std::max(1.0, *backward.valid);
  const auto place = [&](std::optional<LogitsGradient>& to, Dtype dtype) {
    if (!to) return Logits{nullptr, dtype, 0};
    void* data = to->written.mutable_data_ptr();
    advise_huge_pages(data, kd.B * kd.K * element_size(dtype));
    return Logits{data, dtype, to->written.stride(0)};
  };
  const Logits out_student = place(to_student, kd.student.dtype);
  const Logits out_teacher = place(to_teacher, kd.teacher.dtype);
  run_rows(kd, [&](int64_t b, const KdRow& row) {
    kernels().kd_row_backward(
        row, backward.stats + b * kStatistics,
        {student_grad ? const_cast<void*>(out_student.row(b)) : nullptr,
         teacher_grad ? const_cast<void*>(out_teacher.row(b)) : nullptr, divergence, entropy});
  });
  Tensors gradients;
  if (to_student) gradients.push_back(to_student->finish());
  if (to_teacher) gradients.push_back(to_teacher->finish());
  return gradients;
}

// ---- distances ------------------------------------------------------------------------

// Elements that are summed as one, whoever does it: results do not depend on the threads.
constexpr int64_t kPiece = 16384;

int64_t pieces_of(const DistanceArguments::Pair& pair) { return (pair.M + kPiece - 1) / kPiece; }

// f(pair number, b, piece, its first element, their number) for every piece of every sample.
template <class F>
void run_pieces(const DistanceArguments& arguments, const F& f) {
  std::vector<Task> tasks;
  for (size_t i = 0; i < arguments.pairs.size(); ++i) {
    const DistanceArguments::Pair& pair = arguments.pairs[i];
    cut(tasks, int64_t(i), arguments.B, pieces_of(pair), pair.bytes(), task_bytes(arguments.bytes),
        1);
  }
  run(tasks, arguments.bytes, [&](const Task& task) {
    const int64_t M = arguments.pairs[size_t(task.index)].M;
    for (int64_t b = task.b0; b < task.b1; ++b) {
      for (int64_t piece = task.begin; piece < task.end; ++piece) {
        const int64_t at = piece * kPiece;
        f(size_t(task.index), b, piece, at, std::min(kPiece, M - at));
      }
    }
  });
}

std::tuple<Tensor, Tensor> distance_loss(Tensors student, Tensors teacher,
                                         std::vector<double> weights, bool root,
                                         std::string reduction) {
  const DistanceArguments arguments(student, teacher);
  const int64_t count = int64_t(arguments.pairs.size()), B = arguments.B;
  const DistanceOptions options(weights, count, B, root, reduction);
  std::vector<std::vector<double>> sums;
  for (const DistanceArguments::Pair& pair : arguments.pairs) {
    sums.emplace_back(size_t(B * pieces_of(pair)));
  }
  run_pieces(arguments, [&](size_t i, int64_t b, int64_t piece, int64_t at, int64_t n) {
    const DistanceArguments::Pair& pair = arguments.pairs[i];
    sums[i][size_t(b * pieces_of(pair) + piece)] = kernels().squared_distance(
        pair.a.at(b, at), pair.a.dtype, pair.b.at(b, at), pair.b.dtype, n);
  });
  Tensor squares = new_rows(count, B, aoti_torch_dtype_float64(), arguments.device);
  double* to = static_cast<double*>(squares.mutable_data_ptr());
  std::vector<double> losses(options.sum ? 1 : size_t(count));
  for (size_t i = 0; i < sums.size(); ++i) {
    const size_t pieces = sums[i].size() / size_t(B);
    double loss = 0;
    for (size_t b = 0; b < size_t(B); ++b) {
      double total = 0;
      for (size_t piece = 0; piece < pieces; ++piece) total += sums[i][b * pieces + piece];
      *to++ = total;
      loss += root ? std::sqrt(total) : total;
    }
    losses[options.sum ? 0 : i] += options.weights[i] * loss;
  }
  return {losses_of(losses, options.sum, arguments.fp64, arguments.device), std::move(squares)};
}

Tensors distance_loss_backward(Tensors a, Tensors b, Tensor squares, Tensor gradient,
                               std::vector<int64_t> pairs, std::vector<double> weights, bool root,
                               std::string reduction) {
  DistanceGradients gradients(a);
  const DistanceArguments arguments(a, b, &gradients);
  const DistanceBackward backward(squares, gradient, pairs, weights, root, reduction, arguments);
  std::vector<Samples> out;
  std::vector<double> above;
  for (size_t i = 0; i < a.size(); ++i) {
    Tensor& written = gradients.written[i];
    out.push_back({written.mutable_data_ptr(), arguments.pairs[i].a.dtype, written.stride(0)});
    advise_huge_pages(written.mutable_data_ptr(), written.numel() * element_size(out.back().dtype));
    above.push_back(value_of(backward.gradient, pairs[i]) *
                    backward.options.weights[size_t(pairs[i])]);
  }
  run_pieces(arguments, [&](size_t i, int64_t b, int64_t, int64_t at, int64_t n) {
    const DistanceArguments::Pair& pair = arguments.pairs[i];
    const double slope = distance_slope(backward.squares[pairs[i] * arguments.B + b], root);
    kernels().squared_distance_backward(pair.a.at(b, at), pair.a.dtype, pair.b.at(b, at),
                                        pair.b.dtype, n, above[i] * slope,
                                        const_cast<void*>(out[i].at(b, at)));
  });
  return gradients.finish();
}

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(at_fused, CPU, m) {
  m.impl("kd_loss", TORCH_BOX(&at_fused::kd_loss));
  m.impl("kd_loss_backward", TORCH_BOX(&at_fused::kd_loss_backward));
  m.impl("distance_loss", TORCH_BOX(&at_fused::distance_loss));
  m.impl("distance_loss_backward", TORCH_BOX(&at_fused::distance_loss_backward));
}
