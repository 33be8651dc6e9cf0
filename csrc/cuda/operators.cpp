// The operators for maps and gradients on CUDA devices: they plan and launch the kernels.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "device.h"
#include "plan_features.h"

namespace at_fused {
namespace {

// Launches a list of features, in several launches if it is long. `options` are common to all.
template <class Params, class Member>
void launch_features(const std::vector<Member>& list, const Params& options, int64_t shared_bytes,
                     const DeviceScope& device, void (*run)(const Params&, const Launch&)) {
  constexpr size_t max_features = std::extent_v<decltype(Params::features)>;
  for (size_t begin = 0; begin < list.size(); begin += max_features) {
    Params params = options;
    params.count = int32_t(std::min(max_features, list.size() - begin));
    std::copy_n(&list[begin], params.count, params.features);
    const bool fp64 =
        std::any_of(params.features, params.features + params.count,
                    [](const Member& member) { return member.view.dtype == Dtype::float64; });
    const int64_t blocks = assign_tasks(params.features, params.count);
    run(params, device.launch(blocks, shared_bytes, fp64));
  }
}

}  // namespace

void compute_maps(const MapArguments& arguments) {
  const DeviceScope device(arguments.device);
  const bool is_max = arguments.collapse == Collapse::max;
  const int64_t total = total_bytes(arguments.features);
  std::vector<MapFeature> list;
  for (size_t i = 0; i < arguments.features.size(); ++i) {
    const Feature& x = arguments.features[i];
    MapFeature& feature = list.emplace_back();
    check_extent(x, x.B);
    feature.map = arguments.maps[i].data;
    feature.channels = arguments.channels[i].channels(0);
    feature.scale = collapse_scale(arguments.collapse, x);
    plan_map(feature, x, total, device.limits);
  }
  launch_features(list, MapParams{arguments.p, 0, {}}, is_max ? kArgmaxScratchBytes : kScratchBytes,
                  device, launch_attention_map);
}

// Skips features without coefficients: their gradients are already written.
void compute_gradients(const SweepArguments& arguments) {
  const DeviceScope device(arguments.device);
  const std::vector<Feature>& features = arguments.gradients.features;
  const LossGradient& upstream = arguments.loss_gradient;
  int64_t total = 0;
  for (size_t i = 0; i < features.size(); ++i) {
    if (arguments.k[i].data) total += total_bytes(features[i]);
  }
  std::vector<SweepFeature> list;
  for (size_t i = 0; i < features.size(); ++i) {
    if (!arguments.k[i].data) continue;
    SweepFeature& feature = list.emplace_back();
    check_extent(features[i], features[i].B);
    feature.k = arguments.k[i].data;
    feature.channels = arguments.channels[i].channels(0);
    feature.loss_gradient = upstream.address(arguments.pairs[i]);
    plan_sweep(feature, features[i], arguments.gradients.out[i], total, device.limits);
  }
  launch_features(list, SweepParams{arguments.p, 1, upstream.sample_stride, 0, upstream.fp64, {}},
                  0, device, launch_attention_map_backward);
}

void compute_tap(const Tap& tap) {
  const DeviceScope device(tap.device);
  check_extent(tap.feature, tap.feature.B);
  std::vector<SweepFeature> list(1);
  list[0].k = tap.k.data;
  list[0].channels = tap.channels.channels(0);
  plan_sweep(list[0], tap.feature, tap.out, total_bytes(tap.feature), device.limits, &tap.gradient);
  launch_features(list, SweepParams{tap.p, tap.scale, 0, 0, false, {}}, 0, device,
                  launch_attention_map_backward);
}

}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(AT_FUSED_NAMESPACE, AT_FUSED_DEVICE_KEY, m) {
  at_fused::register_operators(m);
}
