// Hinton's loss as the kernels see it, on every device.
//
// d_k = log(q_k / p_k) = (t_k - s_k - c) / T, one c for the row, is made from the difference of the
// logits, without its rounding: at high temperatures it is all that is left, and small. Where it
// is, whatever is made of it is a series: e^-d - 1 + d = d^2 g(d), e^-d - 1 = d^2 g(d) - d.
#pragma once

#include <cmath>

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
  double temperature, alpha, label_smoothing;
  int64_t ignore_index;
  bool divergence, entropy;  // the terms that are computed
};

// (B, K) logits with adjacent classes.
struct Logits {
  const void* data;
  Dtype dtype;
  int64_t stride;  // from row to row, in elements

  AT_FUSED_HOST_DEVICE const void* row(int64_t b) const {
    return static_cast<const char*>(data) + b * stride * element_size(dtype);
  }
};

// What a label means, out of K classes.
AT_FUSED_HOST_DEVICE inline int64_t class_of(int64_t label, int64_t K, int64_t ignore_index) {
  return label == ignore_index ? kIgnored : label >= 0 && label < K ? label : kWrong;
}

// log(1 + x) - x for x > -1.
AT_FUSED_HOST_DEVICE inline double log1p_excess(double x) {
  if (fabs(x) > 1e-3) return log1p(x) - x;
  return x * x * (-0.5 + x * (1.0 / 3 + x * (-0.25 + x * (0.2 - x / 6))));
}

// a + b as its rounding and the rest.
struct Exact {
  double sum, rest;
  AT_FUSED_HOST_DEVICE Exact(double a, double b) : sum(a + b) {
    const double part = sum - a;
    rest = (a - (sum - part)) + (b - part);
  }
};

// c = t_max - s_max - T * quotient in three numbers, with the digits that c has beyond those of A:
// of logits that have much in common they are all that counts.
template <class A>
struct Shift {
  A high, low, least;

  AT_FUSED_HOST_DEVICE Shift(const double* stats, double quotient, double temperature) {
    const Exact maxima(stats[kTeacherMax], -stats[kStudentMax]);
    const Exact c(maxima.sum, -temperature * quotient);
    high = A(c.sum);
    const Exact rests(c.rest, maxima.rest), rest(c.sum - double(high), rests.sum);
    low = A(rest.sum);
    least = A((rest.sum - double(low)) + rest.rest + rests.rest);
  }
};

}  // namespace at_fused
