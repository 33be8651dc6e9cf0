// The arguments of the operators for distances, checked, for every device.
#pragma once

#include <string>
#include <vector>

#include "arguments.h"

namespace at_fused {

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
  int64_t next = 1;
  for (const auto& [stride, size] : extents(tensor, 1)) {
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
class DistanceGradients : public Results {
 public:
  explicit DistanceGradients(const Tensors& a) {
    for (const Tensor& x : a) written.push_back(torch::stable::empty_like(x));
    results_ = written;
  }
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
  std::vector<double> weights;  // as given: none where all are 1
  int64_t B;
  bool root, sum;

  DistanceOptions(const std::vector<double>& weights, int64_t count, int64_t B, bool root,
                  const std::string& reduction)
      : weights(weights), B(B), root(root), sum(sums_pairs(reduction)) {
    check_weights(weights, size_t(count));
  }

  double sample_weight(int64_t pair) const {
    return (weights.empty() ? 1.0 : weights[size_t(pair)]) / double(B);
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
