// The CPU implementations of torch.ops.at_fused.attention_map*. Their schemas are in _ops.

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../box.h"
#include "../map_arguments.h"
#include "kernels.h"
#include "losses.h"
#include "tasks.h"

namespace at_fused {
namespace {

// ---- attention_map ----------------------------------------------------------------------------

Tensors attention_map(Tensors tensors, double p, std::string collapse,
                      std::vector<int64_t> skip_tokens) {
  check_exponent(p);
  const Collapse collapsed = collapse_of(collapse);
  const bool maximum = collapsed == Collapse::max;
  const std::vector<Feature> features = native_features(tensors, skip_tokens);
  Tensors maps, channels;
  std::vector<Maps> out, out_channels;
  int64_t total = 0;
  for (size_t i = 0; i < features.size(); ++i) {
    const Feature& feature = features[i];
    const Device device = device_of(tensors[i]);
    maps.push_back(new_map(feature, device));
    out.emplace_back(maps[i], feature);
    if (maximum) {
      channels.push_back(new_rows(feature.B, feature.N, aoti_torch_dtype_int32(), device));
      out_channels.emplace_back(channels[i], feature.N, 4);
    }
    total += feature.B * sample_bytes(feature);
  }
  std::vector<Task> tasks;
  for (size_t i = 0; i < features.size(); ++i) {
    cut(tasks, int64_t(i), features[i].B, features[i].N, sample_bytes(features[i]),
        task_bytes(total), kPositionStep);
  }
  run(tasks, total, [&](const Task& task) {
    const Feature& feature = features[task.index];
    for (int64_t b = task.b0; b < task.b1; ++b) {
      void* to = out[task.index].of(b);
      if (maximum) {
        kernels().max_map(feature, b, task.begin, task.end, p, to,
                          static_cast<int32_t*>(out_channels[task.index].of(b)));
      } else {
        kernels().attention_map(feature, b, task.begin, task.end, p,
                                collapse_scale(collapsed, feature), to);
      }
    }
  });
  for (Tensor& map : channels) maps.push_back(std::move(map));
  return maps;
}

// ---- attention_map_backward -------------------------------------------------------------------

Tensors attention_map_backward(Tensors tensors, Tensors coefficients,
                               std::optional<Tensor> loss_gradient, std::vector<int64_t> pairs,
                               double p, std::vector<int64_t> skip_tokens, Tensors channels) {
  const size_t n = tensors.size();
  check_sweep(tensors, coefficients, channels, pairs, p);
  if (n == 0) return {};
  const bool maximum = !channels.empty();
  const Device device = device_of(tensors[0]);
  const LossGradient gradient(loss_gradient, pairs, tensors);
  Gradients gradients(tensors, skip_tokens);
  const std::vector<Feature>& features = gradients.features;
  std::vector<Maps> k(n), channel_maps(n);
  int64_t total = 0;
  for (size_t i = 0; i < n; ++i) {
    k[i] = coefficient_map(coefficients[i], features[i], device);
    if (maximum) channel_maps[i] = channel_map(channels[i], features[i], device);
    total += features[i].B * sample_bytes(features[i]);
  }
  std::vector<Task> tasks;
  for (size_t i = 0; i < n; ++i) {
    const int64_t bytes = sample_bytes(features[i]);
    advise_huge_pages(gradients.written[i].mutable_data_ptr(), features[i].B * bytes);
    cut(tasks, int64_t(i), features[i].B, lines(features[i]), bytes, task_bytes(total), 1);
  }
  const bool stream = writes_past_caches(total);
  run(tasks, total, [&](const Task& task) {
    const int64_t i = task.index;
    for (int64_t b = task.b0; b < task.b1; ++b) {
      if (maximum) {
        kernels().max_map_backward(
            features[i], b, task.begin, task.end, p, value_of(gradient, pairs[i], b), k[i].of(b),
            static_cast<const int32_t*>(channel_maps[i].of(b)), gradients.out[i]);
      } else {
        kernels().attention_map_backward(features[i], b, task.begin, task.end, p,
                                         value_of(gradient, pairs[i], b), k[i].of(b),
                                         gradients.out[i], stream);
      }
    }
  });
  return gradients.finish();
}

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(at_fused, CPU, m) {
  m.impl("attention_map", AT_FUSED_BOX(attention_map));
  m.impl("attention_map_backward", AT_FUSED_BOX(attention_map_backward));
}
