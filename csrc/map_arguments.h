// The arguments of the operators for attention maps, checked, for every device.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "arguments.h"

namespace at_fused {

// |A|^p, or for an odd p without `absolute` A^p with its sign (even ones have none); added up, or
// the largest of them.
struct MapPower {
  bool absolute, max;

  MapPower(double p, bool absolute, bool max)
      : absolute(absolute || std::fmod(p, 2.0) != 1.0), max(max) {
    STD_TORCH_CHECK(absolute || p == std::floor(p),
                    "at_fused: without absolute, p must be a whole number, got ", p);
    STD_TORCH_CHECK(this->absolute || !max, "at_fused: collapse 'max' takes absolute values");
  }
};

inline int32_t size_of_map(int64_t positions) {
  STD_TORCH_CHECK(positions <= INT32_MAX, "at_fused: at most 2^31 - 1 positions in a row, got ",
                  positions);
  return int32_t(positions);
}

// How each of some features (B, C, *spatial) is pooled before the power; `sizes` as in _ops.
inline std::vector<Pool> pools_of(const Tensors& tensors, const std::vector<int64_t>& sizes) {
  std::vector<Pool> pools;
  size_t at = 0;
  for (const Tensor& tensor : tensors) {
    Pool& pool = pools.emplace_back(Pool{{1, 1, 1}, {1, 1, 1}});
    const int64_t rank = tensor.dim() - 2;
    if (rank > 3) {  // never pooled; one long row
      STD_TORCH_CHECK(sizes.empty(), "at_fused: sizes are for one to three spatial dimensions");
      int64_t positions = 1;
      for (int64_t d = 2; d < tensor.dim(); ++d) positions *= tensor.size(d);
      pool.in[2] = pool.out[2] = size_of_map(positions);
      continue;
    }
    for (int64_t d = 0; d < rank; ++d) {
      const int64_t in = tensor.size(2 + d);
      int64_t out = in;
      if (!sizes.empty()) {
        STD_TORCH_CHECK(at < sizes.size(), "at_fused: sizes are too few for the features");
        out = sizes[at++];
        STD_TORCH_CHECK(out >= 1 && out <= in, "at_fused: sizes must be from 1 to the feature's, ",
                        in, ", got ", out);
      }
      pool.in[3 - rank + d] = size_of_map(in);
      pool.out[3 - rank + d] = int32_t(out);
    }
  }
  STD_TORCH_CHECK(at == sizes.size(), "at_fused: sizes are too many for the features");
  return pools;
}

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

// A coefficient map (B, positions) for a feature, contiguous.
inline Maps coefficient_map(Tensor& map, const Feature& feature, int64_t positions, Device device) {
  STD_TORCH_CHECK(
      map.dim() == 2 && map.size(0) == feature.B && map.size(1) == positions &&
          device_of(map) == device &&
          (map.scalar_type() == ScalarType::Double) == accumulates_fp64(feature) &&
          (map.scalar_type() == ScalarType::Double || map.scalar_type() == ScalarType::Float),
      "at_fused: a coefficient map must be (B, N), float64 for float64 features and "
      "float32 otherwise");
  if (!map.is_contiguous()) map = torch::stable::contiguous(map);
  return Maps(map, positions, map_element_size(feature));
}

// The channels that won each position's maximum, (B, positions) int32, contiguous.
inline Maps channel_map(Tensor& map, const Feature& feature, int64_t positions, Device device) {
  STD_TORCH_CHECK(map.dim() == 2 && map.size(0) == feature.B && map.size(1) == positions &&
                      device_of(map) == device && map.scalar_type() == ScalarType::Int,
                  "at_fused: a map of channels must be (B, N) of int32");
  if (!map.is_contiguous()) map = torch::stable::contiguous(map);
  return Maps(map, positions, 4);
}

}  // namespace at_fused
