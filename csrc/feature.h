// Features, options and loss arithmetic shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(AT_FUSED_EMULATED)
#include <cuda_runtime.h>
#define AT_FUSED_HOST_DEVICE __host__ __device__
#else
#define AT_FUSED_HOST_DEVICE
#endif

namespace at_fused {

// ---- options: values in the order of the names in losses.h -------------------------------------

enum class Collapse : int32_t { mean, sum, max };
enum class Form : int32_t { code, paper };
// sum: one loss; none: one per pair; sample: one per pair and sample.
enum class Reduction : int32_t { sum, none, sample };
// Divisor of a map: max(norm, eps), or norm + eps.
enum class EpsMode : int32_t { max, add };

// ---- features ---------------------------------------------------------------------------------

enum class Dtype : int32_t { float32, float64, float16, bfloat16 };

// planar: the positions of a channel are contiguous (NCHW).
// interleaved: the channels of a position are contiguous (channels_last, tokens).
enum class Layout : int32_t { planar, interleaved };

// A feature viewed as (B, C, N). A line is a contiguous run: a channel's positions in planar, a
// position's channels in interleaved. Strides are in elements.
struct Feature {
  const void* data;
  Dtype dtype;
  Layout layout;
  int64_t B, C, N;
  int64_t batch_stride;
  int64_t line_stride;
};

AT_FUSED_HOST_DEVICE inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}
// Bytes of an element of a map, a coefficient map or a loss.
AT_FUSED_HOST_DEVICE inline int64_t accumulate_size(bool fp64) { return fp64 ? 8 : 4; }
inline bool accumulates_fp64(const Feature& feature) { return feature.dtype == Dtype::float64; }

// Skips the first positions of each sample, such as class and register tokens.
inline Feature without_first(Feature feature, int64_t positions) {
  const int64_t step = feature.layout == Layout::planar ? 1 : feature.line_stride;
  feature.data =
      static_cast<const char*>(feature.data) + positions * step * element_size(feature.dtype);
  feature.N -= positions;
  return feature;
}
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
  return static_cast<const char*>(feature.data) +
         b * feature.batch_stride * element_size(feature.dtype);
}

// ---- losses -----------------------------------------------------------------------------------

// Two features, or two raw maps as features of one channel.
struct Pair {
  Feature student, teacher;
  double student_scale = 1, teacher_scale = 1;  // factors of the channel sums
  const void* mask = nullptr;  // (B, N), fp64 if a side is, else fp32; null means all ones

  bool fp64() const { return accumulates_fp64(student) || accumulates_fp64(teacher); }
  int64_t bytes_of_sample() const { return sample_bytes(student) + sample_bytes(teacher); }
};

// The divisor of a map: q = Q / value, and Q / norm = q * to_unit. to_unit is 0 if the divisor is
// constant, because it then has no derivative with respect to Q.
struct Divisor {
  double value, inverse, to_unit;

  AT_FUSED_HOST_DEVICE Divisor(double norm, EpsMode mode, double eps) {
    // The comparison is false for a NaN norm, so that eps does not replace it.
    const bool constant = norm <= (mode == EpsMode::max ? eps : 0.0);
    value = mode == EpsMode::add ? norm + eps : constant ? eps : norm;
    inverse = 1.0 / value;
    to_unit = constant ? 0.0 : mode == EpsMode::add ? value / norm : 1.0;
  }
};

// Reads an fp32 or fp64 value, such as a loss gradient or a mask; 1 if the pointer is null.
AT_FUSED_HOST_DEVICE inline double value_or_one(const void* values, bool fp64, int64_t index) {
  return !values ? 1.0
         : fp64  ? static_cast<const double*>(values)[index]
                 : double(static_cast<const float*>(values)[index]);
}

AT_FUSED_HOST_DEVICE inline void store_value(void* values, bool fp64, int64_t index, double value) {
  if (fp64) {
    static_cast<double*>(values)[index] = value;
  } else {
    static_cast<float*>(values)[index] = float(value);
  }
}

}  // namespace at_fused
