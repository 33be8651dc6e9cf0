// Hinton's loss and squared distances as the kernels see them, on every device.
#pragma once

#include "feature.h"

namespace at_fused {

// What is kept of a row of logits, in fp64 (backends/eager/kd.py has the formulas).
enum Statistic : int32_t {
  kStudentMax,  // the largest logit
  kStudentSum,  // sum_k exp((s_k - max) / T)
  kTeacherMax,
  kTeacherSum,
  kQuotient,  // log of the student's sum through the teacher's
  kDivergence,
  kEntropySum,  // sum_k exp(s_k - max); NaN where the label is none
  kEntropy,     // the cross-entropy
  kStatistics,
};

// A row's label where it is not a class.
constexpr int64_t kIgnored = -1;
constexpr int64_t kWrong = -2;

struct KdOptions {
  double temperature, alpha, smoothing;
  int64_t ignored;
  bool divergence, entropy;  // the terms that are computed
};

// (B, K) logits with adjacent classes.
struct Logits {
  const void* data;
  Dtype dtype;
  int64_t stride;  // from row to row, in elements

  const void* row(int64_t b) const {
    return static_cast<const char*>(data) + b * stride * element_size(dtype);
  }
};

// What a label means, out of K classes.
#if defined(__CUDACC__) || defined(AT_FUSED_SIMT)
__host__ __device__
#endif
    inline int64_t class_of(int64_t label, int64_t K, int64_t ignored) {
  return label == ignored ? kIgnored : label >= 0 && label < K ? label : kWrong;
}

}  // namespace at_fused
