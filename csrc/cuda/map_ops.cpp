// The CUDA implementations of torch.ops.at_fused.attention_map*: arguments to plans, plans to
// launches. Their schemas are in _ops.

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../box.h"
#include "../map_arguments.h"
#include "checks.h"
#include "device.h"
#include "launch.h"
#include "plan_pool.h"

namespace at_fused {
namespace {

// ---- attention_map ----------------------------------------------------------------------------

// Launches the members of a list that `which` names, in parts. `params` holds the options of all
// parts; `plan(at, feature)` cuts member `at` and returns its tasks.
template <class Params, class Plan, class Run>
void launch_parts(const std::vector<Feature>& features, const std::vector<size_t>& which,
                  const Params& options, int32_t shared_bytes, void* stream, Plan plan, Run run) {
  constexpr size_t most = std::extent_v<decltype(Params::features)>;
  for (size_t begin = 0; begin < which.size(); begin += most) {
    Params params = options;
    params.count = int32_t(std::min(most, which.size() - begin));
    Launch launch{0, shared_bytes, false, stream};
    for (int32_t i = 0; i < params.count; ++i) {
      const size_t at = which[begin + size_t(i)];
      params.features[i].first_task = check_blocks(launch.blocks);
      launch.blocks += plan(at, params.features[i]);
      launch.fp64 |= accumulates_fp64(features[at]);
    }
    check_blocks(launch.blocks);
    run(params, launch);
  }
}

// Members of a list that are pooled, and the others.
struct Members {
  std::vector<size_t> pooled, plain;

  explicit Members(const std::vector<Pool>& pools) {
    for (size_t i = 0; i < pools.size(); ++i) (pools[i].pools() ? pooled : plain).push_back(i);
  }
};

int64_t bytes_of(const std::vector<Feature>& features, const std::vector<size_t>& which) {
  int64_t total = 0;
  for (size_t at : which) total += total_bytes(features[at]);
  return total;
}

Tensors attention_map(Tensors tensors, double p, std::string collapse, bool absolute,
                      std::vector<int64_t> sizes) {
  check_exponent(p);
  const Collapse collapsed = collapse_of(collapse);
  const bool maximum = collapsed == Collapse::max;
  const MapPower power(p, absolute, maximum);
  if (tensors.empty()) return {};
  const Device device = device_of(tensors[0]);
  const OnDevice scope(device);
  const Limits limits = limits_of(device);
  const std::vector<Feature> features = native_features(tensors);
  for (const Feature& x : features) check_extent(x);
  const std::vector<Pool> pools = pools_of(tensors, sizes);
  Tensors maps, channels;
  for (size_t i = 0; i < features.size(); ++i) {
    const Feature& x = features[i];
    maps.push_back(new_map(x, pools[i].positions(), device));
    if (!maximum) continue;
    channels.push_back(new_rows(x.B, pools[i].positions(), aoti_torch_dtype_int32(), device));
  }
  const auto begin = [&](size_t at, MapFeature& feature) {
    feature.map = maps[at].mutable_data_ptr();
    feature.scale = collapse_scale(collapsed, features[at]);
    if (maximum) feature.channels = static_cast<int32_t*>(channels[at].mutable_data_ptr());
  };
  const Members members(pools);
  const int32_t shared_bytes = maximum ? kMaximumBytes : kScratchBytes;
  const int64_t plain = bytes_of(features, members.plain);
  launch_parts(
      features, members.plain, MapParams{p, 0, power.absolute, {}}, shared_bytes, scope.stream(),
      [&](size_t at, MapFeature& feature) {
        begin(at, feature);
        return plan_map(feature, features[at], plain, limits);
      },
      maximum ? launch_max_map : launch_attention_map);
  const int64_t pooled = bytes_of(features, members.pooled);
  launch_parts(
      features, members.pooled, PooledParams{p, 0, power.absolute, {}}, shared_bytes,
      scope.stream(),
      [&](size_t at, PooledFeature& feature) {
        begin(at, feature);
        return plan_pooled_map(feature, features[at], pools[at], pooled, limits);
      },
      launch_pooled_map);
  for (Tensor& map : channels) maps.push_back(std::move(map));
  return maps;
}

// ---- attention_map_backward -------------------------------------------------------------------

Tensors attention_map_backward(Tensors tensors, Tensors coefficients,
                               std::optional<Tensor> loss_gradient, std::vector<int64_t> pairs,
                               double p, bool absolute, std::vector<int64_t> sizes,
                               Tensors channels) {
  const size_t n = tensors.size();
  check_sweep(tensors, coefficients, channels, pairs, p);
  const bool maximum = !channels.empty();
  const MapPower power(p, absolute, maximum);
  if (n == 0) return {};
  const Device device = device_of(tensors[0]);
  const OnDevice scope(device);
  const Limits limits = limits_of(device);
  const LossGradient gradient(loss_gradient, pairs, tensors);
  Gradients gradients(tensors);
  const std::vector<Feature>& features = gradients.features;
  for (const Feature& x : features) check_extent(x);
  const std::vector<Pool> pools = pools_of(tensors, sizes);
  const auto begin = [&](size_t at, auto& feature) {
    const Feature& x = features[at];
    const int64_t positions = pools[at].positions();
    feature.k = coefficient_map(coefficients[at], x, positions, device).first;
    feature.loss_gradient = {gradient.of(pairs[at]), gradient.sample_stride};
    if (!maximum) return;
    feature.channels =
        reinterpret_cast<const int32_t*>(channel_map(channels[at], x, positions, device).first);
  };
  const Members members(pools);
  const int64_t plain = 2 * bytes_of(features, members.plain);
  launch_parts(
      features, members.plain, SweepParams{p, 0, gradient.fp64, power.absolute, {}}, 0,
      scope.stream(),
      [&](size_t at, SweepFeature& feature) {
        begin(at, feature);
        return plan_sweep(feature, features[at], gradients.out[at], plain, limits);
      },
      maximum ? launch_max_map_backward : launch_attention_map_backward);
  const int64_t pooled = 2 * bytes_of(features, members.pooled);
  launch_parts(
      features, members.pooled, PooledSweepParams{p, 0, gradient.fp64, power.absolute, {}},
      kPartBytes + kPooledBytes, scope.stream(),
      [&](size_t at, PooledSweep& feature) {
        begin(at, feature);
        return plan_pooled_sweep(feature, features[at], gradients.out[at], pools[at], pooled,
                                 limits);
      },
      launch_pooled_map_backward);
  return gradients.finish();
}

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(AT_FUSED_NAMESPACE, AT_FUSED_DEVICE_KEY, m) {
  m.impl("attention_map", AT_FUSED_BOX(attention_map));
  m.impl("attention_map_backward", AT_FUSED_BOX(attention_map_backward));
}
