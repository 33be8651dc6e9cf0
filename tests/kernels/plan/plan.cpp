// csrc/cuda/plan.h for ctypes: what it decides about the list of one launch, as numbers.
#include "../../../csrc/cuda/plan_features.h"

using namespace at_fused;

namespace {

// B, C, N, batch, line, address, dtype, layout
Feature feature(const int64_t* x) {
  return {
      reinterpret_cast<const void*>(x[5]), Dtype(x[6]), Layout(x[7]), x[0], x[1], x[2], x[3], x[4]};
}

std::vector<Feature> list(int count, const int64_t* numbers) {
  constexpr int of_each = 8;
  std::vector<Feature> features;
  for (int i = 0; i < count; ++i) features.push_back(feature(numbers + of_each * i));
  return features;
}

int64_t total_bytes(const std::vector<Feature>& features) {
  int64_t total = 0;
  for (const Feature& x : features) total += at_fused::total_bytes(x);
  return total;
}

// In the order of plan_library.py: Member.
struct Out {
  int64_t* to;

  void put(std::initializer_list<int64_t> values) {
    for (int64_t value : values) *to++ = value;
  }
  void put(const Access& a) { put({a.vector, a.channels_per_row, a.lanes}); }
};

template <class Member>
void put_tasks(Out& out, int64_t number, const Member& member, int64_t samples, int64_t pieces,
               int64_t positions) {
  out.put(
      {number, member.first_task, member.tasks, member.bytes_of_task, samples, pieces, positions});
}

}  // namespace

extern "C" {

// A member's number, which sorting would lose, is where its coefficients would be. `addends` may be
// null.
void plan_sweeps_c(int count, const int64_t* numbers, const int64_t* outs, const int64_t* addends,
                   const Limits* limits, int64_t* to) {
  const std::vector<Feature> features = list(count, numbers), written = list(count, outs);
  const std::vector<Feature> added = list(addends ? count : 0, addends);
  std::vector<SweepFeature> members(count);
  for (int i = 0; i < count; ++i) {
    plan_sweep(members[i], features[i], written[i], total_bytes(features), *limits,
               addends ? &added[i] : nullptr);
    members[i].k = reinterpret_cast<void*>(intptr_t(i));
  }
  number_tasks(members.data(), count);
  Out out{to};
  for (const SweepFeature& member : members) {
    put_tasks(out, intptr_t(member.k), member, member.samples, 1, member.view.N);
    out.put(member.view.access);
    out.put({member.row_pieces, member.rows, member.column_pieces, member.columns});
  }
}

// `outs` is null for a loss alone. Puts the shared memory of a block first.
void plan_pairs_c(int count, const int64_t* students, const int64_t* teachers, const int64_t* outs,
                  bool fp64, const Limits* limits, int64_t* to) {
  const std::vector<Feature> s = list(count, students), t = list(count, teachers);
  const std::vector<Feature> written = list(outs ? count : 0, outs);
  std::vector<PairParams> members(count);
  std::vector<Pair> pairs;
  for (int i = 0; i < count; ++i) pairs.push_back({s[i], t[i]});
  const OnChip chip = plan_pairs(members.data(), pairs.data(), count, false,
                                 outs ? written.data() : nullptr, fp64, *limits);
  for (int i = 0; i < count; ++i) members[i].number = i;
  number_tasks(members.data(), count);
  Out out{to};
  out.put({kControlBytes + kScratchBytes + chip.map_bytes + chip.kept_bytes, chip.map_bytes,
           chip.kept_bytes});
  for (const PairParams& pair : members) {
    put_tasks(out, pair.number, pair, pair.samples, pair.pieces, pair.positions);
    out.put(pair.sides[kStudent].view.access);
    out.put(pair.sides[kTeacher].view.access);
    out.put({pair.out.data != nullptr});
  }
}

}  // extern "C"
