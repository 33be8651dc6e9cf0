// What the kernels of Hinton's loss and of squared distances are given, and their launchers.
#pragma once

#include "../distill.h"
#include "params.h"

namespace at_fused {

struct KdParams {
  Logits student, teacher;
  Logits student_gradient, teacher_gradient;  // data null: none
  const int64_t* labels;                      // null: none
  int64_t label_stride;
  int64_t K;
  int32_t B;
  int32_t group;  // threads of a row: a warp or a block
  bool vector;    // every row of all tensors begins on 16 bytes and has whole vectors
  KdOptions options;
  double* stats;
  double* valid;
  void* loss;
  bool loss_fp64;
  uint32_t* finished;  // blocks; 0 before and after
  const void* gradient;
  bool gradient_fp64;
};

constexpr int kMaxDistances = 24;  // pairs of one launch

struct DistancePair {
  const void* a;
  const void* b;
  void* out;  // of the gradient
  int64_t a_stride, b_stride, out_stride;
  int64_t M;
  int64_t first_task;
  int32_t piece, pieces;  // elements of a task, and tasks of a sample
  Dtype a_dtype, b_dtype;
  bool vector;
};

struct DistanceParams {
  int32_t count, B;
  double* result;              // (pairs, B)
  const double* coefficients;  // likewise
  double* sums;                // of each task
  uint32_t* arrived;           // of each pair's samples; 0 before and after
  DistancePair pairs[kMaxDistances];
};
static_assert(sizeof(DistanceParams) <= 4096);

struct DistillLaunch {
  int64_t blocks;
  bool fp64;  // some tensor is
  void* stream;
};

void launch_kd_loss(const KdParams& params, const DistillLaunch& launch);
void launch_kd_loss_backward(const KdParams& params, const DistillLaunch& launch);
void launch_squared_distance(const DistanceParams& params, const DistillLaunch& launch);
void launch_squared_distance_backward(const DistanceParams& params, const DistillLaunch& launch);

}  // namespace at_fused
