// attention_tap_backward for every device: what it is given, brought to one layout.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "map_arguments.h"

namespace at_fused {

// out = gradient + scale * k[n] * |x|^(p-1) * sign(x). `out` may be `gradient`.
class Tap {
 public:
  Feature feature, gradient, out;
  Maps k, channels;  // the map's gradient, and with "max" the channels that have it
  double p, scale;
  bool maximum;
  Device device;

  // In place where `gradient` and `feature` have one layout; else through copies.
  Tap(Tensor gradient, Tensor feature, Tensor map_gradient, double p, const std::string& collapse,
      std::optional<Tensor> channels, bool in_place)
      : p(p),
        maximum(collapse_of(collapse) == Collapse::max),
        device(device_of(feature)),
        feature_(std::move(feature)),
        map_gradient_(std::move(map_gradient)),
        channels_(std::move(channels)) {
    check_exponent(p);
    check(gradient);
    STD_TORCH_CHECK(maximum == channels_.has_value(),
                    "at_fused: a map of channels belongs to collapse 'max', and to no other");
    if (in_place) {
      write_into(gradient);
    } else {
      write_new(gradient);
    }
    scale = p * collapse_scale(collapse_of(collapse), this->feature);
    k = coefficient_map(map_gradient_, this->feature, device);
    if (channels_) this->channels = channel_map(*channels_, this->feature, device);
  }

  // The gradient with the strides that the caller was promised.
  Tensor finish() {
    if (written_.mutable_data_ptr() != result_.mutable_data_ptr()) {
      torch::stable::copy_(result_, written_);
    }
    return std::move(result_);
  }

 private:
  void check(const Tensor& gradient) const {
    STD_TORCH_CHECK(feature_.dim() >= 3, "at_fused: features must be (B, C, *spatial)");
    bool same = gradient.dim() == feature_.dim();
    for (int64_t d = 0; same && d < feature_.dim(); ++d) {
      same = gradient.size(d) == feature_.size(d);
    }
    STD_TORCH_CHECK(
        same && gradient.scalar_type() == feature_.scalar_type() && device_of(gradient) == device,
        "at_fused: a gradient must have the shape, dtype and device of its feature");
  }

  void write_into(const Tensor& gradient) {
    check_apart(gradient);
    read_before(gradient, feature_);
    read_before(gradient, map_gradient_);
    if (channels_) read_before(gradient, *channels_);
    result_ = written_ = gradient;
    feature = native_feature(feature_, device);
    if (!describe(written_, out) || out.layout != feature.layout) {
      feature_ = torch::stable::contiguous(feature_);
      written_ = torch::stable::contiguous(written_);
      describe(feature_, feature);
      describe(written_, out);
    }
    this->gradient = out;
  }

  // That no two elements lie in one place.
  static void check_apart(const Tensor& gradient) {
    int64_t reach = 1;
    for (const auto& [stride, size] : extents(gradient, 0)) {
      STD_TORCH_CHECK(stride >= reach,
                      "at_fused: a gradient that is written in place must not be expanded, nor "
                      "overlap itself");
      reach += (size - 1) * stride;
    }
  }

  // The bytes from a tensor's first to its last element.
  static std::pair<uintptr_t, uintptr_t> bytes_of(const Tensor& tensor) {
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    return {begin, begin + uintptr_t(last + 1) * tensor.element_size()};
  }

  // What may lie where the gradient is written is read from a copy.
  static void read_before(const Tensor& gradient, Tensor& read) {
    const auto [begin, end] = bytes_of(gradient);
    const auto [first, last] = bytes_of(read);
    if (first < end && begin < last) read = torch::stable::clone(read);
  }

  void write_new(const Tensor& given) {
    Tensors features{feature_};
    Gradients gradients(features);
    feature_ = features[0];
    feature = gradients.features[0];
    out = gradients.out[0];
    written_ = gradients.written[0];
    result_ = gradients.result(0);
    gradient_ = given;
    if (!describe(gradient_, gradient) || gradient.layout != feature.layout) {
      gradient_ = torch::stable::empty_like(written_);
      torch::stable::copy_(gradient_, given);
      describe(gradient_, gradient);
    }
  }

  Tensor feature_, map_gradient_;
  std::optional<Tensor> channels_;
  Tensor gradient_, written_, result_;
};

// Writes `out`: a device's own part.
void sweep_tap(const Tap& tap);

inline Tensor attention_tap_backward(Tensor gradient, Tensor feature, Tensor map_gradient, double p,
                                     std::string collapse, std::optional<Tensor> channels) {
  Tap tap(gradient, feature, map_gradient, p, collapse, channels, false);
  sweep_tap(tap);
  return tap.finish();
}

inline void attention_tap_backward_(Tensor gradient, Tensor feature, Tensor map_gradient, double p,
                                    std::string collapse, std::optional<Tensor> channels) {
  Tap tap(gradient, feature, map_gradient, p, collapse, channels, true);
  sweep_tap(tap);
  tap.finish();
}

}  // namespace at_fused
