// The CUDA implementations of torch.ops.at_fused.attention_tap_backward*: as map_ops.cpp.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>

#include "../tap_arguments.h"
#include "checks.h"
#include "device.h"
#include "launch.h"

namespace at_fused {
namespace {

void sweep(const Tap& tap, double p) {
  const OnDevice scope(tap.device);
  const Feature& feature = tap.feature;
  check_extent(feature);
  TapParams params{
      p, tap.scale, tap.power.keeps_sign, tap.gradient.data, tap.gradient.batch, tap.gradient.line,
      {}};
  params.feature.k = tap.k.first;
  params.feature.channels = reinterpret_cast<const int32_t*>(tap.winners.first);
  const int64_t blocks = plan_sweep(params.feature, feature, tap.out, 2 * total_bytes(feature),
                                    limits_of(tap.device), &tap.gradient);
  check_blocks(blocks);
  const Launch launch{blocks, 0, accumulates_fp64(feature), scope.stream()};
  tap.power.max ? launch_max_tap_backward(params, launch)
                : launch_attention_tap_backward(params, launch);
}

Tensor attention_tap_backward(Tensor gradient, Tensor feature, Tensor map_gradient, double p,
                              std::string collapse, bool absolute, std::optional<Tensor> channels) {
  Tap tap(gradient, feature, map_gradient, p, collapse, absolute, channels, false);
  sweep(tap, p);
  return tap.finish();
}

void attention_tap_backward_(Tensor gradient, Tensor feature, Tensor map_gradient, double p,
                             std::string collapse, bool absolute, std::optional<Tensor> channels) {
  Tap tap(gradient, feature, map_gradient, p, collapse, absolute, channels, true);
  sweep(tap, p);
  tap.finish();
}

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(AT_FUSED_NAMESPACE, AT_FUSED_DEVICE_KEY, m) {
  m.impl("attention_tap_backward", TORCH_BOX(&at_fused::attention_tap_backward));
  m.impl("attention_tap_backward_", TORCH_BOX(&at_fused::attention_tap_backward_));
}
