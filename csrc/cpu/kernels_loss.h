// The loss of one sample from its two maps, and their coefficient maps.
#pragma once

#include "numbers.h"

namespace at_fused {
namespace {

// Everything from here to the coefficients is done in fp64: maps are small, and their squares
// overflow fp32 from features of 1e10 on.
using Wide = Vec<double>;
constexpr int wide = lanes<double>;

template <class T>
AT_FUSED_INLINE Wide load_fp64(const T* from) {
  return __builtin_convertvector(read<typename VectorOf<T, wide>::type>(from), Wide);
}

template <class T>
AT_FUSED_INLINE void store_fp64(T* to, Wide v, int count) {
  const auto stored = __builtin_convertvector(v, typename VectorOf<T, wide>::type);
  if (count == wide) {
    std::memcpy(to, &stored, sizeof(stored));
  } else {
    copy_few<T, wide / 2>(reinterpret_cast<const T*>(&stored), count, to);
  }
}

// f(u, s, t, i, count) for every vector of the two maps, i its first position; the last, partial
// one comes from padded copies. u counts 0, 1, 2, 3 and again: f may keep as many sums, since an
// addition waits for the last one.
constexpr int chains = 4;

template <class S, class T, class F>
AT_FUSED_INLINE void for_each_position(const S* student, const T* teacher, int64_t n, F f) {
  int64_t i = 0;
  for (; i + chains * wide <= n; i += chains * wide) {
    for (int u = 0; u < chains; ++u) {
      const int64_t at = i + u * wide;
      f(u, load_fp64(student + at), load_fp64(teacher + at), at, wide);
    }
  }
  for (; i + wide <= n; i += wide) f(0, load_fp64(student + i), load_fp64(teacher + i), i, wide);
  if (const int rest = int(n - i)) {
    S s[wide] = {};
    T t[wide] = {};
    copy_few<S, wide / 2>(student + i, rest, s);
    copy_few<T, wide / 2>(teacher + i, rest, t);
    f(0, load_fp64(s), load_fp64(t), i, rest);
  }
}

AT_FUSED_INLINE double total(const Wide (&sums)[chains]) {
  Wide all[wide] = {(sums[0] + sums[1]) + (sums[2] + sums[3])};
  return sum_each<double>(all)[0];
}

template <class S, class T>
double sample_loss(const SampleLoss& sample, const S* student, const T* teacher, S* student_result,
                   T* teacher_result) {
  const int64_t N = sample.N;
  Wide student_squares[chains] = {}, teacher_squares[chains] = {};
  for_each_position(student, teacher, N, [&](int u, Wide s, Wide t, auto...) AT_FUSED_LAMBDA {
    student_squares[u] += s * s;
    teacher_squares[u] += t * t;
  });
  const Divisor ds(std::sqrt(total(student_squares)), sample.eps_mode, sample.eps);
  const Divisor dt(std::sqrt(total(teacher_squares)), sample.eps_mode, sample.eps);

  // A division gives a single position exactly 1, so that its loss is exactly 0; it costs too much
  // elsewhere.
  const bool single = N == 1;
  const auto normalize = [single](Wide raw, const Divisor& by) AT_FUSED_LAMBDA {
    return rounded(single ? raw / by.divisor : raw * by.inverse);
  };

  // The differences are summed as such: 2 - 2 qs.qt would cancel where the maps are alike.
  Wide squares[chains] = {}, along_student[chains] = {}, along_teacher[chains] = {};
  for_each_position(student, teacher, N, [&](int u, Wide s, Wide t, auto...) AT_FUSED_LAMBDA {
    const Wide qs = normalize(s, ds), qt = normalize(t, dt), difference = qs - qt;
    squares[u] += difference * difference;
    along_student[u] += difference * qs;
    along_teacher[u] += difference * qt;
  });
  const double squared_distance = total(squares);
  const double distance = std::sqrt(squared_distance);
  const bool code = sample.form == Form::code;
  const double mean = code ? sample.weight / double(N) : sample.weight;
  const double loss = mean * (code ? squared_distance : distance);

  if (student_result || teacher_result) {
    // dL/dq = slope * difference; at difference = 0 the norm of the paper's form takes 0.
    const double slope = code ? 2 * mean : distance == 0 ? 0.0 : mean / distance;
    // Where a map is divided by a constant there is nothing to project out.
    const double ps = ds.to_unit == 0 ? 0.0 : total(along_student) * ds.to_unit;
    const double pt = dt.to_unit == 0 ? 0.0 : total(along_teacher) * dt.to_unit;
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
