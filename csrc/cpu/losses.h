// Losses and their gradients as numbers.
#pragma once

#include <vector>

#include "../arguments.h"

namespace at_fused {

// A loss from fp64 values.
inline void write_loss(Tensor& loss, bool fp64, const std::vector<double>& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (fp64) {
      static_cast<double*>(loss.mutable_data_ptr())[i] = values[i];
    } else {
      static_cast<float*>(loss.mutable_data_ptr())[i] = float(values[i]);
    }
  }
}

inline Tensor losses_of(const std::vector<double>& values, bool sum, bool fp64, Device device) {
  Tensor losses = new_losses(sum, int64_t(values.size()), fp64, device);
  write_loss(losses, fp64, values);
  return losses;
}

// A pair's gradient from above; 1 where there is none.
inline double value_of(const LossGradient& gradient, int64_t pair) {
  const void* value = gradient.of(pair);
  return !value          ? 1.0
         : gradient.fp64 ? *static_cast<const double*>(value)
                         : *static_cast<const float*>(value);
}

}  // namespace at_fused
