// The kernels' launchers, each beside its kernel, for code that knows nothing of CUDA.
#pragma once

#include "plan.h"

namespace at_fused {

struct Launch {
  int64_t blocks;
  int32_t shared_bytes;
  bool fp64;  // some tensor is
  void* stream;
};

void launch_attention_map(const MapParams& params, const Launch& launch);
void launch_attention_map_backward(const SweepParams& params, const Launch& launch);
void launch_attention_tap_backward(const TapParams& params, const Launch& launch);
void launch_max_map(const MapParams& params, const Launch& launch);
void launch_max_map_backward(const SweepParams& params, const Launch& launch);
void launch_max_tap_backward(const TapParams& params, const Launch& launch);
void launch_map_loss(const LossParams& params, const Launch& launch);
void launch_at_loss(const LossParams& params, const Launch& launch);
void launch_at_value_and_grad(const LossParams& params, const Launch& launch);

}  // namespace at_fused
