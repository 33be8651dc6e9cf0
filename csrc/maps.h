// The operators for maps, their gradients and the tap, for all devices. They check their arguments
// and convert them to plain structs; cpu/operators.cpp and cuda/operators.cpp compute.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "losses.h"

namespace at_fused {

// ---- maps -------------------------------------------------------------------------------------

struct MapArguments {
  std::vector<Feature> features;
  std::vector<Maps> maps, channels;  // channels: argmax channels for "max", else null
  double p;
  Collapse collapse;
  Device device;
};

void compute_maps(const MapArguments& arguments);

inline Tensors attention_map(Tensors tensors, double p, std::string collapse, Ints skip_tokens) {
  check_exponent(p);
  const Collapse mode = collapse_of(collapse);
  if (tensors.empty()) return {};
  MapArguments arguments{{}, {}, {}, p, mode, device_of(tensors[0])};
  Tensors results, channels;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t skip = skipped_tokens(skip_tokens, tensors.size(), i, tensors[i]);
    const Feature feature = without_first(native_feature(tensors[i], arguments.device), skip);
    arguments.features.push_back(feature);
    arguments.maps.emplace_back(results.emplace_back(new_map(feature, arguments.device)));
    Maps& argmax = arguments.channels.emplace_back();
    if (mode != Collapse::max) continue;
    argmax = Maps(channels.emplace_back(new_map(feature, arguments.device, true)));
  }
  results.insert(results.end(), channels.begin(), channels.end());
  compute_maps(arguments);
  return results;
}

// ---- gradients of maps ------------------------------------------------------------------------

struct SweepArguments {
  const Gradients& gradients;
  const LossGradient& loss_gradient;
  const Ints& pairs;              // the index of each feature's pair
  std::vector<Maps> k, channels;  // coefficients; argmax channels for "max", else null
  double p;
  Device device;
};

void compute_gradients(const SweepArguments& arguments);

inline Tensors attention_map_backward(Tensors tensors, Tensors coefficients,
                                      std::optional<Tensor> loss_gradient, Ints pairs, double p,
                                      Ints skip_tokens, Tensors channels) {
  const size_t n = tensors.size();
  STD_TORCH_CHECK(coefficients.size() == n, "at_fused: coefficients must have one map per feature");
  STD_TORCH_CHECK(channels.empty() || channels.size() == n,
                  "at_fused: channels must have one map per feature, or be empty");
  STD_TORCH_CHECK(pairs.size() == n, "at_fused: pairs must have one number per feature");
  check_exponent(p);
  if (n == 0) return {};
  const LossGradient upstream(loss_gradient, tensors, pairs);
  Gradients gradients(tensors, skip_tokens, n);
  SweepArguments arguments{gradients, upstream, pairs, {}, {}, p, device_of(tensors[0])};
  for (size_t i = 0; i < n; ++i) {
    const Feature& feature = gradients.features[i];
    arguments.k.push_back(coefficient_map(coefficients[i], feature, arguments.device));
    Maps& argmax = arguments.channels.emplace_back();
    if (!channels.empty()) argmax = channel_map(channels[i], feature, arguments.device);
  }
  compute_gradients(arguments);
  return gradients.finish();
}

// ---- the tap ----------------------------------------------------------------------------------

// out = gradient + scale * k[n] * |x|^(p-1) * sign(x), in one layout. `out` may be `gradient`.
struct Tap {
  Feature feature, gradient, out;
  Maps k, channels;  // gradient of the map; argmax channels for "max", else null
  double p, scale;
  Device device;
};

void compute_tap(const Tap& tap);

inline Tensor tap_backward(bool in_place, Tensor gradient, Tensor feature, Tensor map_gradient,
                           double p, const std::string& collapse, std::optional<Tensor> channels) {
  const Collapse mode = collapse_of(collapse);
  check_exponent(p);
  STD_TORCH_CHECK(feature.dim() >= 3, "at_fused: features must be (B, C, *spatial)");
  bool same_shape = gradient.dim() == feature.dim();
  for (int64_t d = 0; same_shape && d < feature.dim(); ++d) {
    same_shape = gradient.size(d) == feature.size(d);
  }
  STD_TORCH_CHECK(same_shape && gradient.scalar_type() == feature.scalar_type() &&
                      device_of(gradient) == device_of(feature),
                  "at_fused: a gradient must have the shape, dtype and device of its feature");
  STD_TORCH_CHECK((mode == Collapse::max) == channels.has_value(),
                  "at_fused: channels must be passed with collapse 'max', and only then");
  const Tensor original = feature;
  Tap tap{};
  tap.device = device_of(feature);
  tap.feature = native_feature(feature, tap.device);
  Tensor out = in_place ? gradient : new_like(original);
  const Tensor buffer = gradient_buffer(out, feature, tap.feature, tap.out);
  if (!view_as_feature(gradient, tap.gradient) || tap.gradient.layout != tap.feature.layout) {
    Tensor copy = torch::stable::empty_like(buffer);
    torch::stable::copy_(copy, gradient);
    gradient = copy;
    view_as_feature(gradient, tap.gradient);
  }
  tap.p = p;
  tap.scale = p * collapse_scale(mode, tap.feature);
  tap.k = coefficient_map(map_gradient, tap.feature, tap.device);
  if (channels) tap.channels = channel_map(*channels, tap.feature, tap.device);
  compute_tap(tap);
  if (buffer.get() != out.get()) torch::stable::copy_(out, buffer);
  return out;
}

inline Tensor attention_tap_backward(Tensor gradient, Tensor feature, Tensor map_gradient, double p,
                                     std::string collapse, std::optional<Tensor> channels) {
  return tap_backward(false, gradient, feature, map_gradient, p, collapse, channels);
}

inline void attention_tap_backward_(Tensor gradient, Tensor feature, Tensor map_gradient, double p,
                                    std::string collapse, std::optional<Tensor> channels) {
  check_no_overlap(gradient);
  copy_if_aliased(gradient, feature);
  copy_if_aliased(gradient, map_gradient);
  if (channels) copy_if_aliased(gradient, *channels);
  tap_backward(true, gradient, feature, map_gradient, p, collapse, channels);
}

}  // namespace at_fused
