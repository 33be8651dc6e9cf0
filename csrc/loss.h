// Of losses, what is the same on every device.
#pragma once

#include "feature.h"

namespace at_fused {

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
