// A feature map as the kernels see it, on every device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(AT_FUSED_SIMT)
#include <cuda_runtime.h>
#define AT_FUSED_HOST_DEVICE __host__ __device__
#else
#define AT_FUSED_HOST_DEVICE
#endif

namespace at_fused {

enum class Dtype : int32_t { float32, float64, float16, bfloat16 };

// planar: channels outermost, positions adjacent (NCHW).
// interleaved: channels adjacent (channels_last, tokens).
enum class Layout : int32_t { planar, interleaved };

enum class Collapse : int32_t { mean, sum, max };

enum class Form : int32_t { code, paper };

// The losses of samples as one number, one for each pair, or as they are.
enum class Reduction : int32_t { sum, none, sample };

// A norm's lower bound: max(norm, eps), or norm + eps.
enum class EpsMode : int32_t { max, add };

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
inline int64_t map_element_size(const Feature& feature) {
  return accumulate_size(accumulates_fp64(feature));
}
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
inline int64_t sample_bytes(const Feature& feature) {
  return feature.C * feature.N * element_size(feature.dtype);
}

}  // namespace at_fused
