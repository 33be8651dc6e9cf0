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

// Loads that a thread has under way at the least where there are as many, and the bytes of a task
// that take so many: fewer leave the memory's bandwidth unused.
constexpr int64_t kLeastLoads = 3;
constexpr int64_t kLeastTaskBytes = kLeastLoads * kThreads * kVectorBytes;
// Small samples are grouped up to this.
constexpr int64_t kGroupTaskBytes = 32 << 10;
// Positions are cut at multiples of this: 128 bytes of 32-bit elements, whole vectors of any type.
constexpr int64_t kPositionStep = 32;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// ---- access -----------------------------------------------------------------------------------

// How many channels make a row of whole vectors, at multiples of 16 bytes; 0: none do, or a block
// could not hold their sums.
inline int64_t channels_per_row(const Feature& x, int64_t vector) {
  const auto aligned = [&](int64_t count, int64_t stride) {
    return count == 1 || stride % vector == 0;
  };
  if (reinterpret_cast<uintptr_t>(x.data) % kVectorBytes != 0 || !aligned(x.B, x.batch)) return 0;
  if (line_length(x) % vector == 0) return aligned(lines(x), x.line) ? 1 : 0;
  const int64_t per_row = vector / std::gcd(x.N, vector);
  const bool joins = x.layout == Layout::planar && x.C % per_row == 0 && x.line == x.N &&
                     per_row * x.N / vector <= kThreads;
  return joins ? per_row : 0;
}

// Vectors, if all of `also`, or null, can be moved in the same.
inline Access access_of(const Feature& x, std::initializer_list<const Feature*> also = {}) {
  const int64_t vector = kVectorBytes / element_size(x.dtype);
  const int64_t per_row = channels_per_row(x, vector);
  bool whole = per_row > 0;
  for (const Feature* other : also) whole &= !other || channels_per_row(*other, vector) == per_row;
  return whole ? Access{int16_t(vector), int16_t(per_row), 1} : Access{1, 1, 1};
}

inline int64_t rows_of(const Feature& x, const Access& access) {
  return x.layout == Layout::planar ? x.C / access.channels_per_row : x.N;
}
// Of `positions` of a planar feature; of interleaved ones every row is whole.
inline int64_t columns_of(const Feature& x, const Access& access, int64_t positions) {
  return (x.layout == Layout::planar ? positions * access.channels_per_row : x.C) / access.vector;
}

// As many threads side by side as there are columns, rounded up: more than half of them have work.
inline View view_of(const Feature& x, Access access, int64_t columns, int64_t most_lanes) {
  while (access.lanes < std::min(columns, most_lanes)) access.lanes *= 2;
  return {x.data, x.batch, x.line, int32_t(x.C), int32_t(x.N), x.dtype, x.layout, access};
}

// The view for maps of pieces of `positions`. The channels of interleaved features are added up by
// shuffles, within a warp.
inline View map_view(const Feature& x, const Access& access, int64_t positions) {
  return view_of(x, access, columns_of(x, access, positions),
                 x.layout == Layout::planar ? kThreads : 32);
}

inline Target target_of(const Feature& x) { return {const_cast<void*>(x.data), x.batch, x.line}; }

// ---- tasks ------------------------------------------------------------------------------------

// Bytes that a task reads for a list of `total` bytes: four for each multiprocessor, so that
// unequal ones even out.
inline int64_t task_bytes(int64_t total, const Limits& limits) {
  return total / (4 * limits.multiprocessors);
}
inline int64_t piece_bytes(int64_t total, const Limits& limits) {
  return std::max(kLeastTaskBytes, task_bytes(total, limits));
}

// Whole samples of a task.
inline int64_t samples_of_task(int64_t sample_bytes, int64_t total, const Limits& limits) {
  const int64_t bytes = std::min(kGroupTaskBytes, task_bytes(total, limits));
  return std::max<int64_t>(1, bytes / sample_bytes);
}

// Positions of a piece of `bytes`, where each has `position_bytes`.
inline int64_t positions_of(int64_t N, int64_t position_bytes, int64_t bytes) {
  return std::min(N, round_up(divide_up(bytes, position_bytes), kPositionStep));
}
inline int64_t position_bytes(const Feature& x) { return x.C * element_size(x.dtype); }

// Gives out a launch's tasks, the members with the longest first: what is begun last should end
// soon. Returns their number.
template <class Member>
int64_t number_tasks(Member* members, int32_t count) {
  std::stable_sort(members, members + count, [](const Member& a, const Member& b) {
    return a.bytes_of_task > b.bytes_of_task;
  });
  int64_t tasks = 0;
  for (int32_t i = 0; i < count; ++i) {
    members[i].first_task = int32_t(std::min(tasks, kMaxBlocks));
    tasks += members[i].tasks;
  }
  return tasks;
}

// ---- losses -----------------------------------------------------------------------------------

// Shared memory for the two maps of a sample; 0: too large for it.
inline int64_t map_bytes_of(int64_t N, bool fp64) {
  const int64_t bytes = 2 * round_up(N * accumulate_size(fp64), 16);
  return kControlBytes + kScratchBytes + bytes <= kSharedBytesWithoutAsking ? bytes : 0;
}

// Cuts a pair's samples of a list of `total` bytes: `whole` ones into tasks of one or several,
// others into pieces. The student is moved in the vectors of `out` as well, if there is one.
inline void cut_pair(PairParams& pair, const Pair& given, const Feature* out, bool whole,
                     int64_t total, const Limits& limits) {
  const auto& [student, teacher, student_scale, teacher_scale, mask] = given;
  const Access of_student = access_of(student, {out}), of_teacher = access_of(teacher);
  const int64_t bytes = given.bytes_of_sample(), N = student.N;
  // Rows of several channels are not cut, and both sides are cut at the same positions.
  const bool joins = of_student.channels_per_row > 1 || of_teacher.channels_per_row > 1;
  const int64_t positions =
      whole || joins ? N : positions_of(N, divide_up(bytes, 2 * N), piece_bytes(total, limits));
  pair.sides[kStudent] = {map_view(student, of_student, positions), nullptr, student_scale};
  pair.sides[kTeacher] = {map_view(teacher, of_teacher, positions), nullptr, teacher_scale};
  pair.mask = mask;
  if (out) pair.out = target_of(*out);
  pair.B = int32_t(student.B);
  pair.samples = whole ? int32_t(samples_of_task(bytes, total, limits)) : 0;
  pair.pieces = int32_t(divide_up(N, positions));
  pair.positions = int32_t(positions);
  pair.tasks = whole ? divide_up(student.B, pair.samples) : student.B * 2 * pair.pieces;
  pair.bytes_of_task = whole
                           ? pair.samples * bytes
                           : positions * std::max(position_bytes(student), position_bytes(teacher));
}

// The shared memory of a launch of pairs, besides what every block takes; 0 where nothing fits.
struct OnChip {
  int64_t map_bytes = 0;   // the two maps of a sample
  int64_t kept_bytes = 0;  // a student
};

// Cuts pairs so that every multiprocessor has work and few samples are shared: what blocks share
// goes through global memory. Raw maps are `whole` always. With `outs`, where the students'
// gradients go, students stay on chip for their sweep if that leaves kGradientBlocks on a
// multiprocessor, so that one computes while another reads. Pairs are in the order of the list.
inline OnChip plan_pairs(PairParams* pairs, const Pair* list, int32_t count, bool whole,
                         const Feature* outs, bool fp64, const Limits& limits) {
  OnChip chip;
  int64_t total = 0;
  for (int32_t i = 0; i < count; ++i) {
    total += list[i].student.B * list[i].bytes_of_sample();
    chip.map_bytes = std::max(chip.map_bytes, map_bytes_of(list[i].student.N, fp64));
  }
  constexpr int64_t reserved = 1 << 10;  // the system's own, for each block
  const int64_t most =
      std::min(limits.shared_bytes_per_block,
               limits.shared_bytes_per_multiprocessor / kGradientBlocks - reserved);
  const int64_t room = most - kControlBytes - kScratchBytes - chip.map_bytes;
  const int64_t share = std::max<int64_t>(64 << 10, total / limits.multiprocessors);
  for (int32_t i = 0; i < count; ++i) {
    const bool fits = map_bytes_of(list[i].student.N, fp64) > 0;
    const int64_t kept = round_up(sample_bytes(list[i].student), kVectorBytes);
    const bool keeps = outs && fits && kept <= room;
    if (keeps) chip.kept_bytes = std::max(chip.kept_bytes, kept);
    cut_pair(pairs[i], list[i], keeps ? &outs[i] : nullptr,
             whole || keeps || (fits && list[i].bytes_of_sample() <= share), total, limits);
  }
  return chip;
}

}  // namespace at_fused
