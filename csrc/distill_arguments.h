// The arguments of the operators for Hinton's loss and squared distances, checked.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "distill.h"

namespace at_fused {

// ---- Hinton's loss ----------------------------------------------------------------------------

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
              double temperature, double alpha, double smoothing, int64_t ignored)
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
    STD_TORCH_CHECK(smoothing >= 0 && smoothing < 1,
                    "at_fused: label_smoothing must be >= 0 and < 1, got ", smoothing);
    check_count(student_logits);
    B = student_logits.size(0);
    K = student_logits.size(1);
    student = logits_of(student_logits);
    teacher = logits_of(teacher_logits);
    fp64 = student.dtype == Dtype::float64 || teacher.dtype == Dtype::float64;
    options = {temperature, alpha, smoothing, ignored, alpha > 0, label_tensor && alpha < 1};
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
  const void* gradient;
  bool gradient_fp64;

  KdBackward(Tensor& stats_tensor, const Tensor& valid_tensor, const Tensor& gradient_tensor,
             const KdArguments& kd) {
    STD_TORCH_CHECK(stats_tensor.dim() == 2 && stats_tensor.size(0) == kd.B &&
                        stats_tensor.size(1) == kStatistics &&
                        stats_tensor.scalar_type() == ScalarType::Double &&
                        device_of(stats_tensor) == kd.device,
                    "at_fused: stats must be what kd_loss returned");
    STD_TORCH_CHECK(valid_tensor.numel() == 1 && valid_tensor.scalar_type() == ScalarType::Double &&
                        device_of(valid_tensor) == kd.device,
                    "at_fused: valid must be what kd_loss returned");
    gradient_fp64 = gradient_tensor.scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(
        gradient_tensor.numel() == 1 && device_of(gradient_tensor) == kd.device &&
            (gradient_fp64 || gradient_tensor.scalar_type() == ScalarType::Float),
        "at_fused: the gradient must be a scalar, float32 or float64, on the logits' device");
    stats_tensor = torch::stable::contiguous(stats_tensor);
    stats = static_cast<const double*>(stats_tensor.const_data_ptr());
    valid = static_cast<const double*>(valid_tensor.const_data_ptr());
    gradient = gradient_tensor.const_data_ptr();
  }
};

// A new tensor with the strides of torch.empty_like(given), and one of adjacent classes to write.
struct LogitsGradient {
  Tensor result, written;

  explicit LogitsGradient(const Tensor& given)
      : result(torch::stable::empty_like(given)), written(result) {
    if (result.size(1) > 1 && result.stride(1) != 1) {
      written = torch::stable::new_empty(given, given.sizes());
    }
  }
  Tensor finish() {
    if (written.get() != result.get()) torch::stable::copy_(result, written);
    return std::move(result);
  }
};

// ---- squared distances ------------------------------------------------------------------------

// A tensor as B samples of M adjacent elements, in whatever order these are.
struct Samples {
  const void* data;
  Dtype dtype;
  int64_t stride;  // from sample to sample, in elements

  const void* at(int64_t b, int64_t m) const {
    return static_cast<const char*>(data) + (b * stride + m) * element_size(dtype);
  }
};

// Whether a sample's elements are adjacent in some order of its dimensions.
inline bool dense_samples(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> extents;  // stride, size
  for (int64_t d = 1; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) extents.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(extents.begin(), extents.end());
  int64_t next = 1;
  for (const auto& [stride, size] : extents) {
    if (stride != next) return false;
    next *= size;
  }
  return true;
}

// Whether both have a sample's elements in the same order.
inline bool same_order(const Tensor& a, const Tensor& b) {
  for (int64_t d = 1; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// New gradients for the first tensors of pairs.
class DistanceGradients {
 public:
  Tensors written;

  explicit DistanceGradients(const Tensors& a) {
    for (const Tensor& x : a) written.push_back(torch::stable::empty_like(x));
    results_ = written;
  }
  // The gradients with the strides of torch.empty_like.
  Tensors finish() {
    for (size_t i = 0; i < results_.size(); ++i) {
      if (written[i].get() != results_[i].get()) torch::stable::copy_(results_[i], written[i]);
    }
    return std::move(results_);
  }

 private:
  Tensors results_;
};

struct DistanceArguments {
  struct Pair {
    Samples a, b;
    int64_t M;
    bool fp64() const { return a.dtype == Dtype::float64 || b.dtype == Dtype::float64; }
    int64_t bytes() const { return M * (element_size(a.dtype) + element_size(b.dtype)); }
  };
  Device device;
  int64_t B;
  std::vector<Pair> pairs;
  int64_t bytes = 0;
  bool fp64 = false;  // the loss's dtype

  // Tensors whose elements lie in different orders are replaced by copies, also the one that will
  // be written.
  DistanceArguments(Tensors& a, Tensors& b, DistanceGradients* out = nullptr) {
    STD_TORCH_CHECK(!a.empty() && a.size() == b.size(),
                    "at_fused: as many tensors on both sides, got ", a.size(), " and ", b.size());
    device = device_of(a[0]);
    STD_TORCH_CHECK(a[0].dim() >= 1, "at_fused: tensors must have a batch dimension");
    B = a[0].size(0);
    for (size_t i = 0; i < a.size(); ++i) {
      STD_TORCH_CHECK(a[i].sizes().equals(b[i].sizes()),
                      "at_fused: the tensors of a pair must have the same shape");
      STD_TORCH_CHECK(a[i].dim() >= 1 && a[i].size(0) == B,
                      "at_fused: all tensors must have the same batch size");
      STD_TORCH_CHECK(a[i].numel() > 0, "at_fused: tensors must not be empty");
      check_count(a[i]);
      STD_TORCH_CHECK(device_of(a[i]) == device && device_of(b[i]) == device,
                      "at_fused: all tensors must be on the same device");
      if (!dense_samples(a[i]) || !same_order(a[i], b[i]) ||
          (out && !same_order(a[i], out->written[i]))) {
        a[i] = torch::stable::contiguous(a[i]);
        b[i] = torch::stable::contiguous(b[i]);
        if (out && !same_order(a[i], out->written[i])) {
          out->written[i] = torch::stable::new_empty(a[i], a[i].sizes());
        }
      }
      pairs.push_back({samples_of(a[i]), samples_of(b[i]), a[i].numel() / B});
      bytes += B * pairs.back().bytes();
      fp64 |= pairs.back().fp64();
    }
  }

 private:
  static Samples samples_of(const Tensor& tensor) {
    return {tensor.const_data_ptr(), dtype_of(tensor), tensor.stride(0)};
  }
};

// What becomes of the distances of `count` pairs.
struct DistanceOptions {
  std::vector<double> weights;  // of a sample
  bool root, sum;

  DistanceOptions(const std::vector<double>& given, int64_t count, int64_t B, bool root,
                  const std::string& reduction)
      : weights(size_t(count), 1.0), root(root), sum(sums_pairs(reduction)) {
    check_weights(given, size_t(count));
    if (!given.empty()) weights = given;
    for (double& weight : weights) weight /= double(B);
  }
};

// The squared distances that the forward pass left, and the gradient from above.
struct DistanceBackward {
  const double* squares;
  DistanceOptions options;
  LossGradient gradient;

  DistanceBackward(Tensor& squares_tensor, const Tensor& gradient_tensor,
                   const std::vector<int64_t>& pairs, const std::vector<double>& weights, bool root,
                   const std::string& reduction, const DistanceArguments& arguments)
      : options(weights, rows_of(squares_tensor, arguments), arguments.B, root, reduction),
        gradient(gradient_tensor, pairs, arguments.device) {
    const int64_t rows = squares_tensor.size(0);
    STD_TORCH_CHECK(options.sum ? gradient_tensor.dim() == 0
                                : gradient_tensor.dim() == 1 && gradient_tensor.size(0) == rows,
                    "at_fused: the gradient must have the shape of the loss");
    STD_TORCH_CHECK(pairs.size() == arguments.pairs.size(),
                    "at_fused: a pair number per tensor, got ", pairs.size(), " for ",
                    arguments.pairs.size());
    for (int64_t pair : pairs) {
      STD_TORCH_CHECK(pair >= 0 && pair < rows, "at_fused: pair number ", pair, " is out of range");
    }
    squares_tensor = torch::stable::contiguous(squares_tensor);
    squares = static_cast<const double*>(squares_tensor.const_data_ptr());
  }

 private:
  static int64_t rows_of(const Tensor& squares, const DistanceArguments& arguments) {
    STD_TORCH_CHECK(squares.dim() == 2 && squares.size(1) == arguments.B &&
                        squares.scalar_type() == ScalarType::Double &&
                        device_of(squares) == arguments.device,
                    "at_fused: squares must be (pairs, B) of float64, on the tensors' device");
    return squares.size(0);
  }
};

}  // namespace at_fused
