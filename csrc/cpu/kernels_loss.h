// The loss and the coefficient maps of one sample, computed from its two maps.
#pragma once

#include "numbers.h"

namespace at_fused {
namespace {

// All arithmetic on maps is in fp64. Maps are small, and their squares overflow fp32 if features
// exceed 1e10.
using Wide = Vec<double>;
constexpr int wide_lanes = lanes<double>;

template <class T>
AT_FUSED_INLINE Wide load_fp64(const T* from) {
  return __builtin_convertvector(read<typename VectorOf<T, wide_lanes>::type>(from), Wide);
}

template <class T>
AT_FUSED_INLINE void store_fp64(T* to, Wide v, int count) {
  const auto stored = __builtin_convertvector(v, typename VectorOf<T, wide_lanes>::type);
  if (count == wide_lanes) {
    std::memcpy(to, &stored, sizeof(stored));
  } else {
    copy_partial<T, wide_lanes / 2>(reinterpret_cast<const T*>(&stored), count, to);
  }
}

// Calls f(u, s, t, i, count) for each pair of vectors, from position i; zeros pad the partial last
// one. u cycles through 0 ... accumulators - 1: one sum per u hides the latency of additions.
constexpr int accumulators = 4;

template <class S, class T, class F>
AT_FUSED_INLINE void for_each_position(const S* student, const T* teacher, int64_t n, F f) {
  int64_t i = 0;
  for (; i + accumulators * wide_lanes <= n; i += accumulators * wide_lanes) {
    for (int u = 0; u < accumulators; ++u) {
      const int64_t at = i + u * wide_lanes;
      f(u, load_fp64(student + at), load_fp64(teacher + at), at, wide_lanes);
    }
  }
  for (; i + wide_lanes <= n; i += wide_lanes) {
    f(0, load_fp64(student + i), load_fp64(teacher + i), i, wide_lanes);
  }
  if (const int rest = int(n - i)) {
    S s[wide_lanes] = {};
    T t[wide_lanes] = {};
    copy_partial<S, wide_lanes / 2>(student + i, rest, s);
    copy_partial<T, wide_lanes / 2>(teacher + i, rest, t);
    f(0, load_fp64(s), load_fp64(t), i, rest);
  }
}

AT_FUSED_INLINE double total(const Wide (&sums)[accumulators]) {
  Wide vectors[wide_lanes] = {(sums[0] + sums[1]) + (sums[2] + sums[3])};
  return sum_each<double>(vectors)[0];
}

template <class S, class T>
double sample_loss(const SampleLoss& sample, const S* student, const T* teacher, S* student_result,
                   T* teacher_result) {
  const int64_t N = sample.N;
  Wide student_squares[accumulators] = {}, teacher_squares[accumulators] = {};
  for_each_position(student, teacher, N, [&](int u, Wide s, Wide t, auto...) AT_FUSED_LAMBDA {
    student_squares[u] += s * s;
    teacher_squares[u] += t * t;
  });
  const Divisor ds(std::sqrt(total(student_squares)), sample.eps_mode, sample.eps);
  const Divisor dt(std::sqrt(total(teacher_squares)), sample.eps_mode, sample.eps);

  // For a single position, division yields exactly 1, so the loss is exactly 0. Otherwise
  // multiplication by the inverse is faster.
  const bool single = N == 1;
  const auto normalize = [single](Wide raw, const Divisor& divisor) AT_FUSED_LAMBDA {
    return without_fma(single ? raw / divisor.value : raw * divisor.inverse);
  };

  // Sums squared differences, because 2 - 2 qs.qt cancels for similar maps.
  Wide squares[accumulators] = {}, student_dot[accumulators] = {}, teacher_dot[accumulators] = {};
  for_each_position(student, teacher, N, [&](int u, Wide s, Wide t, auto...) AT_FUSED_LAMBDA {
    const Wide qs = normalize(s, ds), qt = normalize(t, dt), difference = qs - qt;
    squares[u] += difference * difference;
    student_dot[u] += difference * qs;
    teacher_dot[u] += difference * qt;
  });
  const double squared_distance = total(squares);
  const double distance = std::sqrt(squared_distance);
  const bool code = sample.form == Form::code;
  const double weight = code ? sample.weight / double(N) : sample.weight;
  const double loss = weight * (code ? squared_distance : distance);

  if (student_result || teacher_result) {
    // dL/dq = slope * difference. The paper's form takes the subgradient 0 of the norm at 0.
    const double slope = code ? 2 * weight : distance == 0 ? 0.0 : weight / distance;
    // With a constant divisor, the gradient has no component along q to remove.
    const double ps = ds.to_unit == 0 ? 0.0 : total(student_dot) * ds.to_unit;
    const double pt = dt.to_unit == 0 ? 0.0 : total(teacher_dot) * dt.to_unit;
    const double gs = slope * ds.inverse * sample.student_scale;
    const double gt = slope * dt.inverse * sample.teacher_scale;
    const auto store = [&](int, Wide s, Wide t, int64_t i, int count) AT_FUSED_LAMBDA {
      const Wide qs = normalize(s, ds), qt = normalize(t, dt), difference = qs - qt;
      if (student_result) store_fp64(student_result + i, gs * (difference - qs * ps), count);
      if (teacher_result) store_fp64(teacher_result + i, gt * (qt * pt - difference), count);
    };
    for_each_position(student, teacher, N, store);
  }
  return loss;
}

template <class F>
double with_accumulator(bool fp64, F f) {
  return fp64 ? f(double{}) : f(float{});
}

double sample_loss(const SampleLoss& sample) {
  return with_accumulator(sample.student_fp64, [&](auto student) {
    return with_accumulator(sample.teacher_fp64, [&](auto teacher) {
      using S = decltype(student);
      using T = decltype(teacher);
      return sample_loss(
          sample, static_cast<const S*>(sample.student), static_cast<const T*>(sample.teacher),
          static_cast<S*>(sample.student_result), static_cast<T*>(sample.teacher_result));
    });
  });
}

}  // namespace
}  // namespace at_fused
