// The operators torch.ops.at_fused.*, on every device: those for maps and their gradients, as those
// for losses (losses.h), and their registration. Their schemas are in _ops.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "losses.h"

namespace at_fused {

// ---- maps -------------------------------------------------------------------------------------

struct MapArguments {
  std::vector<Feature> features;
  std::vector<Maps> maps, channels;  // with "max" the channels that won
  double p;
  Collapse collapse;
  Device device;

  int32_t* channels_of(size_t i, int64_t b) const {
    return channels.empty() ? nullptr : static_cast<int32_t*>(channels[i].of(b));
  }
};

void compute_maps(const MapArguments& arguments);

inline Tensors attention_map(Tensors tensors, double p, std::string collapse, Ints skip_tokens) {
  check_exponent(p);
  const Collapse collapsed = collapse_of(collapse);
  check_skip_tokens(skip_tokens, tensors.size());
  if (tensors.empty()) return {};
  MapArguments arguments{{}, {}, {}, p, collapsed, device_of(tensors[0])};
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t first = skipped(skip_tokens, i, tensors[i]);
    arguments.features.push_back(
        without_first(native_feature(tensors[i], arguments.device), first));
  }
  Tensors results;
  for (const bool of_channels : {false, true}) {
    if (of_channels && collapsed != Collapse::max) break;
    for (const Feature& feature : arguments.features) {
      results.push_back(new_map(feature, arguments.device, of_channels));
      (of_channels ? arguments.channels : arguments.maps).emplace_back(results.back());
    }
  }
  compute_maps(arguments);
  return results;
}

// ---- gradients of maps ------------------------------------------------------------------------

struct SweepArguments {
  const Gradients& gradients;
  const LossGradient& loss_gradient;
  const Ints& pairs;              // the number of each feature's pair
  std::vector<Maps> k, channels;  // coefficients, and with "max" the channels that have them
  double p;
  Device device;

  const int32_t* channels_of(size_t i, int64_t b) const {
    return channels.empty() ? nullptr : static_cast<const int32_t*>(channels[i].of(b));
  }
};

void compute_gradients(const SweepArguments& arguments);

inline Tensors attention_map_backward(Tensors tensors, Tensors coefficients,
                                      std::optional<Tensor> loss_gradient, Ints pairs, double p,
                                      Ints skip_tokens, Tensors channels) {
  const size_t n = tensors.size();
  STD_TORCH_CHECK(coefficients.size() == n, "at_fused: a coefficient map per feature");
  STD_TORCH_CHECK(channels.empty() || channels.size() == n,
                  "at_fused: a map of channels per feature, or none");
  STD_TORCH_CHECK(pairs.size() == n, "at_fused: a pair number per feature");
  check_exponent(p);
  if (n == 0) return {};
  const LossGradient above(loss_gradient, pairs, tensors);
  Gradients gradients(tensors, skip_tokens);
  SweepArguments arguments{gradients, above, pairs, {}, {}, p, device_of(tensors[0])};
  for (size_t i = 0; i < n; ++i) {
    const Feature& feature = gradients.features[i];
    arguments.k.push_back(coefficient_map(coefficients[i], feature, arguments.device));
    if (channels.empty()) continue;
    arguments.channels.push_back(channel_map(channels[i], feature, arguments.device));
  }
  compute_gradients(arguments);
  return gradients.finish();
}

// ---- the tap ----------------------------------------------------------------------------------

// out = gradient + scale * k[n] * |x|^(p-1) * sign(x), in one layout. `out` may be `gradient`.
struct Tap {
  Feature feature, gradient, out;
  Maps k, channels;  // the map's gradient, and with "max" the channels that have it
  double p, scale;
  Device device;
};

void compute_tap(const Tap& tap);

inline void compute_tap(Tap tap, Tensor& map_gradient, double p, Collapse collapse,
                        std::optional<Tensor>& channels) {
  tap.p = p;
  tap.scale = p * collapse_scale(collapse, tap.feature);
  tap.k = coefficient_map(map_gradient, tap.feature, tap.device);
  if (channels) tap.channels = channel_map(*channels, tap.feature, tap.device);
  compute_tap(tap);
}

inline Collapse check_tap(const Tensor& gradient, const Tensor& feature, double p,
                          const std::string& collapse, bool has_channels) {
  const Collapse collapsed = collapse_of(collapse);
  check_exponent(p);
  STD_TORCH_CHECK(feature.dim() >= 3, "at_fused: features must be (B, C, *spatial)");
  bool same = gradient.dim() == feature.dim();
  for (int64_t d = 0; same && d < feature.dim(); ++d) same = gradient.size(d) == feature.size(d);
  STD_TORCH_CHECK(same && gradient.scalar_type() == feature.scalar_type() &&
                      device_of(gradient) == device_of(feature),
                  "at_fused: a gradient must have the shape, dtype and device of its feature");
  STD_TORCH_CHECK((collapsed == Collapse::max) == has_channels,
                  "at_fused: a map of channels belongs to collapse 'max', and to no other");
  return collapsed;
}

inline Tensor attention_tap_backward(Tensor gradient, Tensor feature, Tensor map_gradient, double p,
                                     std::string collapse, std::optional<Tensor> channels) {
  const Collapse collapsed = check_tap(gradient, feature, p, collapse, channels.has_value());
  Tensors features{feature};
  Gradients gradients(features);
  Tap tap{gradients.features[0], {}, gradients.out[0]};
  tap.device = device_of(feature);
  if (!describe(gradient, tap.gradient) || tap.gradient.layout != tap.feature.layout) {
    Tensor copy = torch::stable::empty_like(gradients.written(0));
    torch::stable::copy_(copy, gradient);
    gradient = copy;
    describe(gradient, tap.gradient);
  }
  compute_tap(tap, map_gradient, p, collapsed, channels);
  return std::move(gradients.finish()[0]);
}

// In place where `gradient` and `feature` have one layout; else through copies.
inline void attention_tap_backward_(Tensor gradient, Tensor feature, Tensor map_gradient, double p,
                                    std::string collapse, std::optional<Tensor> channels) {
  const Collapse collapsed = check_tap(gradient, feature, p, collapse, channels.has_value());
  check_no_overlap(gradient);
  read_before(gradient, feature);
  read_before(gradient, map_gradient);
  if (channels) read_before(gradient, *channels);
  Tensor written = gradient;
  Tap tap{};
  tap.device = device_of(feature);
  tap.feature = native_feature(feature, tap.device);
  if (!describe(written, tap.out) || tap.out.layout != tap.feature.layout) {
    feature = torch::stable::contiguous(feature);
    written = torch::stable::contiguous(written);
    describe(feature, tap.feature);
    describe(written, tap.out);
  }
  tap.gradient = tap.out;
  compute_tap(tap, map_gradient, p, collapsed, channels);
  if (written.const_data_ptr() != gradient.const_data_ptr()) {
    torch::stable::copy_(gradient, written);
  }
}

// ---- as torch calls them ----------------------------------------------------------------------

// A string argument comes as an opaque handle, which is ours: torch's own conversion, before 2.14,
// leaks a copy of it in every call.
inline std::string unboxed(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}
template <class T>
T unboxed(T& value) {
  return std::move(value);
}

template <auto function>
struct Operator;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Operator<function> {
  template <class T>
  using Boxed = std::conditional_t<std::is_same_v<T, std::string>, StringHandle, T>;

  static Result call(Boxed<Arguments>... arguments) { return function(unboxed(arguments)...); }
};

inline void register_operators(torch::stable::detail::StableLibrary& library) {
#define AT_FUSED_REGISTER(name) library.impl(#name, TORCH_BOX(&Operator<&name>::call))
  AT_FUSED_REGISTER(at_loss);
  AT_FUSED_REGISTER(at_value_and_grad);
  AT_FUSED_REGISTER(map_loss);
  AT_FUSED_REGISTER(attention_map);
  AT_FUSED_REGISTER(attention_map_backward);
  AT_FUSED_REGISTER(attention_tap_backward);
  AT_FUSED_REGISTER(attention_tap_backward_);
#undef AT_FUSED_REGISTER
}

}  // namespace at_fused
