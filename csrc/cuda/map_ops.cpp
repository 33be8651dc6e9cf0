// The CUDA implementations of torch.ops.at_fused.attention_map*: arguments to plans, plans to
// launches. Their schemas are in _ops.

#include <optional>
#include <string>
#include <vector>

#include "../box.h"
#include "../map_arguments.h"
#include "device.h"
#include "lists.h"

namespace at_fused {
namespace {

Tensors attention_map(Tensors tensors, double p, std::string collapse,
                      std::vector<int64_t> skip_tokens) {
  check_exponent(p);
  const Collapse collapsed = collapse_of(collapse);
  const bool maximum = collapsed == Collapse::max;
  if (tensors.empty()) return {};
  const Device device = device_of(tensors[0]);
  const OnDevice scope(device);
  const Limits limits = limits_of(device);
  const std::vector<Feature> features = native_features(tensors, skip_tokens);
  Tensors maps, channels;
  for (const Feature& x : features) {
    check_extent(x);
    maps.push_back(new_map(x, device));
    if (maximum) channels.push_back(new_rows(x.B, x.N, aoti_torch_dtype_int32(), device));
  }
  const int64_t total = total_bytes(features);
  launch_parts(
      features.size(), MapParams{p, 0, {}}, maximum ? kMaximumBytes : kScratchBytes, scope.stream(),
      [&](size_t at, MapFeature& feature) {
        feature.map = maps[at].mutable_data_ptr();
        feature.scale = collapse_scale(collapsed, features[at]);
        if (maximum) feature.channels = static_cast<int32_t*>(channels[at].mutable_data_ptr());
        plan_map(feature, features[at], total, limits);
      },
      maximum ? launch_max_map : launch_attention_map);
  for (Tensor& map : channels) maps.push_back(std::move(map));
  return maps;
}

// ---- attention_map_backward -------------------------------------------------------------------

Tensors attention_map_backward(Tensors tensors, Tensors coefficients,
                               std::optional<Tensor> loss_gradient, std::vector<int64_t> pairs,
                               double p, std::vector<int64_t> skip_tokens, Tensors channels) {
  check_sweep(tensors, coefficients, channels, pairs, p);
  const bool maximum = !channels.empty();
  if (tensors.empty()) return {};
  const Device device = device_of(tensors[0]);
  const OnDevice scope(device);
  const Limits limits = limits_of(device);
  const LossGradient gradient(loss_gradient, pairs, tensors);
  Gradients gradients(tensors, skip_tokens);
  const std::vector<Feature>& features = gradients.features;
  for (const Feature& x : features) check_extent(x);
  const int64_t total = total_bytes(features);
  launch_parts(
      features.size(), SweepParams{p, gradient.sample_stride, 0, gradient.fp64, {}}, 0,
      scope.stream(),
      [&](size_t at, SweepFeature& feature) {
        const Feature& x = features[at];
        feature.k = coefficient_map(coefficients[at], x, device).first;
        feature.loss_gradient = gradient.of(pairs[at]);
        if (maximum) {
          feature.channels =
              reinterpret_cast<const int32_t*>(channel_map(channels[at], x, device).first);
        }
        plan_sweep(feature, x, gradients.out[at], total, limits);
      },
      maximum ? launch_max_map_backward : launch_attention_map_backward);
  return gradients.finish();
}

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(AT_FUSED_NAMESPACE, AT_FUSED_DEVICE_KEY, m) {
  m.impl("attention_map", AT_FUSED_BOX(attention_map));
  m.impl("attention_map_backward", AT_FUSED_BOX(attention_map_backward));
}
