// Splits a list of features or pairs into thread blocks, for the limits of a device. Plain C++.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <vector>

#include "params.h"

namespace at_fused {

struct Limits {
  int32_t multiprocessors;
  int64_t shared_bytes_per_block;  // opt-in maximum
  int64_t shared_bytes_per_multiprocessor;
};

constexpr int64_t kMaxExtent = int64_t(1) << 30;  // samples, channels, positions: 32-bit loops
constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;

// Minimum loads per thread and bytes per piece. With fewer, memory bandwidth is left unused.
constexpr int64_t kMinLoads = 3;
constexpr int64_t kMinPieceBytes = kMinLoads * kThreads * kVectorBytes;
// Maximum bytes of a task of several small samples.
constexpr int64_t kMaxGroupBytes = 32 << 10;
// Pieces start at multiples of this: 128 bytes of fp32, and whole vectors of every dtype.
constexpr int64_t kPositionStep = 32;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// ---- access -----------------------------------------------------------------------------------

// Returns the number of channels that form a row of aligned vectors. Returns 0 if none do, or if
// the row is too long for one pass of a block.
inline int64_t channels_per_row(const Feature& x, int64_t vector) {
  const auto aligned = [&](int64_t count, int64_t stride) {
    return count == 1 || stride % vector == 0;
  };
  if (reinterpret_cast<uintptr_t>(x.data) % kVectorBytes != 0 || !aligned(x.B, x.batch_stride)) {
    return 0;
  }
  if (line_length(x) % vector == 0) return aligned(lines(x), x.line_stride) ? 1 : 0;
  const int64_t per_row = vector / std::gcd(x.N, vector);
  const bool joins = x.layout == Layout::planar && x.C % per_row == 0 && x.line_stride == x.N &&
                     per_row * x.N / vector <= kThreads;
  return joins ? per_row : 0;
}

// Returns vector access if all tensors in `also` (null ones aside) allow the same, else elements.
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
// Columns (vectors per row) of a piece of `positions`. Rows of interleaved features are not split.
inline int64_t columns_of(const Feature& x, const Access& access, int64_t positions) {
  return (x.layout == Layout::planar ? positions * access.channels_per_row : x.C) / access.vector;
}

// Sets lanes to the number of columns, rounded up to a power of two: over half of them have work.
inline View view_of(const Feature& x, Access access, int64_t columns, int64_t max_lanes) {
  while (access.lanes < std::min(columns, max_lanes)) access.lanes *= 2;
  return {x.data,       x.batch_stride, x.line_stride, int32_t(x.C),
          int32_t(x.N), x.dtype,        x.layout,      access};
}

// The view for maps of pieces of `positions`. Interleaved channels are summed by warp shuffles, so
// lanes must lie within a warp.
inline View map_view(const Feature& x, const Access& access, int64_t positions) {
  return view_of(x, access, columns_of(x, access, positions),
                 x.layout == Layout::planar ? kThreads : 32);
}

inline Target target_of(const Feature& x) {
  return {const_cast<void*>(x.data), x.batch_stride, x.line_stride};
}

// ---- tasks ------------------------------------------------------------------------------------

// Bytes per task for a list of `total` bytes. Four tasks per multiprocessor balance the load.
inline int64_t task_bytes(int64_t total, const Limits& limits) {
  return total / (4 * limits.multiprocessors);
}
inline int64_t piece_bytes(int64_t total, const Limits& limits) {
  return std::max(kMinPieceBytes, task_bytes(total, limits));
}

// Returns the number of whole samples per task.
inline int64_t samples_per_task(int64_t sample_bytes, int64_t total, const Limits& limits) {
  const int64_t bytes = std::min(kMaxGroupBytes, task_bytes(total, limits));
  return std::max<int64_t>(1, bytes / sample_bytes);
}

// Returns the number of positions in a piece of about `bytes`.
inline int64_t piece_positions(int64_t N, int64_t position_bytes, int64_t bytes) {
  return std::min(N, round_up(divide_up(bytes, position_bytes), kPositionStep));
}
inline int64_t position_bytes(const Feature& x) { return x.C * element_size(x.dtype); }

// Numbers the tasks of a launch and returns their count. Members with the largest tasks come first,
// so that the last tasks to run are short.
template <class Member>
int64_t assign_tasks(Member* members, int32_t count) {
  std::stable_sort(members, members + count, [](const Member& a, const Member& b) {
    return a.bytes_per_task > b.bytes_per_task;
  });
  int64_t tasks = 0;
  for (int32_t i = 0; i < count; ++i) {
    members[i].first_task = int32_t(std::min(tasks, kMaxBlocks));
    tasks += members[i].tasks;
  }
  return tasks;
}

// ---- losses -----------------------------------------------------------------------------------

// Bytes of shared memory for both maps of a sample; 0 if they do not fit.
inline int64_t map_bytes_of(int64_t N, bool fp64) {
  const int64_t bytes = 2 * round_up(N * accumulate_size(fp64), 16);
  return kControlBytes + kScratchBytes + bytes <= kDefaultSharedBytes ? bytes : 0;
}

// Splits a pair into tasks of whole samples (`whole`), or of pieces of a sample. `total` is the
// bytes of the whole list. If `out` is not null, the student's access must suit it too.
inline void split_pair(PairParams& pair, const Pair& source, const Feature* out, bool whole,
                       int64_t total, const Limits& limits) {
  const auto& [student, teacher, student_scale, teacher_scale, mask] = source;
  const Access student_access = access_of(student, {out}), teacher_access = access_of(teacher);
  const int64_t bytes = source.bytes_of_sample(), N = student.N;
  // Rows of several channels cannot be split, and both sides are split at the same positions.
  const bool joins = student_access.channels_per_row > 1 || teacher_access.channels_per_row > 1;
  const int64_t positions =
      whole || joins ? N : piece_positions(N, divide_up(bytes, 2 * N), piece_bytes(total, limits));
  pair.sides[kStudent] = {map_view(student, student_access, positions), nullptr, student_scale};
  pair.sides[kTeacher] = {map_view(teacher, teacher_access, positions), nullptr, teacher_scale};
  pair.mask = mask;
  if (out) pair.out = target_of(*out);
  pair.B = int32_t(student.B);
  pair.samples_per_task = whole ? int32_t(samples_per_task(bytes, total, limits)) : 0;
  pair.pieces = int32_t(divide_up(N, positions));
  pair.positions_per_piece = int32_t(positions);
  pair.tasks = whole ? divide_up(student.B, pair.samples_per_task) : student.B * 2 * pair.pieces;
  pair.bytes_per_task =
      whole ? pair.samples_per_task * bytes
            : positions * std::max(position_bytes(student), position_bytes(teacher));
}

// Shared memory per block for maps and students, besides control and scratch.
struct SharedBytes {
  int64_t map_bytes = 0;      // both maps of a sample
  int64_t student_bytes = 0;  // a student's sample
};

// Splits pairs so that every multiprocessor has work, and blocks share few samples, because shared
// samples go through global memory. Raw maps are never shared (`whole`). With `outs` (the students'
// gradients), a student is cached in shared memory if kGradientBlocks blocks still fit on a
// multiprocessor: one then computes while another reads.
inline SharedBytes plan_pairs(PairParams* pairs, const Pair* list, int32_t count, bool whole,
                              const Feature* outs, bool fp64, const Limits& limits) {
  SharedBytes shared;
  int64_t total = 0;
  for (int32_t i = 0; i < count; ++i) {
    total += list[i].student.B * list[i].bytes_of_sample();
    shared.map_bytes = std::max(shared.map_bytes, map_bytes_of(list[i].student.N, fp64));
  }
  constexpr int64_t reserved = 1 << 10;  // CUDA reserves 1 KB per block
  const int64_t limit =
      std::min(limits.shared_bytes_per_block,
               limits.shared_bytes_per_multiprocessor / kGradientBlocks - reserved);
  const int64_t available = limit - kControlBytes - kScratchBytes - shared.map_bytes;
  const int64_t share = std::max<int64_t>(64 << 10, total / limits.multiprocessors);
  for (int32_t i = 0; i < count; ++i) {
    const bool fits = map_bytes_of(list[i].student.N, fp64) > 0;
    const int64_t student_bytes = round_up(sample_bytes(list[i].student), kVectorBytes);
    const bool caches = outs && fits && student_bytes <= available;
    if (caches) shared.student_bytes = std::max(shared.student_bytes, student_bytes);
    split_pair(pairs[i], list[i], caches ? &outs[i] : nullptr,
               whole || caches || (fits && list[i].bytes_of_sample() <= share), total, limits);
  }
  return shared;
}

}  // namespace at_fused
