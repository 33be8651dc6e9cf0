// What the kernels are given, as plain structs: written by the operators (*_ops.cpp) from a plan
// (plan.h), read by the device code.
#pragma once

#include <cstdint>

#include "../feature.h"
#include "../kd.h"

namespace at_fused {

constexpr int kThreads = 256;  // of every block
// Blocks that run on a multiprocessor at a time, for which the kernels leave registers; fewer where
// samples take its shared memory anyway.
constexpr int kBlocksPerMultiprocessor = 3;
constexpr int kGradientBlocks = 2;
constexpr int kVectorBytes = 16;    // of the widest load
constexpr int kLaunchBytes = 4096;  // of structs that every launch may carry
constexpr int kMaxPairs = 16;       // of one launch; longer lists take several
constexpr int kMaxFeatures = 30;    // likewise
constexpr int kMaxDistances = 24;

// How a block reads a feature. A row is `fold` channels of all positions (planar) or the channels
// of a position (interleaved).
struct Access {
  int16_t vector;  // elements of a load: 16 bytes of them where alignment permits, else 1
  int16_t fold;    // channels read as one row, so that it is a whole number of vectors
  int16_t lanes;   // threads side by side in a row, a power of two; the others take other rows
};

struct View {
  const void* data;
  int64_t batch, line;
  int32_t C, N;
  Dtype dtype;
  Layout layout;
  Access access;
};

// A sweep over the elements of a sample, cut into row_pieces x column_pieces blocks.
struct Sweep {
  void* out;
  int64_t batch, line;
  int32_t lanes;
  int32_t row_pieces, rows;        // rows in a piece
  int32_t column_pieces, columns;  // vectors in a piece
};

struct MapFeature {
  View view;
  void* map;
  int32_t* channels;  // that won each position's maximum, if the map is one
  double scale;
  int32_t first_task;
  int32_t pieces, positions;  // of a sample, and of a piece
};

struct MapParams {
  double p;
  int32_t count;
  MapFeature features[kMaxFeatures];
};

struct SweepFeature {
  View view;
  Sweep sweep;
  const void* k;
  const int32_t* channels;    // as in MapFeature
  const void* loss_gradient;  // of this feature's pair; null is 1
  int32_t first_task;
  int32_t samples, B;  // in a task, and in all
};

struct SweepParams {
  double p;
  int32_t count;
  bool loss_gradient_fp64;
  SweepFeature features[kMaxFeatures];
};

// A sweep that adds `scale` times its gradient to another one, which may be what it writes.
struct TapParams {
  double p, scale;
  const void* gradient;
  int64_t batch, line;
  SweepFeature feature;
};

struct PairParams {
  View student, teacher;
  void* student_maps;  // (B, N); null where nobody needs them
  void* teacher_maps;
  double student_scale, teacher_scale;  // of the channel sums
  double weight;                        // of a sample
  int32_t B;
  int32_t first_task, first_sample;
  int32_t samples;            // whole samples of a task; 0: samples are shared by several blocks
  int32_t pieces, positions;  // of both maps of a shared sample, and of a piece
};

struct LossParams {
  double p, eps;
  Form form;
  EpsMode eps_mode;        // of map_loss; the others have EpsMode::max
  int32_t count, samples;  // pairs, and samples in all of them
  bool student_grad, teacher_grad;
  bool add;         // sum over pairs; else a loss for each
  bool of_samples;  // a loss for each sample: neither is summed
  bool continues;   // a launch before this one began the sum
  bool loss_fp64;
  int32_t first_pair;
  void* loss;
  // The workspace. The counters are 0 before a launch and 0 after it.
  uint32_t* finished;  // samples
  uint32_t* arrived;   // pieces of each shared sample
  double* sample_losses;
  double* sum;
  int32_t map_bytes;  // shared memory for the two maps of a sample; 0: too large for it
  PairParams pairs[kMaxPairs];
};

struct GradientPair {
  Sweep sweep;
  const void* loss_gradient;
  int32_t lag;  // samples whose maps are under way before the first gradient is begun
};

struct GradientParams {
  double scale;
  bool loss_gradient_fp64;
  bool queue;  // some samples are shared: tasks are taken in order
  uint32_t* ticket;
  uint32_t* done;   // blocks
  uint32_t* ready;  // a flag for each shared sample
  GradientPair pairs[kMaxPairs];
};

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

static_assert(sizeof(MapParams) <= kLaunchBytes && sizeof(SweepParams) <= kLaunchBytes);
static_assert(sizeof(LossParams) + sizeof(GradientParams) <= kLaunchBytes);
static_assert(sizeof(KdParams) <= kLaunchBytes && sizeof(DistanceParams) <= kLaunchBytes);

}  // namespace at_fused
