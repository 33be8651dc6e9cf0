// The arguments of the operators for Hinton's loss, checked, for every device.
#pragma once

#include <cmath>
#include <optional>

#include "arguments.h"
#include "kd.h"

namespace at_fused {

struct KdArguments {
  Device device;
  Logits student, teacher;
  int64_t B, K;
  bool fp64;  // of the loss
  KdOptions options;
  const int64_t* labels = nullptr;
  int64_t label_stride = 0;

  // Logits whose classes are not adjacent are replaced by copies.
  KdArguments(Tensor& student_logits, Tensor& teacher_logits, std::optional<Tensor>& label_tensor,
              double temperature, double alpha, double label_smoothing, int64_t ignore_index)
      : device(device_of(student_logits)) {
    STD_TORCH_CHECK(student_logits.dim() == 2 && teacher_logits.dim() == 2 &&
                        student_logits.size(0) == teacher_logits.size(0) &&
                        student_logits.size(1) == teacher_logits.size(1) &&
                        student_logits.numel() > 0,
                    "at_fused: logits must be (B, K), not empty, and both of the same shape");
    STD_TORCH_CHECK(device_of(teacher_logits) == device,
                    "at_fused: all logits must be on the same device");
    STD_TORCH_CHECK(temperature > 0 && std::isfinite(temperature),
                    "at_fused: temperature must be a finite number > 0, got ", temperature);
    STD_TORCH_CHECK(alpha >= 0 && alpha <= 1, "at_fused: alpha must be from 0 to 1, got ", alpha);
    STD_TORCH_CHECK(label_smoothing >= 0 && label_smoothing < 1,
                    "at_fused: label_smoothing must be >= 0 and < 1, got ", label_smoothing);
    check_count(student_logits);
    B = student_logits.size(0);
    K = student_logits.size(1);
    student = logits_of(student_logits);
    teacher = logits_of(teacher_logits);
    fp64 = student.dtype == Dtype::float64 || teacher.dtype == Dtype::float64;
    options = {temperature,  alpha,     label_smoothing,
               ignore_index, alpha > 0, label_tensor && alpha < 1};
    if (!label_tensor) return;
    STD_TORCH_CHECK(label_tensor->dim() == 1 && label_tensor->size(0) == B &&
                        label_tensor->scalar_type() == ScalarType::Long &&
                        device_of(*label_tensor) == device,
                    "at_fused: labels must be (B,) of int64, on the logits' device");
    labels = static_cast<const int64_t*>(label_tensor->const_data_ptr());
    label_stride = label_tensor->stride(0);
  }

  int64_t bytes() const {
    return B * K * (element_size(student.dtype) + element_size(teacher.dtype));
  }

 private:
  Logits logits_of(Tensor& tensor) const {
    if (K > 1 && tensor.stride(1) != 1) tensor = torch::stable::contiguous(tensor);
    return {tensor.const_data_ptr(), dtype_of(tensor), tensor.stride(0)};
  }
};

// The statistics that the forward pass left, and the gradient from above.
struct KdBackward {
  const double* stats;
  const double* valid;
  LossGradient gradient;

  KdBackward(Tensor& stats_tensor, const Tensor& valid_tensor, const Tensor& gradient_tensor,
             const KdArguments& kd)
      : gradient(gradient_tensor, {}, kd.device) {
    STD_TORCH_CHECK(stats_tensor.dim() == 2 && stats_tensor.size(0) == kd.B &&
                        stats_tensor.size(1) == kStatistics &&
                        stats_tensor.scalar_type() == ScalarType::Double &&
                        device_of(stats_tensor) == kd.device,
                    "at_fused: stats must be what kd_loss returned");
    STD_TORCH_CHECK(valid_tensor.numel() == 1 && valid_tensor.scalar_type() == ScalarType::Double &&
                        device_of(valid_tensor) == kd.device,
                    "at_fused: valid must be what kd_loss returned");
    STD_TORCH_CHECK(gradient_tensor.numel() == 1, "at_fused: the gradient must be a scalar");
    stats_tensor = torch::stable::contiguous(stats_tensor);
    stats = static_cast<const double*>(stats_tensor.const_data_ptr());
    valid = static_cast<const double*>(valid_tensor.const_data_ptr());
  }
};

// New gradients for the logits that want one, with adjacent classes.
class KdGradients : public Results {
 public:
  Logits student{}, teacher{};  // where they are written; data null: not wanted

  // Before KdArguments, which may replace the logits.
  KdGradients(const Tensor& student_logits, bool student_grad, const Tensor& teacher_logits,
              bool teacher_grad) {
    if (student_grad) student = add(student_logits);
    if (teacher_grad) teacher = add(teacher_logits);
  }

 private:
  Logits add(const Tensor& given) {
    results_.push_back(torch::stable::empty_like(given));
    const bool adjacent = given.size(1) <= 1 || results_.back().stride(1) == 1;
    written.push_back(adjacent ? results_.back() : torch::stable::new_empty(given, given.sizes()));
    return {written.back().mutable_data_ptr(), dtype_of(given), written.back().stride(0)};
  }
};

}  // namespace at_fused
