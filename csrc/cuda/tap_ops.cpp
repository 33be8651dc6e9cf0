// The CUDA implementations of torch.ops.at_fused.attention_tap_backward*: as map_ops.cpp.

#include "../box.h"
#include "../tap.h"
#include "device.h"
#include "lists.h"

namespace at_fused {

void sweep_tap(const Tap& tap) {
  const OnDevice scope(tap.device);
  const Feature& feature = tap.feature;
  check_extent(feature);
  const Feature& add = tap.gradient;
  TapParams params{tap.p, tap.scale, add.data, add.batch, add.line, {}};
  params.feature.k = tap.k.first;
  params.feature.channels = reinterpret_cast<const int32_t*>(tap.channels.first);
  plan_sweep(params.feature, feature, tap.out, total_bytes(feature), limits_of(tap.device), &add);
  const Launch launch{check_blocks(tasks_of(params.feature)), 0, accumulates_fp64(feature),
                      scope.stream()};
  tap.maximum ? launch_max_tap_backward(params, launch)
              : launch_attention_tap_backward(params, launch);
}

}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(AT_FUSED_NAMESPACE, AT_FUSED_DEVICE_KEY, m) {
  m.impl("attention_tap_backward", AT_FUSED_BOX(attention_tap_backward));
  m.impl("attention_tap_backward_", AT_FUSED_BOX(attention_tap_backward_));
}
