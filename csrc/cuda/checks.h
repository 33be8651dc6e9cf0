// What every operator checks of a list before it launches it.
#pragma once

#include "../features.h"
#include "plan.h"

namespace at_fused {

inline void check_extent(const Feature& x) {
  STD_TORCH_CHECK(x.C <= kMaxExtent && x.N <= kMaxExtent,
                  "at_fused: at most 2^30 channels and 2^30 positions, got ", x.C, " and ", x.N);
}

// Also the number of a launch's next task.
inline int32_t check_blocks(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= kMaxBlocks, "at_fused: too many blocks for one launch: ", blocks);
  return int32_t(blocks);
}

}  // namespace at_fused
