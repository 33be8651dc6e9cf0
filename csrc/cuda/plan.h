// The launch configuration: from shapes, dtypes and the device's limits to how a list is cut into
// blocks. Plain C++, and the only place that knows a device's limits.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <numeric>

#include "params.h"

namespace at_fused {

struct Limits {
  int32_t multiprocessors;
  int64_t shared_bytes_per_block;  // the most that a block may ask for
  int64_t shared_bytes_per_multiprocessor;
};

constexpr int32_t kControlBytes = 384;   // block.cuh: Control
constexpr int32_t kScratchBytes = 8192;  // attention_map.cuh: a value per thread and element
constexpr int32_t kMaximumBytes = 2 * kScratchBytes;  // likewise, with the channel of each
constexpr int32_t kSharedBytesWithoutAsking = 48 << 10;
constexpr int64_t kMaxExtent = int64_t(1) << 30;  // channels, positions: 32-bit loops
constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;

// Bytes of a task: enough to be worth a block's start and end, few enough for many tasks.
constexpr int64_t kLeastTaskBytes = 8 << 10;
constexpr int64_t kGroupTaskBytes = 32 << 10;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
inline int64_t power_of_two_up(int64_t x) {
  int64_t p = 1;
  while (p < x) p *= 2;
  return p;
}

// ---- access -----------------------------------------------------------------------------------

// Whether every vector of a row starts at a multiple of 16 bytes, given that the first row does.
inline bool aligned(const Feature& x, int64_t vector) {
  return reinterpret_cast<uintptr_t>(x.data) % kVectorBytes == 0 &&
         (x.B == 1 || x.batch % vector == 0);
}

// How many channels make a row of whole vectors; 0: none do, or a block could not hold their sums.
inline int64_t fold_of(const Feature& x, int64_t vector) {
  if (x.layout == Layout::interleaved) {
    return x.C % vector == 0 && (x.N == 1 || x.line % vector == 0) ? 1 : 0;
  }
  if (x.N % vector == 0) return x.C == 1 || x.line % vector == 0 ? 1 : 0;
  const int64_t fold = vector / std::gcd(x.N, vector);
  const bool whole = x.C % fold == 0 && x.line == x.N && fold * x.N / vector <= kThreads;
  return whole ? fold : 0;
}

inline int64_t rows_of(const Feature& x, const Access& access) {
  return x.layout == Layout::planar ? x.C / access.fold : x.N;
}
inline int64_t columns_of(const Feature& x, const Access& access) {
  return (x.layout == Layout::planar ? x.N * access.fold : x.C) / access.vector;
}

// Threads side by side: the width that takes the fewest turns, where every turn of several rows at
// a time ends in `overhead` turns of adding them up.
inline int64_t best_lanes(int64_t rows, int64_t columns, int64_t overhead) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t lanes = kThreads; lanes >= 1; lanes /= 2) {
    const int64_t height = kThreads / lanes;
    const int64_t turns =
        divide_up(columns, lanes) * (divide_up(rows, height) + (height > 1 ? overhead : 0));
    if (turns < least) best = lanes, least = turns;
  }
  return best;
}

constexpr int64_t kReduceTurns = 4;

// `also`: other tensors, or null, moved in the same vectors. `fold`: a row may be several channels.
// `positions`: of the tiles that maps are made of.
inline Access access_of(const Feature& x, std::initializer_list<const Feature*> also, bool may_fold,
                        int64_t positions) {
  int64_t vector = kVectorBytes / element_size(x.dtype);
  int64_t fold = aligned(x, vector) ? fold_of(x, vector) : 0;
  for (const Feature* other : also) {
    if (other && (!aligned(*other, vector) || fold_of(*other, vector) != fold)) fold = 0;
  }
  if (fold == 0 || (fold > 1 && !may_fold)) vector = fold = 1;
  Access access{int16_t(vector), int16_t(fold), 1};
  if (x.layout == Layout::interleaved) {
    access.lanes = int16_t(std::min<int64_t>(32, power_of_two_up(x.C / vector)));
  } else if (fold > 1) {
    access.lanes = int16_t(power_of_two_up(positions * fold / vector));
  } else {
    access.lanes = int16_t(best_lanes(x.C, divide_up(positions, vector), kReduceTurns));
  }
  return access;
}

// Whether whole samples have rows of several channels. In pieces they would be read by single
// elements.
inline bool reads_folds(const Feature& x) { return access_of(x, {}, true, x.N).fold > 1; }

inline View view_of(const Feature& x, const Access& access) {
  return {x.data, x.batch, x.line, int32_t(x.C), int32_t(x.N), x.dtype, x.layout, access};
}

// ---- pieces -----------------------------------------------------------------------------------

// Positions are cut at multiples of this: 128 bytes of 32-bit elements, whole vectors of any type.
constexpr int64_t kPositionStep = 32;

struct Pieces {
  int64_t count, positions;
};

// Cuts N positions into pieces of about `target` of a sample's `bytes`.
inline Pieces cut_positions(int64_t N, int64_t bytes, int64_t target) {
  const int64_t wanted = std::max<int64_t>(1, divide_up(bytes, target));
  const int64_t positions = std::min(N, round_up(divide_up(N, wanted), kPositionStep));
  return {divide_up(N, positions), positions};
}

// Bytes of a task for a list of `total` bytes: four for each place where a block can run, so that
// unequal ones even out.
inline int64_t task_bytes(int64_t total, const Limits& limits) {
  return std::max(kLeastTaskBytes, total / (4 * limits.multiprocessors));
}

// Small samples in a task: as many as make a block worth while, but not so many that blocks stay
// without.
inline int64_t samples_of_task(int64_t B, int64_t bytes, const Limits& limits) {
  const int64_t worth = kGroupTaskBytes / std::max<int64_t>(1, bytes);
  return std::clamp<int64_t>(B / (2 * limits.multiprocessors), 1, std::max<int64_t>(1, worth));
}

// Cuts a sample for a sweep, into pieces of `target` bytes read and written. A piece has many rows
// where it can: each reads the coefficients of its columns once.
inline Sweep sweep_of(const Feature& x, const Feature& out, const Access& access, int64_t target) {
  const int64_t rows = rows_of(x, access), columns = columns_of(x, access);
  const int64_t vectors =
      std::max<int64_t>(1, target / (2 * access.vector * element_size(x.dtype)));
  Sweep sweep{
      const_cast<void*>(out.data), out.batch, out.line, 1, 1, int32_t(rows), 1, int32_t(columns)};
  if (x.layout == Layout::planar) {
    if (rows * columns > vectors) {
      const int64_t width = power_of_two_up(divide_up(vectors, std::min<int64_t>(rows, 128)));
      sweep.columns = int32_t(std::min(columns, std::max<int64_t>(32, width)));
    }
    sweep.rows = int32_t(std::min(rows, std::max<int64_t>(32, vectors / sweep.columns)));
    sweep.lanes = int32_t(best_lanes(sweep.rows, sweep.columns, 0));
  } else {
    sweep.rows = int32_t(std::clamp<int64_t>(vectors / columns, 1, rows));
    sweep.lanes = access.lanes;
  }
  sweep.row_pieces = int32_t(divide_up(rows, sweep.rows));
  sweep.column_pieces = int32_t(divide_up(columns, sweep.columns));
  return sweep;
}

// ---- maps -------------------------------------------------------------------------------------

inline int64_t total_bytes(const Feature& x) { return x.B * sample_bytes(x); }

// Cuts one feature of a list of `total` bytes for its map; returns the number of its tasks.
inline int64_t plan_map(MapFeature& feature, const Feature& x, int64_t total,
                        const Limits& limits) {
  const Pieces pieces = reads_folds(x)
                            ? Pieces{1, x.N}
                            : cut_positions(x.N, sample_bytes(x), task_bytes(total, limits));
  feature.view = view_of(x, access_of(x, {}, pieces.count == 1, pieces.positions));
  feature.pieces = int32_t(pieces.count);
  feature.positions = int32_t(pieces.positions);
  return x.B * pieces.count;
}

// Cuts one feature of a list of `total` bytes for its gradient, which is added to `addend` if there
// is one; returns the number of its tasks.
inline int64_t plan_sweep(SweepFeature& feature, const Feature& x, const Feature& out,
                          int64_t total, const Limits& limits, const Feature* addend = nullptr) {
  const Access access = access_of(x, {&out, addend}, true, x.N);
  feature.view = view_of(x, access);
  feature.sweep = sweep_of(x, out, access, task_bytes(total, limits));
  feature.B = int32_t(x.B);
  const int64_t pieces = int64_t(feature.sweep.row_pieces) * feature.sweep.column_pieces;
  feature.samples = pieces > 1 ? 1 : int32_t(samples_of_task(x.B, 2 * sample_bytes(x), limits));
  return divide_up(x.B, feature.samples) * pieces;
}

// ---- losses -----------------------------------------------------------------------------------

// Shared memory for the two maps of a sample.
inline int64_t map_bytes_of(int64_t N, bool fp64) {
  return 2 * round_up(N * accumulate_size(fp64), 16);
}

// Cuts a pair's samples: `whole` ones into tasks of one or several, others into pieces of about
// `target` bytes. The student is moved in the vectors of `out` as well, if there is one.
inline void cut_pair(PairParams& pair, const Feature& student, const Feature& teacher,
                     const Feature* out, bool whole, int64_t target, const Limits& limits) {
  const int64_t bytes = sample_bytes(student) + sample_bytes(teacher);
  const Pieces pieces = whole ? Pieces{1, student.N} : cut_positions(student.N, bytes / 2, target);
  const bool may_fold = pieces.count == 1;
  pair.B = int32_t(student.B);
  pair.samples = whole ? int32_t(samples_of_task(student.B, bytes, limits)) : 0;
  pair.pieces = int32_t(2 * pieces.count);
  pair.positions = int32_t(pieces.positions);
  pair.student = view_of(student, access_of(student, {out}, may_fold, pieces.positions));
  pair.teacher = view_of(teacher, access_of(teacher, {}, may_fold, pieces.positions));
}

// The maps of a pair, cut so that every multiprocessor has work and few samples are shared: what
// blocks share goes through global memory. Returns the number of tasks.
inline int64_t plan_loss(PairParams& pair, const Feature& student, const Feature& teacher,
                         int64_t total, bool fp64, const Limits& limits) {
  const int64_t bytes = sample_bytes(student) + sample_bytes(teacher);
  const int64_t share = std::max<int64_t>(64 << 10, total / limits.multiprocessors);
  const bool fits =
      kControlBytes + kScratchBytes + map_bytes_of(student.N, fp64) <= kSharedBytesWithoutAsking;
  const bool folds = reads_folds(student) || reads_folds(teacher);
  const bool whole = fits && (bytes <= share || folds);
  cut_pair(pair, student, teacher, nullptr, whole, task_bytes(total, limits), limits);
  return pair.samples ? divide_up(student.B, pair.samples) : student.B * pair.pieces;
}

// The shared memory for maps that a list's launch asks for: those of each pair that has them on
// chip, and of shared samples where they fit.
inline int64_t map_bytes_of_list(int64_t before, const PairParams& pair, bool fp64) {
  const int64_t bytes = map_bytes_of(pair.student.N, fp64);
  const bool fits = kControlBytes + kScratchBytes + bytes <= kSharedBytesWithoutAsking;
  return fits || pair.samples ? std::max(before, bytes) : before;
}

// The loss of raw maps, given as features of one channel: every sample is whole. Returns the number
// of tasks.
inline int64_t plan_map_loss(PairParams& pair, const Feature& student, const Feature& teacher,
                             const Limits& limits) {
  cut_pair(pair, student, teacher, nullptr, true, 0, limits);
  return divide_up(student.B, pair.samples);
}

// ---- values and gradients in one ----------------------------------------------------------------

// Room for kGradientBlocks on each multiprocessor, so that one computes while the other reads.
inline int64_t kept_bytes_limit(const Limits& limits) {
  constexpr int64_t reserved = 1 << 10;  // the system's own, for each block
  return std::min(limits.shared_bytes_per_block,
                  limits.shared_bytes_per_multiprocessor / kGradientBlocks - reserved);
}

// As plan_loss; `kept_bytes` becomes what a block needs beside the maps: a student's sample, if
// that fits on chip, else 0, and the sample is read a second time while the second-level cache has
// it.
inline int64_t plan_gradient(PairParams& pair, GradientPair& gradient, const Feature& student,
                             const Feature& teacher, const Feature& out, bool fp64,
                             const Limits& limits, int64_t& kept_bytes) {
  const int64_t sample = sample_bytes(student);
  const int64_t kept = round_up(sample, kVectorBytes);
  const bool fits = kControlBytes + kScratchBytes + map_bytes_of(student.N, fp64) + kept <=
                    kept_bytes_limit(limits);
  // Small tasks: what lies between the two reads of a sample has to fit into the cache.
  const int64_t target = 32 << 10;
  cut_pair(pair, student, teacher, &out, fits, target, limits);
  gradient.sweep = sweep_of(student, out, pair.student.access, fits ? 2 * sample : target);
  gradient.lag = 0;
  kept_bytes = fits ? kept : 0;
  if (fits) return divide_up(student.B, pair.samples);
  const int64_t sweeps = int64_t(gradient.sweep.row_pieces) * gradient.sweep.column_pieces;
  const int64_t step = pair.pieces + sweeps;
  // By then the blocks that made a sample's maps have most likely ended: nobody waits long.
  const int64_t running = int64_t(kGradientBlocks) * limits.multiprocessors;
  gradient.lag = int32_t(std::min(student.B, divide_up(running, step) + 1));
  return (student.B + gradient.lag) * step;
}

}  // namespace at_fused
