// The CUDA implementations of torch.ops.at_fused.kd_loss*: as map_ops.cpp.

#include <optional>
#include <tuple>

#include "../box.h"
#include "../kd_arguments.h"
#include "checks.h"
#include "device.h"
#include "launch.h"

namespace at_fused {
namespace {

bool aligned_rows(const Logits& x) { return !x.data || aligned_rows(x.data, x.dtype, x.stride); }

// Rows are a warp's where they are short, or long enough and so many that all have work.
KdParams kd_params(const KdArguments& kd, const Limits& limits) {
  STD_TORCH_CHECK(kd.B <= kMaxExtent, "at_fused: at most 2^30 rows, got ", kd.B);
  KdParams params{};
  params.student = kd.student;
  params.teacher = kd.teacher;
  params.labels = kd.labels;
  params.label_stride = kd.label_stride;
  params.K = kd.K;
  params.B = int32_t(kd.B);
  const bool many = kd.B >= 2 * int64_t(limits.multiprocessors) * (kThreads / 32);
  params.group = kd.K <= 256 || (kd.K <= 2048 && many) ? 32 : kThreads;
  params.options = kd.options;
  return params;
}

Launch kd_launch(KdParams& params, bool fp64, void* stream) {
  params.vector = params.K % kTurnElements == 0 && aligned_rows(params.student) &&
                  aligned_rows(params.teacher) && aligned_rows(params.student_gradient) &&
                  aligned_rows(params.teacher_gradient);
  return {check_blocks(divide_up(params.B, kThreads / params.group)), kKdBytes, fp64, stream};
}

std::tuple<Tensor, Tensor, Tensor> kd_loss(Tensor student, Tensor teacher,
                                           std::optional<Tensor> labels, double temperature,
                                           double alpha, double label_smoothing,
                                           int64_t ignore_index) {
  const KdArguments kd(student, teacher, labels, temperature, alpha, label_smoothing, ignore_index);
  const OnDevice scope(kd.device);
  const Counters counters(kd.device, scope.stream(), 1);
  Tensor loss = new_losses(true, 1, kd.fp64, kd.device);
  Tensor valid = new_losses(true, 1, true, kd.device);
  Tensor stats = new_rows(kd.B, kStatistics, aoti_torch_dtype_float64(), kd.device);
  KdParams params = kd_params(kd, limits_of(kd.device));
  params.stats = static_cast<double*>(stats.mutable_data_ptr());
  params.valid = static_cast<double*>(valid.mutable_data_ptr());
  params.loss = loss.mutable_data_ptr();
  params.loss_fp64 = kd.fp64;
  params.finished = counters.data();
  launch_kd_loss(params, kd_launch(params, kd.fp64, scope.stream()));
  return {std::move(loss), std::move(stats), std::move(valid)};
}

Tensors kd_loss_backward(Tensor student, Tensor teacher, std::optional<Tensor> labels, Tensor stats,
                         Tensor valid, Tensor gradient, double temperature, double alpha,
                         double label_smoothing, int64_t ignore_index, bool student_grad,
                         bool teacher_grad) {
  if (!student_grad && !teacher_grad) return {};
  const OnDevice scope(device_of(student));
  KdGradients gradients(student, student_grad, teacher, teacher_grad);
  const KdArguments kd(student, teacher, labels, temperature, alpha, label_smoothing, ignore_index);
  const KdBackward backward(stats, valid, gradient, kd);
  KdParams params = kd_params(kd, limits_of(kd.device));
  params.stats = const_cast<double*>(backward.stats);
  params.valid = const_cast<double*>(backward.valid);
  params.gradient = backward.gradient.of(0);
  params.gradient_fp64 = backward.gradient.fp64;
  params.student_gradient = gradients.student;
  params.teacher_gradient = gradients.teacher;
  launch_kd_loss_backward(params, kd_launch(params, kd.fp64, scope.stream()));
  return gradients.finish();
}

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(AT_FUSED_NAMESPACE, AT_FUSED_DEVICE_KEY, m) {
  m.impl("kd_loss", AT_FUSED_BOX(kd_loss));
  m.impl("kd_loss_backward", AT_FUSED_BOX(kd_loss_backward));
}
