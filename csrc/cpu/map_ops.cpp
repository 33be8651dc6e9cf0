// The CPU implementations of torch.ops.at_fused.attention_map*. Their schemas are in _ops.

#include <algorithm>
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

// A thread's memory for the general kernels.
void* scratch_of(const Feature& feature, const GeneralMap& general) {
  thread_local std::vector<double> scratch;
  scratch.resize(std::max(scratch.size(), size_t(general_scratch(feature, general))));
  return scratch.data();
}

// What few people use goes through kernels of its own.
bool is_general(const GeneralMap& map) { return map.max || map.pool.pools(); }

Tensors attention_map(Tensors tensors, double p, std::string collapse, bool absolute,
                      std::vector<int64_t> sizes) {
  check_exponent(p);
  const Collapse collapsed = collapse_of(collapse);
  const MapPower power(p, absolute, collapsed == Collapse::max);
  const std::vector<Feature> features = native_features(tensors);
  const std::vector<Pool> pools = pools_of(tensors, sizes);
  Tensors maps, channels;
  std::vector<Maps> out, out_channels(features.size());
  std::vector<GeneralMap> general;
  int64_t total = 0;
  for (size_t i = 0; i < features.size(); ++i) {
    const Feature& feature = features[i];
    const Device device = device_of(tensors[i]);
    const int64_t positions = pools[i].positions();
    general.push_back({p, collapse_scale(collapsed, feature), power.absolute, power.max, pools[i]});
    maps.push_back(new_map(feature, positions, device));
    out.emplace_back(maps[i], positions, map_element_size(feature));
    if (power.max) {
      channels.push_back(new_rows(feature.B, positions, aoti_torch_dtype_int32(), device));
      out_channels[i] = Maps(channels[i], positions, 4);
    }
    total += feature.B * sample_bytes(feature);
  }
  std::vector<Task> tasks;
  for (size_t i = 0; i < features.size(); ++i) {
    const int64_t row = pools[i].pools() ? pools[i].out[2] : 1;
    cut(tasks, int64_t(i), features[i].B, pools[i].positions(), sample_bytes(features[i]),
        task_bytes(total), (kPositionStep + row - 1) / row * row);
  }
  run(tasks, total, [&](const Task& task) {
    const Feature& feature = features[task.index];
    const GeneralMap& map = general[task.index];
    for (int64_t b = task.b0; b < task.b1; ++b) {
      void* to = out[task.index].of(b);
      if (is_general(map)) {
        kernels().general_map(feature, map, b, task.begin, task.end, to,
                              static_cast<int32_t*>(out_channels[task.index].of(b)),
                              scratch_of(feature, map));
      } else {
        kernels().attention_map(feature, b, task.begin, task.end, p, map.absolute, map.scale, to);
      }
    }
  });
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
  if (n == 0) return {};
  const MapPower power(p, absolute, !channels.empty());
  const Device device = device_of(tensors[0]);
  const LossGradient gradient(loss_gradient, pairs, tensors);
  const std::vector<Pool> pools = pools_of(tensors, sizes);
  Gradients gradients(tensors);
  const std::vector<Feature>& features = gradients.features;
  std::vector<Maps> k(n), channel_maps(n);
  std::vector<GeneralMap> general(n);
  int64_t total = 0;
  for (size_t i = 0; i < n; ++i) {
    const int64_t positions = pools[i].positions();
    k[i] = coefficient_map(coefficients[i], features[i], positions, device);
    if (power.max) channel_maps[i] = channel_map(channels[i], features[i], positions, device);
    general[i] = {p, 1.0, power.absolute, power.max, pools[i]};
    total += features[i].B * sample_bytes(features[i]);
  }
  std::vector<Task> tasks;
  for (size_t i = 0; i < n; ++i) {
    const int64_t bytes = sample_bytes(features[i]);
    const bool rows = pools[i].pools() && features[i].layout == Layout::interleaved;
    advise_huge_pages(gradients.written[i].mutable_data_ptr(), features[i].B * bytes);
    cut(tasks, int64_t(i), features[i].B, lines(features[i]), bytes, task_bytes(total),
        rows ? pools[i].in[2] : 1);
  }
  const bool stream = total > last_level_cache_bytes();
  run(tasks, total, [&](const Task& task) {
    const int64_t i = task.index;
    for (int64_t b = task.b0; b < task.b1; ++b) {
      if (is_general(general[i])) {
        kernels().general_backward(features[i], general[i], b, task.begin, task.end,
                                   value_of(gradient, pairs[i], b), k[i].of(b),
                                   static_cast<const int32_t*>(channel_maps[i].of(b)),
                                   gradients.out[i], scratch_of(features[i], general[i]));
      } else {
        kernels().attention_map_backward(features[i], b, task.begin, task.end, p, power.absolute,
                                         value_of(gradient, pairs[i], b), k[i].of(b), gradients.out[i],
                                         stream);
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
