// What the operators (distill_ops.cpp) ask of one instruction-set level, as kernels.h has it.
#pragma once

#include "../distill.h"

namespace at_fused {

struct KdRow {
  const void* student;
  const void* teacher;
  Dtype student_dtype, teacher_dtype;
  int64_t K;
  int64_t label;  // a class, kIgnored or kWrong; kIgnored without labels
  const KdOptions* options;
};

// Where the gradients of a row go, null for none, and what stands before them.
struct KdRowGradient {
  void* student;
  void* teacher;
  double divergence, entropy;  // g alpha T / B, g (1 - alpha) / valid
};

struct DistillKernels {
  // The statistics of one row.
  void (*kd_row)(const KdRow& row, double* stats);

  // The gradients of one row, in the dtypes of its logits.
  void (*kd_row_backward)(const KdRow& row, const double* stats, const KdRowGradient& gradient);

  // sum_i |a_i - b_i|^2
  double (*squared_distance)(const void* a, Dtype a_dtype, const void* b, Dtype b_dtype, int64_t n);

  // out_i = factor * (a_i - b_i), in a's dtype
  void (*squared_distance_backward)(const void* a, Dtype a_dtype, const void* b, Dtype b_dtype,
                                    int64_t n, double factor, void* out);
};

// The table of the level in use.
const DistillKernels& distill_kernels();

extern const DistillKernels distill_kernels_baseline;
#if defined(__x86_64__)
extern const DistillKernels distill_kernels_avx2;
extern const DistillKernels distill_kernels_avx512;
#endif

}  // namespace at_fused
