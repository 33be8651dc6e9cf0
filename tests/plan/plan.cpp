// csrc/cuda/plan.h for ctypes: what it decides about one feature or pair, as numbers.
#include "../../csrc/cuda/plan.h"

using namespace at_fused;

namespace {

// B, C, N, batch, line, address, dtype, layout
Feature feature(const int64_t* x) {
  return {
      reinterpret_cast<const void*>(x[5]), Dtype(x[6]), Layout(x[7]), x[0], x[1], x[2], x[3], x[4]};
}

int64_t* put(int64_t* to, const Access& a) {
  *to++ = a.vector;
  *to++ = a.fold;
  *to++ = a.lanes;
  return to;
}

int64_t* put(int64_t* to, const Sweep& s) {
  for (int64_t v : {s.lanes, s.row_pieces, s.rows, s.column_pieces, s.columns}) *to++ = v;
  return to;
}

}  // namespace

extern "C" {

void plan_map_c(const int64_t* x, int64_t total, const Limits* limits, int64_t* out) {
  MapFeature result{};
  *out++ = plan_map(result, feature(x), total, *limits);
  *out++ = result.pieces;
  *out++ = result.positions;
  put(out, result.view.access);
}

void plan_sweep_c(const int64_t* x, const int64_t* to, int64_t total, const Limits* limits,
                  int64_t* out) {
  SweepFeature result{};
  *out++ = plan_sweep(result, feature(x), feature(to), total, *limits);
  *out++ = result.samples;
  put(put(out, result.view.access), result.sweep);
}

void plan_tap_c(const int64_t* x, const int64_t* to, const int64_t* addend, int64_t total,
                const Limits* limits, int64_t* out) {
  SweepFeature result{};
  const Feature added = feature(addend);
  *out++ = plan_sweep(result, feature(x), feature(to), total, *limits, &added);
  *out++ = result.samples;
  put(put(out, result.view.access), result.sweep);
}

void plan_loss_c(const int64_t* s, const int64_t* t, int64_t total, bool fp64, const Limits* limits,
                 int64_t* out) {
  PairParams pair{};
  *out++ = plan_loss(pair, feature(s), feature(t), total, fp64, *limits);
  *out++ = pair.samples;
  *out++ = pair.pieces;
  *out++ = pair.positions;
  *out++ = kControlBytes + kScratchBytes + map_bytes_of_list(0, pair, fp64);
  put(put(out, pair.student.access), pair.teacher.access);
}

void plan_gradient_c(const int64_t* s, const int64_t* t, const int64_t* to, bool fp64,
                     const Limits* limits, int64_t* out) {
  PairParams pair{};
  GradientPair gradient{};
  int64_t kept = 0;
  *out++ = plan_gradient(pair, gradient, feature(s), feature(t), feature(to), fp64, *limits, kept);
  *out++ = pair.samples;
  *out++ = pair.pieces;
  *out++ = pair.positions;
  *out++ = kControlBytes + kScratchBytes + map_bytes_of_list(0, pair, fp64) + kept;
  *out++ = kept;
  *out++ = gradient.lag;
  put(put(put(out, pair.student.access), pair.teacher.access), gradient.sweep);
}

void plan_map_loss_c(const int64_t* s, const int64_t* t, const Limits* limits, int64_t* out) {
  PairParams pair{};
  *out++ = plan_map_loss(pair, feature(s), feature(t), *limits);
  *out++ = pair.samples;
}

}  // extern "C"
