// What the kernels of every device share: features, options, and the arithmetic of a loss.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(AT_FUSED_EMULATED)
#include <cuda_runtime.h>
#define AT_FUSED_HOST_DEVICE __host__ __device__
#else
#define AT_FUSED_HOST_DEVICE
#endif

namespace at_fused {

// ---- options, each in the order of its names (operators.h) ------------------------------------

enum class Collapse : int32_t { mean, sum, max };
enum class Form : int32_t { code, paper };
// The losses of samples as one number, one for each pair, or as they are.
enum class Reduction : int32_t { sum, none, sample };
// A norm's lower bound: max(norm, eps), or norm + eps.
enum class EpsMode : int32_t { max, add };

// ---- features ---------------------------------------------------------------------------------

enum class Dtype : int32_t { float32, float64, float16, bfloat16 };

// planar: channels outermost, positions adjacent (NCHW).
// interleaved: channels adjacent (channels_last, tokens).
enum class Layout : int32_t { planar, interleaved };

// A feature map seen as (B, C, N). Strides in elements. The stride that the layout makes 1
// (position in planar, channel in interleaved) is not stored; `line` is the other one.
struct Feature {
  const void* data;
  Dtype dtype;
  Layout layout;
  int64_t B, C, N;
  int64_t batch;
  int64_t line;
};

AT_FUSED_HOST_DEVICE inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}
// Of what sums up: maps, coefficients, losses.
AT_FUSED_HOST_DEVICE inline int64_t accumulate_size(bool fp64) { return fp64 ? 8 : 4; }
inline bool accumulates_fp64(const Feature& feature) { return feature.dtype == Dtype::float64; }

// The feature without the first positions of each sample: class tokens and registers.
inline Feature without_first(Feature feature, int64_t positions) {
  const int64_t step = feature.layout == Layout::planar ? 1 : feature.line;
  feature.data =
      static_cast<const char*>(feature.data) + positions * step * element_size(feature.dtype);
  feature.N -= positions;
  return feature;
}
// Runs of adjacent elements in a sample: channels in planar, positions in interleaved.
inline int64_t lines(const Feature& feature) {
  return feature.layout == Layout::planar ? feature.C : feature.N;
}
inline int64_t line_length(const Feature& feature) {
  return feature.layout == Layout::planar ? feature.N : feature.C;
}
inline int64_t sample_bytes(const Feature& feature) {
  return feature.C * feature.N * element_size(feature.dtype);
}
inline int64_t total_bytes(const Feature& feature) { return feature.B * sample_bytes(feature); }
inline const void* sample_of(const Feature& feature, int64_t b) {
  return static_cast<const char*>(feature.data) + b * feature.batch * element_size(feature.dtype);
}

// ---- losses -----------------------------------------------------------------------------------

// Features, or raw maps as features of one channel.
struct Pair {
  Feature student, teacher;
  double student_scale = 1, teacher_scale = 1;  // before the channel sums
  const void* mask = nullptr;  // (B, N), fp64 where a side is and fp32 otherwise; null: ones

  bool fp64() const { return accumulates_fp64(student) || accumulates_fp64(teacher); }
  int64_t bytes_of_sample() const { return sample_bytes(student) + sample_bytes(teacher); }
};

// What a map is divided by: q = Q / divisor, and Q / norm = q * to_unit, 0 where the norm has no
// part in the divisor.
struct Divisor {
  double divisor, inverse, to_unit;

  AT_FUSED_HOST_DEVICE Divisor(double norm, EpsMode mode, double eps) {
    // Written so that a NaN norm is not clamped away.
    const bool constant = norm <= (mode == EpsMode::max ? eps : 0.0);
    divisor = mode == EpsMode::add ? norm + eps : constant ? eps : norm;
    inverse = 1.0 / divisor;
    to_unit = constant ? 0.0 : mode == EpsMode::add ? divisor / norm : 1.0;
  }
};

// A value of fp32 or fp64, such as the gradient of a loss or a mask; 1 where there is none.
AT_FUSED_HOST_DEVICE inline double factor_of(const void* values, bool fp64, int64_t at) {
  return !values ? 1.0
         : fp64  ? static_cast<const double*>(values)[at]
                 : double(static_cast<const float*>(values)[at]);
}

AT_FUSED_HOST_DEVICE inline void store_loss(void* losses, bool fp64, int64_t at, double loss) {
  if (fp64) {
    static_cast<double*>(losses)[at] = loss;
  } else {
    static_cast<float*>(losses)[at] = float(loss);
  }
}

}  // namespace at_fused
