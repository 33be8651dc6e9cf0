// The launch configuration: from shapes, dtypes and the device's limits to how a list is cut into
// blocks. Plain C++, and the only place that knows a device's limits.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <vector>

#include "params.h"

namespace at_fused {

struct Limits {
  int32_t multiprocessors;
  int64_t shared_bytes_per_block;  // the most that a block may ask for
  int64_t shared_bytes_per_multiprocessor;
};

constexpr int64_t kMaxExtent = int64_t(1) << 30;  // samples, channels, positions: 32-bit loops
constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;

// Loads that a thread has under way and bytes side by side in a row, at the least where there are
// as many: fewer leave the memory's bandwidth unused.
constexpr int64_t kLeastLoads = 3;
constexpr int64_t kRowBytes = 64;
// Bytes that a task reads: enough for these loads, few enough for many tasks.
constexpr int64_t kLeastTaskBytes = kLeastLoads * kThreads * kVectorBytes;
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
inline int64_t channels_per_row(const Feature& x, int64_t vector) {
  if (x.layout == Layout::interleaved) {
    return x.C % vector == 0 && (x.N == 1 || x.line % vector == 0) ? 1 : 0;
  }
  if (x.N % vector == 0) return x.C == 1 || x.line % vector == 0 ? 1 : 0;
  const int64_t per_row = vector / std::gcd(x.N, vector);
  const bool whole = x.C % per_row == 0 && x.line == x.N && per_row * x.N / vector <= kThreads;
  return whole ? per_row : 0;
}

inline int64_t rows_of(const Feature& x, const Access& access) {
  return x.layout == Layout::planar ? x.C / access.channels_per_row : x.N;
}
inline int64_t columns_of(const Feature& x, const Access& access) {
  return (x.layout == Layout::planar ? x.N * access.channels_per_row : x.C) / access.vector;
}

// Threads side by side: the width that takes the fewest turns, where every turn of several rows at
// a time ends in `overhead` turns of adding them up. Wider ones come first.
inline int64_t best_lanes(int64_t rows, int64_t columns, int64_t column_bytes, int64_t overhead) {
  const int64_t least =
      std::min(power_of_two_up(divide_up(kRowBytes, column_bytes)), power_of_two_up(columns));
  int64_t best = 0, fewest = INT64_MAX;
  for (int64_t lanes = kThreads; lanes >= least; lanes /= 2) {
    const int64_t height = kThreads / lanes;
    if (best && rows < kLeastLoads * height) break;
    const int64_t turns =
        divide_up(columns, lanes) * (divide_up(rows, height) + (height > 1 ? overhead : 0));
    if (turns < fewest) best = lanes, fewest = turns;
  }
  return best;
}

constexpr int64_t kReduceTurns = 4;

// Threads side by side that add up by shuffles: within a warp.
inline int64_t shuffled_lanes(int64_t columns) {
  return std::min<int64_t>(32, power_of_two_up(columns));
}

// `also`: other tensors, or null, moved in the same vectors. `may_join`: a row may be several
// channels. `positions`: of the tiles that maps are made of.
inline Access access_of(const Feature& x, std::initializer_list<const Feature*> also, bool may_join,
                        int64_t positions) {
  int64_t vector = kVectorBytes / element_size(x.dtype);
  int64_t per_row = aligned(x, vector) ? channels_per_row(x, vector) : 0;
  for (const Feature* other : also) {
    if (other && (!aligned(*other, vector) || channels_per_row(*other, vector) != per_row))
      per_row = 0;
  }
  if (per_row == 0 || (per_row > 1 && !may_join)) vector = per_row = 1;
  Access access{int16_t(vector), int16_t(per_row), 1};
  if (x.layout == Layout::interleaved) {
    access.lanes = int16_t(shuffled_lanes(x.C / vector));
  } else if (per_row > 1) {
    access.lanes = int16_t(power_of_two_up(positions * per_row / vector));
  } else {
    access.lanes = int16_t(best_lanes(x.C, divide_up(positions, vector),
                                      vector * element_size(x.dtype), kReduceTurns));
  }
  return access;
}

// Whether whole samples have rows of several channels. In pieces they would be read by single
// elements.
inline bool joins_channels(const Feature& x) {
  return access_of(x, {}, true, x.N).channels_per_row > 1;
}

inline View view_of(const Feature& x, const Access& access) {
  return {x.data, x.batch, x.line, int32_t(x.C), int32_t(x.N), x.dtype, x.layout, access};
}

// ---- pieces -----------------------------------------------------------------------------------

// Positions are cut at multiples of this: 128 bytes of 32-bit elements, whole vectors of any type.
constexpr int64_t kPositionStep = 32;

struct Pieces {
  int64_t count, positions;
};

// Positions that keep kLeastLoads of each thread under way.
inline int64_t least_positions(const Feature& x) {
  const int64_t vector = kVectorBytes / element_size(x.dtype);
  return x.layout == Layout::planar ? 1 : kLeastLoads * kThreads / shuffled_lanes(x.C / vector);
}

// Cuts N positions into pieces of about `target` of a sample's `bytes`.
inline Pieces cut_positions(int64_t N, int64_t bytes, int64_t target, int64_t least) {
  const int64_t wanted = std::max<int64_t>(1, divide_up(bytes, target));
  const int64_t positions =
      std::min(N, round_up(std::max(divide_up(N, wanted), least), kPositionStep));
  return {divide_up(N, positions), positions};
}

// Bytes that a task reads for a list of `total` bytes: four for each multiprocessor, so that
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

// Cuts a sample for a sweep, into pieces of `target` bytes read. A piece has many rows where it
// can: in planar features each reads the coefficients of its columns once, in interleaved ones they
// are what a thread has under way.
inline Sweep sweep_of(const Feature& x, const Feature& out, const Access& access, int64_t target) {
  const int64_t rows = rows_of(x, access), columns = columns_of(x, access);
  const int64_t column_bytes = access.vector * element_size(x.dtype);
  const int64_t vectors = std::max<int64_t>(1, target / column_bytes);
  Sweep sweep{
      const_cast<void*>(out.data), out.batch, out.line, 1, 1, int32_t(rows), 1, int32_t(columns)};
  if (rows * columns > vectors) {
    int64_t least = 32;
    if (x.layout == Layout::planar) {
      const int64_t width = power_of_two_up(divide_up(vectors, std::min<int64_t>(rows, 128)));
      sweep.columns = int32_t(std::min(columns, std::max<int64_t>(32, width)));
    } else {
      least = kLeastLoads * std::max<int64_t>(1, kThreads / power_of_two_up(columns));
    }
    sweep.rows = int32_t(std::min(rows, std::max(least, vectors / sweep.columns)));
  }
  sweep.lanes = int32_t(best_lanes(sweep.rows, sweep.columns, column_bytes, 0));
  sweep.row_pieces = int32_t(divide_up(rows, sweep.rows));
  sweep.column_pieces = int32_t(divide_up(columns, sweep.columns));
  return sweep;
}

// ---- lists ------------------------------------------------------------------------------------

// Gives out a launch's tasks, the members with the longest first: what is begun last should end
// soon. Returns their number.
template <class Member>
int64_t number_tasks(Member* members, int32_t count) {
  std::stable_sort(members, members + count, [](const Member& a, const Member& b) {
    return bytes_of_task(a) > bytes_of_task(b);
  });
  int64_t tasks = 0;
  for (int32_t i = 0; i < count; ++i) {
    members[i].first_task = int32_t(std::min(tasks, kMaxBlocks));
    tasks += tasks_of(members[i]);
  }
  return tasks;
}

inline int64_t position_bytes(const View& x) { return x.C * element_size(x.dtype); }

// ---- maps -------------------------------------------------------------------------------------

// Cuts one feature of a list of `total` bytes for its map.
inline void plan_map(MapFeature& feature, const Feature& x, int64_t total, const Limits& limits) {
  const Pieces pieces =
      joins_channels(x)
          ? Pieces{1, x.N}
          : cut_positions(x.N, sample_bytes(x), task_bytes(total, limits), least_positions(x));
  feature.view = view_of(x, access_of(x, {}, pieces.count == 1, pieces.positions));
  feature.B = int32_t(x.B);
  feature.pieces = int32_t(pieces.count);
  feature.positions = int32_t(pieces.positions);
}

inline int64_t tasks_of(const MapFeature& feature) { return int64_t(feature.B) * feature.pieces; }
inline int64_t bytes_of_task(const MapFeature& feature) {
  return feature.positions * position_bytes(feature.view);
}

// Cuts one feature of a list of `total` bytes for its gradient, which is added to `addend` if there
// is one.
inline void plan_sweep(SweepFeature& feature, const Feature& x, const Feature& out, int64_t total,
                       const Limits& limits, const Feature* addend = nullptr) {
  const Access access = access_of(x, {&out, addend}, true, x.N);
  feature.view = view_of(x, access);
  feature.sweep = sweep_of(x, out, access, task_bytes(total, limits));
  feature.B = int32_t(x.B);
  const bool whole = feature.sweep.row_pieces * feature.sweep.column_pieces == 1;
  feature.samples = whole ? int32_t(samples_of_task(x.B, 2 * sample_bytes(x), limits)) : 1;
}

inline int64_t tasks_of(const SweepFeature& feature) {
  const int64_t pieces = int64_t(feature.sweep.row_pieces) * feature.sweep.column_pieces;
  return divide_up(feature.B, feature.samples) * pieces;
}
inline int64_t bytes_of_task(const SweepFeature& feature) {
  return int64_t(feature.samples) * feature.sweep.rows * feature.sweep.columns *
         feature.view.access.vector * element_size(feature.view.dtype);
}

// ---- losses -----------------------------------------------------------------------------------

// Shared memory for the two maps of a sample.
inline int64_t map_bytes_of(int64_t N, bool fp64) {
  return 2 * round_up(N * accumulate_size(fp64), 16);
}
inline bool maps_fit(int64_t N, bool fp64) {
  return kControlBytes + kScratchBytes + map_bytes_of(N, fp64) <= kSharedBytesWithoutAsking;
}

// Cuts a pair's samples: `whole` ones into tasks of one or several, others into pieces of about
// `target` bytes. The student is moved in the vectors of `out` as well, if there is one.
inline void cut_pair(PairParams& pair, const Pair& given, const Feature* out, bool whole,
                     int64_t target, const Limits& limits) {
  const auto& [student, teacher, student_scale, teacher_scale, mask] = given;
  const bool joins = joins_channels(student) || joins_channels(teacher);
  const int64_t bytes = given.bytes_of_sample();
  const int64_t least = std::max(least_positions(student), least_positions(teacher));
  const Pieces pieces =
      whole || joins ? Pieces{1, student.N} : cut_positions(student.N, bytes / 2, target, least);
  const bool may_join = pieces.count == 1;
  pair.B = int32_t(student.B);
  pair.samples = whole ? int32_t(samples_of_task(student.B, bytes, limits)) : 0;
  pair.pieces = int32_t(2 * pieces.count);
  pair.positions = int32_t(pieces.positions);
  pair.student = view_of(student, access_of(student, {out}, may_join, pieces.positions));
  pair.teacher = view_of(teacher, access_of(teacher, {}, may_join, pieces.positions));
  pair.student_scale = student_scale;
  pair.teacher_scale = teacher_scale;
  pair.mask = mask;
}

inline int64_t tasks_of(const PairParams& pair) {
  return pair.samples ? divide_up(pair.B, pair.samples) : int64_t(pair.B) * pair.pieces;
}
inline int64_t bytes_of_task(const PairParams& pair) {
  const int64_t student = position_bytes(pair.student), teacher = position_bytes(pair.teacher);
  return pair.positions *
         (pair.samples ? pair.samples * (student + teacher) : std::max(student, teacher));
}

// A student's sample as it is kept in shared memory.
inline int64_t kept_bytes_of(const Feature& student) {
  return round_up(sample_bytes(student), kVectorBytes);
}

// The shared memory of a launch of pairs, beside what every block takes.
struct OnChip {
  int64_t map_bytes = 0;   // two maps of a sample; 0: too large for it
  int64_t kept_bytes = 0;  // of students that are kept; 0: none is
};

// Decides for a launch of pairs with the largest maps: students to be swept are kept on chip if
// that leaves kGradientBlocks on a multiprocessor, so that one computes while another reads.
inline OnChip on_chip(const Pair* pairs, int32_t count, bool gradient, bool fp64,
                      const Limits& limits) {
  constexpr int64_t reserved = 1 << 10;  // the system's own, for each block
  const int64_t room =
      std::min(limits.shared_bytes_per_block,
               limits.shared_bytes_per_multiprocessor / kGradientBlocks - reserved);
  OnChip found;
  for (const Pair* pair = pairs; pair < pairs + count; ++pair) {
    if (maps_fit(pair->student.N, fp64)) {
      found.map_bytes = std::max(found.map_bytes, map_bytes_of(pair->student.N, fp64));
    }
  }
  for (const Pair* pair = pairs; gradient && pair < pairs + count; ++pair) {
    const int64_t kept = kept_bytes_of(pair->student);
    if (maps_fit(pair->student.N, fp64) &&
        kControlBytes + kScratchBytes + found.map_bytes + kept <= room) {
      found.kept_bytes = std::max(found.kept_bytes, kept);
    }
  }
  return found;
}

// Cuts pairs so that every multiprocessor has work and few samples are shared: what blocks share
// goes through global memory. With `outs`, where the students' gradients go, students that OnChip
// has room for are whole, and have their sweep. Pairs are in the order of the list.
inline OnChip plan_pairs(PairParams* pairs, const Pair* list, int32_t count, const Feature* outs,
                         bool fp64, const Limits& limits) {
  const OnChip chip = on_chip(list, count, outs, fp64, limits);
  int64_t total = 0;
  for (int32_t i = 0; i < count; ++i) total += list[i].student.B * list[i].bytes_of_sample();
  const int64_t share = std::max<int64_t>(64 << 10, total / limits.multiprocessors);
  for (int32_t i = 0; i < count; ++i) {
    const Feature& student = list[i].student;
    const bool fits = maps_fit(student.N, fp64);
    const bool keeps = fits && kept_bytes_of(student) <= chip.kept_bytes;
    const bool whole = keeps || (fits && list[i].bytes_of_sample() <= share);
    cut_pair(pairs[i], list[i], keeps ? &outs[i] : nullptr, whole, task_bytes(total, limits),
             limits);
    if (!keeps) continue;
    pairs[i].sweep = sweep_of(student, outs[i], pairs[i].student.access, sample_bytes(student));
  }
  return chip;
}

// The loss of raw maps: every sample is whole.
inline void plan_map_loss(PairParams& pair, const Pair& maps, const Limits& limits) {
  cut_pair(pair, maps, nullptr, true, 0, limits);
}

}  // namespace at_fused
