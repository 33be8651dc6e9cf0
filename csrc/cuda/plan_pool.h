// plan.h for features that are pooled on their way.
#pragma once

#include "plan.h"

namespace at_fused {

// What a task of a pooled gradient has in shared memory: what it is (pooled_map_backward.cu: Part),
// and what its outputs send back.
constexpr int32_t kPartBytes = 128;
constexpr int32_t kPooledBytes = 16 << 10;

inline int64_t power_of_two_down(int64_t x) { return x < 1 ? 1 : power_of_two_up(x / 2 + 1); }

// Threads that add up a window: about its width, so that a warp reads whole rows of inputs.
inline int32_t pool_share(const Feature& x, const Pool& pool) {
  if (x.layout == Layout::interleaved) return 1;
  return int32_t(std::min<int64_t>(32, power_of_two_down(divide_up(pool.in[2], pool.out[2]))));
}

// Positions under way at a time. In interleaved features a warp has one, if it has the channels.
inline int32_t pool_places(const Feature& x, int64_t positions, int64_t channels, int32_t share) {
  const int64_t members =
      x.layout == Layout::planar ? 1 : std::min<int64_t>(32, power_of_two_up(channels));
  return int32_t(std::min(kThreads / (members * share), power_of_two_up(positions)));
}

// Cuts one feature of a list of `total` bytes for its pooled map; returns the number of its tasks.
inline int64_t plan_pooled_map(PooledFeature& feature, const Feature& x, const Pool& pool,
                               int64_t total, const Limits& limits) {
  const Pieces pieces = cut_positions(pool.positions(), sample_bytes(x), task_bytes(total, limits));
  feature.view = view_of(x, Access{1, 1, 1});
  feature.pool = pool;
  feature.pieces = int32_t(pieces.count);
  feature.positions = int32_t(pieces.positions);
  feature.share = pool_share(x, pool);
  feature.places = pool_places(x, pieces.positions, x.C, feature.share);
  return x.B * pieces.count;
}

// The most outputs of a dimension whose windows reach into `inputs` adjacent ones.
inline int64_t outputs_of_box(int64_t inputs, int64_t in, int64_t out) {
  return inputs == in ? out : std::min(out, divide_up(inputs * out, in) + 1);
}

// Cuts one feature of a list of `total` bytes for the gradient of its pooled map: boxes of inputs
// whose outputs fit into kPooledBytes, for as many channels as do, and in interleaved features for
// enough to fill a warp. Returns the number of its tasks.
inline int64_t plan_pooled_sweep(PooledSweep& feature, const Feature& x, const Feature& out,
                                 const Pool& pool, int64_t total, const Limits& limits) {
  const int64_t room = kPooledBytes / map_element_size(x);
  const int64_t least = x.layout == Layout::interleaved ? std::min<int64_t>(x.C, 32) : 1;
  int64_t box[] = {pool.in[0], pool.in[1], pool.in[2]};
  const auto outputs = [&] {
    int64_t count = 1;
    for (int d = 0; d < 3; ++d) count *= outputs_of_box(box[d], pool.in[d], pool.out[d]);
    return count;
  };
  for (int d = 0; d < 3; ++d) {
    while (box[d] > 1 && outputs() * least > room) box[d] = divide_up(box[d], 2);
  }
  const int64_t inputs = box[0] * box[1] * box[2];
  const int64_t worth = task_bytes(total, limits) / (2 * inputs * element_size(x.dtype));
  int64_t group = std::min(x.C, std::clamp(worth, least, std::max(least, room / outputs())));
  if (group < x.C) group -= group % least;
  feature.view = view_of(x, Access{1, 1, 1});
  feature.pool = pool;
  feature.out = const_cast<void*>(out.data);
  feature.batch = out.batch;
  feature.line = out.line;
  feature.group = int32_t(group);
  int64_t tasks = x.B * divide_up(x.C, group);
  for (int d = 0; d < 3; ++d) {
    feature.box[d] = int32_t(box[d]);
    tasks *= divide_up(pool.in[d], box[d]);
  }
  feature.share = pool_share(x, pool);
  feature.output_places = pool_places(x, outputs(), group, feature.share);
  feature.input_places = pool_places(x, inputs, group, 1);
  return tasks;
}

}  // namespace at_fused
