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

struct MapOptions {
  double p;
  bool keeps_sign, maximum;
};

// The maps of some features, and the channels of maxima, in launches of kMaxFeatures.
void map_features(const std::vector<Feature>& features, const std::vector<double>& scales,
                  const Tensors& maps, const Tensors& channels, const std::vector<size_t>& which,
                  const MapOptions& options, const Limits& limits, void* stream) {
  int64_t total = 0;
  for (size_t at : which) total += total_bytes(features[at]);
  for (size_t begin = 0; begin < which.size(); begin += kMaxFeatures) {
    MapParams params{};
    params.p = options.p;
    params.keeps_sign = options.keeps_sign;
    params.count = int32_t(std::min<size_t>(kMaxFeatures, which.size() - begin));
    Launch launch{0, options.maximum ? kMaximumBytes : kScratchBytes, false, stream};
    for (int32_t i = 0; i < params.count; ++i) {
      const size_t at = which[begin + size_t(i)];
      const Feature& x = features[at];
      MapFeature& feature = params.features[i];
      feature.map = maps[at].mutable_data_ptr();
      if (options.maximum) {
        feature.channels = static_cast<int32_t*>(channels[at].mutable_data_ptr());
      }
      feature.scale = scales[at];
      feature.first_task = begin_task(launch.blocks);
      launch.blocks += plan_map(feature, x, total, limits);
      launch.fp64 |= accumulates_fp64(x);
    }
    begin_task(launch.blocks);
    (options.maximum ? launch_max_map : launch_attention_map)(params, launch);
  }
}

Tensors attention_map(Tensors tensors, double p, std::string collapse, bool absolute,
                      std::vector<int64_t> sizes) {
  check_exponent(p);
  const Collapse collapsed = collapse_of(collapse);
  const MapOptions options{p, keeps_sign(p, absolute), collapsed == Collapse::max};
  if (options.maximum) check_maximum(options.keeps_sign);
  if (tensors.empty()) return {};
  const Device device = device_of(tensors[0]);
  const OnDevice scope(device);
  const Limits limits = limits_of(device);
  const std::vector<Feature> features = native_features(tensors);
  const std::vector<Pool> pools = pools_of(tensors, sizes);
  Tensors maps, channels;
  std::vector<double> scales;
  std::vector<size_t> plain;
  for (size_t i = 0; i < features.size(); ++i) {
    const Feature& x = features[i];
    check_extent(x);
    const int64_t positions = pools[i].positions();
    maps.push_back(new_map(x, positions, device));
    if (options.maximum) {
      channels.push_back(new_rows(x.B, positions, aoti_torch_dtype_int32(), device));
    }
    scales.push_back(collapse_scale(collapsed, x));
    plain.push_back(i);
  }
  map_features(features, scales, maps, channels, plain, options, limits, scope.stream());
  for (Tensor& map : channels) maps.push_back(std::move(map));
  return maps;
}

// ---- attention_map_backward -------------------------------------------------------------------

Tensors attention_map_backward(Tensors tensors, Tensors coefficients,
                               std::optional<Tensor> loss_gradient, std::vector<int64_t> pairs,
                               double p, bool absolute, std::vector<int64_t> sizes,
                               Tensors channels) {
  const size_t n = tensors.size();
  check_sweep(tensors, coefficients, pairs, p);
  const bool maximum = !channels.empty(), with_sign = keeps_sign(p, absolute);
  if (maximum) check_maximum(with_sign);
  STD_TORCH_CHECK(!maximum || channels.size() == n, "at_fused: a map of channels per feature");
  if (n == 0) return {};
  const Device device = device_of(tensors[0]);
  const OnDevice scope(device);
  const Limits limits = limits_of(device);
  const LossGradient gradient(loss_gradient, pairs, device);
  Gradients gradients(tensors);
  const std::vector<Pool> pools = pools_of(tensors, sizes);
  int64_t total = 0;
  for (const Feature& x : gradients.features) total += 2 * total_bytes(x);
  for (size_t begin = 0; begin < n; begin += kMaxFeatures) {
    SweepParams params{};
    params.p = p;
    params.loss_gradient_fp64 = gradient.fp64;
    params.keeps_sign = with_sign;
    Launch launch{0, 0, false, scope.stream()};
    params.count = int32_t(std::min<size_t>(kMaxFeatures, n - begin));
    for (int32_t i = 0; i < params.count; ++i) {
      const size_t at = begin + size_t(i);
      const Feature& x = gradients.features[at];
      check_extent(x);
      SweepFeature& feature = params.features[i];
      feature.k = coefficient_map(coefficients[at], x, x.N, device).first;
      if (maximum) {
        feature.channels =
            reinterpret_cast<const int32_t*>(channel_map(channels[at], x, x.N, device).first);
      }
      feature.loss_gradient = gradient.of(pairs[at]);
      feature.first_task = begin_task(launch.blocks);
      launch.blocks += plan_sweep(feature, x, gradients.out[at], total, limits);
      launch.fp64 |= accumulates_fp64(x);
    }
    begin_task(launch.blocks);
    (maximum ? launch_max_map_backward : launch_attention_map_backward)(params, launch);
  }
  return gradients.finish();
}

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(AT_FUSED_NAMESPACE, AT_FUSED_DEVICE_KEY, m) {
  m.impl("attention_map", TORCH_BOX(&at_fused::attention_map));
  m.impl("attention_map_backward", TORCH_BOX(&at_fused::attention_map_backward));
}
