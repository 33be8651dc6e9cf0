// What the kernels of Hinton's loss and of distances are given, and their launchers.
#pragma once

#include "../distill.h"
#include "launch.h"

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
  double weight;          // of a sample
  const void* gradient;   // of the pair's loss
  int32_t row;            // of the squares
  int32_t piece, pieces;  // elements of a task, and tasks of a sample
  Dtype a_dtype, b_dtype;
  bool vector;
};

struct DistanceParams {
  int32_t count, B;
  int32_t first_pair;   // of this launch
  bool root;            // a sample's distance is a norm; else its square
  bool add, continues;  // one loss for all pairs; this launch adds to that of others
  bool loss_fp64, gradient_fp64;
  double* squares;  // (pairs, B)
  double* sums;     // of each task
  double* sum;      // of all pairs so far
  void* loss;
  uint32_t* arrived;   // of each pair's samples; 0 before and after
  uint32_t* finished;  // samples; likewise
  DistancePair pairs[kMaxDistances];
};
static_assert(sizeof(DistanceParams) <= kLaunchBytes);

void launch_kd_loss(const KdParams& params, const Launch& launch);
void launch_kd_loss_backward(const KdParams& params, const Launch& launch);
void launch_distance_loss(const DistanceParams& params, const Launch& launch);
void launch_distance_loss_backward(const DistanceParams& params, const Launch& launch);

}  // namespace at_fused
