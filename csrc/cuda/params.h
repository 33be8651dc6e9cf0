// Kernel parameters, which the host fills according to plan.h, and launch functions.
#pragma once

#include <cstdint>

#include "../feature.h"

namespace at_fused {

constexpr int kThreads = 256;  // per block
// Resident blocks per multiprocessor that registers must allow. Kernels that cache samples in
// shared memory, or have more loads in flight, run fewer.
constexpr int kBlocksPerMultiprocessor = 3;
constexpr int kGradientBlocks = 2;
constexpr int kVectorBytes = 16;  // widest load
// Shared memory per block.
constexpr int32_t kControlBytes = 256;   // kernel.cuh: Control
constexpr int32_t kScratchBytes = 8192;  // attention_map.cuh: a sum per thread and vector element
constexpr int32_t kArgmaxScratchBytes = 2 * kScratchBytes;  // the same, with channels
constexpr int32_t kDefaultSharedBytes = 48 << 10;           // more needs cudaFuncSetAttribute

constexpr int kMaxParamBytes = 4096;  // kernel parameters that every CUDA version allows
constexpr int kMaxPairs = 16;         // per launch
constexpr int kMaxFeatures = 24;      // per launch

// The access pattern of a block. A row is all positions of `channels_per_row` channels (planar), or
// all channels of a position (interleaved).
struct Access {
  int16_t vector;            // elements per load: 16 bytes if alignment permits, else 1 element
  int16_t channels_per_row;  // more than 1 if only several channels are a whole number of vectors
  int16_t lanes;             // threads per row, a power of two
};

struct View {
  const void* data;
  int64_t batch_stride, line_stride;
  int32_t C, N;
  Dtype dtype;
  Layout layout;
  Access access;
};

// A tensor with the shape, layout and access of a feature, such as its gradient.
struct Target {
  void* data;
  int64_t batch_stride, line_stride;
};

// The tasks of one feature or pair in a launch.
struct Tasks {
  int64_t tasks, bytes_per_task;
  int32_t first_task;
};

struct MapFeature : Tasks {
  View view;
  void* map;
  int32_t* channels;  // argmax channels for collapse "max", else null
  double scale;
  int32_t pieces, positions_per_piece;
};

struct MapParams {
  double p;
  int32_t count;
  MapFeature features[kMaxFeatures];
};

// A gradient. A sample is split into row_pieces x column_pieces pieces.
struct SweepFeature : Tasks {
  View view;
  Target out;
  Target addend;  // may be `out`; null data means 0
  const void* k;
  const int32_t* channels;    // as in MapFeature
  const void* loss_gradient;  // of this feature's pair; null means 1
  int32_t samples_per_task, B;
  int32_t row_pieces, rows_per_piece;
  int32_t column_pieces, columns_per_piece;  // columns are vectors
};

struct SweepParams {
  double p;
  double scale;           // factor of all gradients
  int64_t sample_stride;  // stride of the loss gradient; 0 if all samples share one value
  int32_t count;
  bool loss_gradient_fp64;
  SweepFeature features[kMaxFeatures];
};

enum Side { kStudent, kTeacher };

struct PairSide {
  View view;
  void* maps;    // (B, N) in global memory; null if not needed
  double scale;  // factor of the channel sums
};

struct PairParams : Tasks {
  PairSide sides[2];
  const void* mask;  // (B, N), fp64 if a side is, else fp32; null means all ones
  double weight;     // of a sample in the loss
  // The student's gradient if the launch writes it, from a student cached in shared memory. If
  // null, the launch writes coefficients.
  Target out;
  const void* loss_gradient;  // null means 1
  int32_t index;              // in the list
  int32_t B;
  int32_t first_sample;      // index of the first sample among those of the launch
  int32_t samples_per_task;  // 0 if several blocks share a sample
  int32_t pieces, positions_per_piece;
};

struct LossParams {
  double p, eps;
  double scale;           // as in SweepParams
  int64_t sample_stride;  // as in SweepParams
  bool loss_gradient_fp64;
  bool gradient[2];  // per side: write coefficients instead of raw maps
  Form form;
  EpsMode eps_mode;
  int32_t count, samples;  // pairs, and samples of all pairs
  bool sums_pairs;         // reduction "sum": sum over pairs
  bool per_sample;         // reduction "sample": no sums
  bool continues_sum;      // an earlier launch began the sum
  bool loss_fp64;
  void* loss;
  // The workspace. Counters are 0 before a launch.
  uint32_t* finished;  // counts finished samples
  uint32_t* arrived;   // counts finished pieces of each shared sample
  double* sample_losses;
  double* sum;
  int32_t map_bytes;  // shared memory for both maps of a whole sample
  PairParams pairs[kMaxPairs];
};

static_assert(sizeof(MapParams) <= kMaxParamBytes && sizeof(SweepParams) <= kMaxParamBytes);
static_assert(sizeof(LossParams) <= kMaxParamBytes);

struct Launch {
  int64_t blocks;
  int64_t shared_bytes, max_shared_bytes;  // per block: used, and the device's maximum
  bool fp64;                               // if any tensor is
  void* stream;
};

// `channels` mean collapse "max", and `addend` a tap. All features of a launch must agree in both.
void launch_attention_map(const MapParams& params, const Launch& launch);
void launch_attention_map_backward(const SweepParams& params, const Launch& launch);
void launch_map_loss(const LossParams& params, const Launch& launch);
void launch_at_loss(const LossParams& params, const Launch& launch);
void launch_at_value_and_grad(const LossParams& params, const Launch& launch);

}  // namespace at_fused
