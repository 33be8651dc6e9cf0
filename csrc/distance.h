// Distances as the kernels see them, on every device.
#pragma once

#include <cmath>

#include "feature.h"

namespace at_fused {

// What stands before a - b in the gradient of ||a - b||, 0 at 0, or of its square.
AT_FUSED_HOST_DEVICE inline double distance_slope(double square, bool root) {
  if (!root) return 2;
  return square == 0 ? 0.0 : 1 / sqrt(square);
}

}  // namespace at_fused
