// The launch configuration (plan.h) of maps and gradients.
#pragma once

#include "plan.h"

namespace at_fused {

// Cuts one feature of a list of `total` bytes for its map.
inline void plan_map(MapFeature& feature, const Feature& x, int64_t total, const Limits& limits) {
  const Access access = access_of(x);
  // Rows of several channels are not cut.
  const int64_t positions = access.channels_per_row > 1
                                ? x.N
                                : positions_of(x.N, position_bytes(x), piece_bytes(total, limits));
  feature.view = map_view(x, access, positions);
  feature.pieces = int32_t(divide_up(x.N, positions));
  feature.positions = int32_t(positions);
  feature.tasks = x.B * feature.pieces;
  feature.bytes_of_task = positions * position_bytes(x);
}

// Cuts one feature of a list of `total` bytes for its gradient, which is added to `add` if there is
// one. A piece has whole rows of interleaved features; of planar ones all rows, if they are few.
inline void plan_sweep(SweepFeature& feature, const Feature& x, const Feature& out, int64_t total,
                       const Limits& limits, const Feature* add = nullptr) {
  const Access access = access_of(x, {&out, add});
  const int64_t rows = rows_of(x, access), columns = columns_of(x, access, x.N);
  const int64_t vectors = piece_bytes(total, limits) / (access.vector * element_size(x.dtype));
  int64_t width = columns;
  if (x.layout == Layout::planar) {
    width = std::min(columns, round_up(divide_up(vectors, rows), kThreads));
  }
  const int64_t height = std::min(rows, std::max(kLeastLoads, vectors / width));
  feature.view = view_of(x, access, width, kThreads);
  feature.out = target_of(out);
  if (add) feature.add = target_of(*add);
  feature.row_pieces = int32_t(divide_up(rows, height));
  feature.rows = int32_t(height);
  feature.column_pieces = int32_t(divide_up(columns, width));
  feature.columns = int32_t(width);
  feature.B = int32_t(x.B);
  const int64_t pieces = int64_t(feature.row_pieces) * feature.column_pieces;
  feature.samples = 1;
  if (pieces == 1) feature.samples = int32_t(samples_of_task(2 * sample_bytes(x), total, limits));
  feature.tasks = divide_up(x.B, feature.samples) * pieces;
  feature.bytes_of_task = feature.samples * height * width * access.vector * element_size(x.dtype);
}

}  // namespace at_fused
