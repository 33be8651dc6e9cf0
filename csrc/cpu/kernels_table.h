// All kernels of one instruction-set level: kernels_*.cpp choose it and include this file.
#pragma once

#include "distance_impl.h"
#include "kd_impl.h"
#include "kernels_general.h"

namespace at_fused {
namespace {

constexpr Kernels table(const char* name) {
  return {name,
          attention_map,
          sample_loss,
          attention_map_backward,
          general_map,
          general_backward,
          attention_tap_backward,
          kd_row_statistics,
          kd_row_gradients,
          squared_distance,
          squared_distance_backward};
}

}  // namespace
}  // namespace at_fused
