// The CUDA implementations of torch.ops.at_fused.attention_map*: arguments to plans, plans to
// launches. Their schemas are in _ops.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../arguments.h"
#include "device.h"
#include "launch.h"
#include "tasks.h"

namespace at_fused {
namespace {

// ---- attention_map ----------------------------------------------------------------------------

Tensors attention_map(Tensors tensors, double p, std::string collapse, bool absolute,
                      std::vector<int64_t> sizes) {
  check_exponent(p);
  if (tensors.empty()) return {};
  const Device device = device_of(tensors[0]);
  const OnDevice scope(device);
  const Limits limits = limits_of(device);
  const std::vector<Feature> features = native_features(tensors);
  int64_t total = 0;
  for (const Feature& x : features) total += total_bytes(x);
  Tensors maps;
  for (size_t begin = 0; begin < features.size(); begin += kMaxFeatures) {
    MapParams params{};
    params.p = p;
    Launch launch{0, kScratchBytes, false, scope.stream()};
    params.count = int32_t(std::min<size_t>(kMaxFeatures, features.size() - begin));
    for (int32_t i = 0; i < params.count; ++i) {
      const Feature& x = features[begin + size_t(i)];
      check_extent(x);
      MapFeature& feature = params.features[i];
      maps.push_back(new_map(x, device));
      feature.map = maps.back().mutable_data_ptr();
      feature.scale = collapse_scale(collapse_of(collapse), x);
      feature.first_task = begin_task(launch.blocks);
      launch.blocks += plan_map(feature, x, total, limits);
      launch.fp64 |= accumulates_fp64(x);
    }
    begin_task(launch.blocks);
    launch_attention_map(params, launch);
  }
  return maps;
}

// ---- attention_map_backward -------------------------------------------------------------------

Tensors attention_map_backward(Tensors tensors, Tensors coefficients,
                               std::optional<Tensor> loss_gradient, std::vector<int64_t> pairs,
                               double p, bool absolute, std::vector<int64_t> sizes,
                               Tensors channels) {
  const size_t n = tensors.size();
  check_sweep(tensors, coefficients, pairs, p);
  if (n == 0) return {};
  const Device device = device_of(tensors[0]);
  const OnDevice scope(device);
  const Limits limits = limits_of(device);
  const LossGradient gradient(loss_gradient, pairs, device);
  Gradients gradients(tensors);
  int64_t total = 0;
  for (const Feature& x : gradients.features) total += 2 * total_bytes(x);
  for (size_t begin = 0; begin < n; begin += kMaxFeatures) {
    SweepParams params{};
    params.p = p;
    params.loss_gradient_fp64 = gradient.fp64;
    Launch launch{0, 0, false, scope.stream()};
    params.count = int32_t(std::min<size_t>(kMaxFeatures, n - begin));
    for (int32_t i = 0; i < params.count; ++i) {
      const size_t at = begin + size_t(i);
      const Feature& x = gradients.features[at];
      check_extent(x);
      SweepFeature& feature = params.features[i];
      feature.k = coefficient_map(coefficients[at], x, x.N, device).first;
      feature.loss_gradient = gradient.of(pairs[at]);
      feature.first_task = begin_task(launch.blocks);
      launch.blocks += plan_sweep(feature, x, gradients.out[at], total, limits);
      launch.fp64 |= accumulates_fp64(x);
    }
    begin_task(launch.blocks);
    launch_attention_map_backward(params, launch);
  }
  return gradients.finish();
}

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(AT_FUSED_NAMESPACE, AT_FUSED_DEVICE_KEY, m) {
  m.impl("attention_map", TORCH_BOX(&at_fused::attention_map));
  m.impl("attention_map_backward", TORCH_BOX(&at_fused::attention_map_backward));
}
