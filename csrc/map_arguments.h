// The arguments of the operators for attention maps, checked, for every device.
#pragma once

#include <cstdint>
#include <vector>

#include "arguments.h"

namespace at_fused {

// What comes with each feature of attention_map_backward.
inline void check_sweep(const Tensors& features, const Tensors& coefficients,
                        const Tensors& channels, const std::vector<int64_t>& pairs, double p) {
  STD_TORCH_CHECK(coefficients.size() == features.size(),
                  "at_fused: a coefficient map per feature");
  STD_TORCH_CHECK(channels.empty() || channels.size() == features.size(),
                  "at_fused: a map of channels per feature, or none");
  STD_TORCH_CHECK(pairs.size() == features.size(), "at_fused: a pair number per feature");
  check_exponent(p);
}

// A coefficient map (B, N) for a feature, contiguous.
inline Maps coefficient_map(Tensor& map, const Feature& feature, Device device) {
  STD_TORCH_CHECK(
      map.dim() == 2 && map.size(0) == feature.B && map.size(1) == feature.N &&
          device_of(map) == device &&
          (map.scalar_type() == ScalarType::Double) == accumulates_fp64(feature) &&
          (map.scalar_type() == ScalarType::Double || map.scalar_type() == ScalarType::Float),
      "at_fused: a coefficient map must be (B, N), float64 for float64 features and "
      "float32 otherwise");
  if (!map.is_contiguous()) map = torch::stable::contiguous(map);
  return Maps(map, feature);
}

// The channels that won each position's maximum, (B, N) int32, contiguous.
inline Maps channel_map(Tensor& map, const Feature& feature, Device device) {
  STD_TORCH_CHECK(map.dim() == 2 && map.size(0) == feature.B && map.size(1) == feature.N &&
                      device_of(map) == device && map.scalar_type() == ScalarType::Int,
                  "at_fused: a map of channels must be (B, N) of int32");
  if (!map.is_contiguous()) map = torch::stable::contiguous(map);
  return Maps(map, feature.N, 4);
}

}  // namespace at_fused
