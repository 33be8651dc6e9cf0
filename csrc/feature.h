// A feature map as the kernels see it, on every device.
#pragma once

#include <cstdint>

namespace at_fused {

enum class Dtype : int32_t { float32, float64, float16, bfloat16 };

// planar: channels outermost, positions adjacent (NCHW).
// interleaved: channels adjacent (channels_last, tokens).
enum class Layout : int32_t { planar, interleaved };

enum class Form : int32_t { code, paper };

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

inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}
inline bool accumulates_fp64(const Feature& feature) { return feature.dtype == Dtype::float64; }
inline int64_t map_element_size(const Feature& feature) {
  return accumulates_fp64(feature) ? 8 : 4;
}
inline int64_t sample_bytes(const Feature& feature) {
  return feature.C * feature.N * element_size(feature.dtype);
}

}  // namespace at_fused
