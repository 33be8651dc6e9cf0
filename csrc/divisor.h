// What a map is divided by, on every device.
#pragma once

#include "feature.h"

namespace at_fused {

// q = Q / divisor, and Q / norm = q * to_unit, 0 where the norm has no part in the divisor.
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

}  // namespace at_fused
