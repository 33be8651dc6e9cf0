// A C interface to csrc/cuda/plan.h for ctypes. It returns the plan of one launch as integers.
#include "../../../csrc/cuda/plan_features.h"

using namespace at_fused;

namespace {

// B, C, N, batch stride, line stride, address, dtype, layout
Feature feature(const int64_t* x) {
  return {
      reinterpret_cast<const void*>(x[5]), Dtype(x[6]), Layout(x[7]), x[0], x[1], x[2], x[3], x[4]};
}

std::vector<Feature> list(int count, const int64_t* numbers) {
  constexpr int fields = 8;
  std::vector<Feature> features;
  for (int i = 0; i < count; ++i) features.push_back(feature(numbers + fields * i));
  return features;
}

int64_t total_bytes(const std::vector<Feature>& features) {
  int64_t total = 0;
  for (const Feature& x : features) total += at_fused::total_bytes(x);
  return total;
}

// Writes integers in the order of Member in plan_library.py.
struct Writer {
  int64_t* to;

  void write(std::initializer_list<int64_t> values) {
    for (int64_t value : values) *to++ = value;
  }
  void write(const Access& a) { write({a.vector, a.channels_per_row, a.lanes}); }
};

template <class Member>
void write_tasks(Writer& writer, int64_t index, const Member& member, int64_t samples,
                 int64_t pieces, int64_t positions) {
  writer.write(
      {index, member.first_task, member.tasks, member.bytes_per_task, samples, pieces, positions});
}

}  // namespace

extern "C" {

// Stores the index of a member, which sorting would lose, in its pointer k. `addends` may be null.
void plan_sweeps_c(int count, const int64_t* numbers, const int64_t* outs, const int64_t* addends,
                   const Limits* limits, int64_t* to) {
  const std::vector<Feature> features = list(count, numbers), written = list(count, outs);
  const std::vector<Feature> addend = list(addends ? count : 0, addends);
  std::vector<SweepFeature> members(count);
  for (int i = 0; i < count; ++i) {
    plan_sweep(members[i], features[i], written[i], total_bytes(features), *limits,
               addends ? &addend[i] : nullptr);
    members[i].k = reinterpret_cast<void*>(intptr_t(i));
  }
  assign_tasks(members.data(), count);
  Writer writer{to};
  for (const SweepFeature& member : members) {
    write_tasks(writer, intptr_t(member.k), member, member.samples_per_task, 1, member.view.N);
    writer.write(member.view.access);
    writer.write(
        {member.row_pieces, member.rows_per_piece, member.column_pieces, member.columns_per_piece});
  }
}

// `outs` is null for at_loss. Writes the shared memory per block first.
void plan_pairs_c(int count, const int64_t* students, const int64_t* teachers, const int64_t* outs,
                  bool fp64, const Limits* limits, int64_t* to) {
  const std::vector<Feature> s = list(count, students), t = list(count, teachers);
  const std::vector<Feature> written = list(outs ? count : 0, outs);
  std::vector<PairParams> members(count);
  std::vector<Pair> pairs;
  for (int i = 0; i < count; ++i) pairs.push_back({s[i], t[i]});
  const SharedBytes shared = plan_pairs(members.data(), pairs.data(), count, false,
                                        outs ? written.data() : nullptr, fp64, *limits);
  for (int i = 0; i < count; ++i) members[i].index = i;
  assign_tasks(members.data(), count);
  Writer writer{to};
  writer.write({kControlBytes + kScratchBytes + shared.map_bytes + shared.student_bytes,
                shared.map_bytes, shared.student_bytes});
  for (const PairParams& pair : members) {
    write_tasks(writer, pair.index, pair, pair.samples_per_task, pair.pieces,
                pair.positions_per_piece);
    writer.write(pair.sides[kStudent].view.access);
    writer.write(pair.sides[kTeacher].view.access);
    writer.write({pair.out.data != nullptr});
  }
}

}  // extern "C"
