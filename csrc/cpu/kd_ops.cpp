// The CPU implementations of torch.ops.at_fused.kd_loss*. Their schemas are in _ops.

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../box.h"
#include "../kd_arguments.h"
#include "kernels.h"
#include "losses.h"
#include "tasks.h"

namespace at_fused {
namespace {

// A row's exponentials cost what moving this many of its bytes does.
constexpr int64_t kKdWork = 4;

int64_t label_of(const KdArguments& kd, int64_t b) {
  if (!kd.options.entropy) return kIgnored;
  return class_of(kd.labels[b * kd.label_stride], kd.K, kd.options.ignore_index);
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
  KdGradients gradients(student, student_grad, teacher, teacher_grad);
  for (const Tensor& to : gradients.written) {
    advise_huge_pages(to.mutable_data_ptr(), to.numel() * to.element_size());
  }
  const KdArguments kd(student, teacher, labels, temperature, alpha, label_smoothing, ignore_index);
  const KdBackward backward(stats, valid, gradient, kd);
  const double g = value_of(backward.gradient, 0);
  const double divergence = g * alpha * temperature / double(kd.B);
  const double entropy = g * (1 - alpha) / std::max(1.0, *backward.valid);
  run_rows(kd, [&](int64_t b, const KdRow& row) {
    const auto row_of = [b](const Logits& to) {
      return to.data ? const_cast<void*>(to.row(b)) : nullptr;
    };
    kernels().kd_row_backward(
        row, backward.stats + b * kStatistics,
        {row_of(gradients.student), row_of(gradients.teacher), divergence, entropy});
  });
  return gradients.finish();
}

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(at_fused, CPU, m) {
  m.impl("kd_loss", AT_FUSED_BOX(kd_loss));
  m.impl("kd_loss_backward", AT_FUSED_BOX(kd_loss_backward));
}
