// What every operator checks of a list before it launches it.
#pragma once

#include "../features.h"
#include "plan.h"

namespace at_fused {

inline void check_extent(const Feature& x) {
  STD_TORCH_CHECK(x.C <= kMaxExtent && x.N <= kMaxExtent,
                  "at_fused: at most 2^30 channels and 2^30 positions, got ", x.C, " and ", x.N);
}

// The number of the next task of a launch that has so many.
inline int32_t begin_task(int64_t tasks) {
  STD_TORCH_CHECK(tasks <= kMaxBlocks, "at_fused: too many blocks for one launch: ", tasks);
  return int32_t(tasks);
}

}  // namespace at_fused
