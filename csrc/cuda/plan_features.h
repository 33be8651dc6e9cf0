// The launch configuration of maps and gradients; plan.h has that of losses.
#pragma once

#include "plan.h"

namespace at_fused {

// Splits the map of a feature into pieces. `total` is the bytes of the whole list.
inline void plan_map(MapFeature& feature, const Feature& x, int64_t total, const Limits& limits) {
  const Access access = access_of(x);
  // Rows of several channels cannot be split.
  const int64_t positions =
      access.channels_per_row > 1
          ? x.N
          : piece_positions(x.N, position_bytes(x), piece_bytes(total, limits));
  feature.view = map_view(x, access, positions);
  feature.pieces = int32_t(divide_up(x.N, positions));
  feature.positions_per_piece = int32_t(positions);
  feature.tasks = x.B * feature.pieces;
  feature.bytes_per_task = positions * position_bytes(x);
}

// Splits the gradient of a feature into pieces. It is added to `addend` unless that is null. A
// piece has whole rows if the feature is interleaved, and all rows if it is planar with few rows.
inline void plan_sweep(SweepFeature& feature, const Feature& x, const Feature& out, int64_t total,
                       const Limits& limits, const Feature* addend = nullptr) {
  const Access access = access_of(x, {&out, addend});
  const int64_t rows = rows_of(x, access), columns = columns_of(x, access, x.N);
  const int64_t vectors = piece_bytes(total, limits) / (access.vector * element_size(x.dtype));
  int64_t width = columns;
  if (x.layout == Layout::planar) {
    width = std::min(columns, round_up(divide_up(vectors, rows), kThreads));
  }
  const int64_t height = std::min(rows, std::max(kMinLoads, vectors / width));
  feature.view = view_of(x, access, width, kThreads);
  feature.out = target_of(out);
  if (addend) feature.addend = target_of(*addend);
  feature.row_pieces = int32_t(divide_up(rows, height));
  feature.rows_per_piece = int32_t(height);
  feature.column_pieces = int32_t(divide_up(columns, width));
  feature.columns_per_piece = int32_t(width);
  feature.B = int32_t(x.B);
  const int64_t pieces = int64_t(feature.row_pieces) * feature.column_pieces;
  feature.samples_per_task = 1;
  if (pieces == 1) {
    feature.samples_per_task = int32_t(samples_per_task(2 * sample_bytes(x), total, limits));
  }
  feature.tasks = divide_up(x.B, feature.samples_per_task) * pieces;
  feature.bytes_per_task =
      feature.samples_per_task * height * width * access.vector * element_size(x.dtype);
}

}  // namespace at_fused
