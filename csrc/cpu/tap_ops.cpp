// The CPU implementations of torch.ops.at_fused.attention_tap_backward*. Their schemas are in _ops.

#include <vector>

#include "../box.h"
#include "../tap.h"
#include "kernels.h"
#include "tasks.h"

namespace at_fused {

void sweep_tap(const Tap& tap) {
  const Feature& feature = tap.feature;
  const bool in_place = tap.gradient.data == tap.out.data;
  const int64_t bytes = sample_bytes(feature), total = feature.B * bytes;
  if (!in_place) advise_huge_pages(const_cast<void*>(tap.out.data), total);
  std::vector<Task> tasks;
  cut(tasks, 0, feature.B, lines(feature), bytes, task_bytes(total), 1);
  // In place a line is in the cache when it is written.
  const bool stream = !in_place && !tap.maximum && writes_past_caches(total);
  run(tasks, total, [&](const Task& task) {
    for (int64_t b = task.b0; b < task.b1; ++b) {
      kernels().attention_tap_backward(
          feature, tap.gradient, b, task.begin, task.end, tap.p, tap.scale, tap.k.of(b),
          static_cast<const int32_t*>(tap.channels.of(b)), tap.out, stream);
    }
  });
}

}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(at_fused, CPU, m) {
  m.impl("attention_tap_backward", AT_FUSED_BOX(attention_tap_backward));
  m.impl("attention_tap_backward_", AT_FUSED_BOX(attention_tap_backward_));
}
