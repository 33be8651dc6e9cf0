// Lists of features or pairs, of any length: cut into launches, whose sizes are checked.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../features.h"
#include "launch.h"

namespace at_fused {

inline void check_samples(int64_t samples) {
  STD_TORCH_CHECK(samples <= kMaxExtent, "at_fused: at most 2^30 samples, got ", samples);
}

inline void check_extent(const Feature& x) {
  STD_TORCH_CHECK(x.C <= kMaxExtent && x.N <= kMaxExtent,
                  "at_fused: at most 2^30 channels and 2^30 positions, got ", x.C, " and ", x.N);
  check_samples(x.B);
}

inline int64_t check_blocks(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= kMaxBlocks, "at_fused: too many blocks for one launch: ", blocks);
  return blocks;
}

// Launches a list of features in parts. `options` are those of all parts; `plan(at, feature)` fills
// in member number `at`.
template <class Params, class Plan, class Run>
void launch_parts(size_t count, const Params& options, int32_t shared_bytes, void* stream,
                  Plan plan, Run run) {
  constexpr size_t most = std::extent_v<decltype(Params::features)>;
  for (size_t begin = 0; begin < count; begin += most) {
    Params params = options;
    params.count = int32_t(std::min(most, count - begin));
    Launch launch{0, shared_bytes, false, stream};
    for (int32_t i = 0; i < params.count; ++i) {
      plan(begin + size_t(i), params.features[i]);
      launch.fp64 |= params.features[i].view.dtype == Dtype::float64;
    }
    launch.blocks = check_blocks(number_tasks(params.features, params.count));
    run(params, launch);
  }
}

}  // namespace at_fused
