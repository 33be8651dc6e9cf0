// Losses and their gradients as numbers.
#pragma once

#include <vector>

#include "../arguments.h"
#include "../loss.h"

namespace at_fused {

// A loss from fp64 values.
inline void write_loss(Tensor& loss, bool fp64, const std::vector<double>& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    store_loss(loss.mutable_data_ptr(), fp64, int64_t(i), values[i]);
  }
}

// A pair's gradient from above; 1 where there is none.
inline double value_of(const LossGradient& gradient, int64_t pair) {
  return gradient_of(gradient.of(pair), gradient.fp64);
}

}  // namespace at_fused
