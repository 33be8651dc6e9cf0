// What the kernels are given, as plain structs that the host writes from a plan (plan.h); and the
// kernels' launchers.
#pragma once

#include <cstdint>

#include "../feature.h"

namespace at_fused {

constexpr int kThreads = 256;  // of every block
// Blocks that run on a multiprocessor at a time, for which the kernels leave registers; fewer where
// they keep samples in its shared memory, or have more under way.
constexpr int kBlocksPerMultiprocessor = 3;
constexpr int kGradientBlocks = 2;
constexpr int kVectorBytes = 16;  // of the widest load
// Of a block's shared memory.
constexpr int32_t kControlBytes = 256;   // kernel.cuh: Control
constexpr int32_t kScratchBytes = 8192;  // attention_map.cuh: a value per thread and element
constexpr int32_t kMaximumBytes = 2 * kScratchBytes;  // likewise, with the channel of each
constexpr int32_t kSharedBytesWithoutAsking = 48 << 10;

constexpr int kLaunchBytes = 4096;  // of structs that every launch may carry
constexpr int kMaxPairs = 16;       // of one launch; longer lists take several
constexpr int kMaxFeatures = 24;    // likewise

// How a block reads a feature. A row is all positions of `channels_per_row` channels (planar) or
// the channels of a position (interleaved).
struct Access {
  int16_t vector;            // elements of a load: 16 bytes of them where alignment permits, else 1
  int16_t channels_per_row;  // channels read as one row, so that it is a whole number of vectors
  int16_t lanes;  // threads side by side in a row, a power of two; the others take other rows
};

struct View {
  const void* data;
  int64_t batch, line;
  int32_t C, N;
  Dtype dtype;
  Layout layout;
  Access access;
};

// A tensor of a feature's shape and layout that moves in the same vectors: its gradient.
struct Target {
  void* data;
  int64_t batch, line;
};

// What a member of a list has of its launch's tasks.
struct Tasks {
  int64_t tasks, bytes_of_task;
  int32_t first_task;
};

struct MapFeature : Tasks {
  View view;
  void* map;
  int32_t* channels;  // that won each position's maximum, if the map is one
  double scale;
  int32_t pieces, positions;  // of a sample, and of a piece
};

struct MapParams {
  double p;
  int32_t count;
  MapFeature features[kMaxFeatures];
};

// A gradient, made in row_pieces x column_pieces pieces of a sample.
struct SweepFeature : Tasks {
  View view;
  Target out;
  Target add;  // what the gradient is added to, which may be `out`; null: nothing
  const void* k;
  const int32_t* channels;         // as in MapFeature
  const void* loss_gradient;       // of this feature's pair; null is 1
  int32_t samples, B;              // in a task, and in all
  int32_t row_pieces, rows;        // rows in a piece
  int32_t column_pieces, columns;  // vectors in a piece
};

struct SweepParams {
  double p;
  double scale;         // of the gradients, as each feature's loss_gradient
  int64_t sample_step;  // from one sample's loss gradient to the next; 0: they have one
  int32_t count;
  bool loss_gradient_fp64;
  SweepFeature features[kMaxFeatures];
};

enum Side { kStudent, kTeacher };

struct PairSide {
  View view;
  void* maps;    // (B, N); null where nobody needs them
  double scale;  // of the channel sums
};

struct PairParams : Tasks {
  PairSide sides[2];
  const void* mask;  // (B, N), fp64 where a side is; null: ones
  double weight;     // of a sample
  // The student's gradient, where a whole sample stays on chip and is swept at once. Without it the
  // coefficients are all that the launch makes.
  Target out;
  const void* loss_gradient;  // null is 1
  int32_t number;             // in the list
  int32_t B;
  int32_t first_sample;
  int32_t samples;            // whole samples of a task; 0: samples are shared by several blocks
  int32_t pieces, positions;  // of each map of a sample, and of a piece
};

struct LossParams {
  double p, eps;
  double scale;         // as in SweepParams
  int64_t sample_step;  // likewise
  bool loss_gradient_fp64;
  bool gradient[2];  // the maps that are left become coefficients
  Form form;
  EpsMode eps_mode;
  int32_t count, samples;  // pairs, and samples in all of them
  bool add;                // sum over pairs; else a loss for each
  bool of_samples;         // a loss for each sample: neither is summed
  bool continues;          // a launch before this one began the sum
  bool loss_fp64;
  void* loss;
  // The workspace. The counters are 0 before a launch.
  uint32_t* finished;  // samples
  uint32_t* arrived;   // pieces of each shared sample
  double* sample_losses;
  double* sum;
  int32_t map_bytes;  // shared memory for the two maps of a whole sample
  PairParams pairs[kMaxPairs];
};

static_assert(sizeof(MapParams) <= kLaunchBytes && sizeof(SweepParams) <= kLaunchBytes);
static_assert(sizeof(LossParams) <= kLaunchBytes);

struct Launch {
  int64_t blocks;
  int64_t shared_bytes, most_shared_bytes;  // of a block, and that the device lets one have
  bool fp64;                                // some tensor is
  void* stream;
};

// Features with channels have maps of maxima, those with `add` are taps: all of a launch, or none.
void launch_attention_map(const MapParams& params, const Launch& launch);
void launch_attention_map_backward(const SweepParams& params, const Launch& launch);
void launch_map_loss(const LossParams& params, const Launch& launch);
void launch_at_loss(const LossParams& params, const Launch& launch);
void launch_at_value_and_grad(const LossParams& params, const Launch& launch);

}  // namespace at_fused
