// The loss of one sample from its two maps, and their coefficient maps.
#pragma once

#include <cmath>

#include "kernels.h"
#include "numbers.h"

namespace at_fused {
namespace {

// Everything from here to the coefficients is done in fp64: maps are small, and their squares
// overflow fp32 from features of 1e10 on.
template <class T>
using Stored = typename VectorOf<T, lanes<double>>::type;

template <class T>
AT_FUSED_INLINE Vec<double> load_fp64(const T* from) {
  return __builtin_convertvector(read<Stored<T>>(from), Vec<double>);
}
template <class T>
AT_FUSED_INLINE void store_fp64(T* to, Vec<double> v) {
  const auto stored = __builtin_convertvector(v, Stored<T>);
  std::memcpy(to, &stored, sizeof(stored));
}

// f(u, s, t, i) for every vector of the two maps, i its first position; the last, partial one comes
// from padded copies. u counts 0, 1, 2, 3 and again: f may keep as many sums, since an addition
// waits for the last one.
constexpr int chains = 4;

template <class S, class T, class F>
AT_FUSED_INLINE void for_each_position(const S* student, const T* teacher, int64_t n, F f) {
  constexpr int width = lanes<double>;
  int64_t i = 0;
  for (; i + chains * width <= n; i += chains * width) {
    for (int u = 0; u < chains; ++u) {
      f(u, load_fp64(student + i + u * width), load_fp64(teacher + i + u * width), i + u * width);
    }
  }
  for (; i + width <= n; i += width) f(0, load_fp64(student + i), load_fp64(teacher + i), i);
  if (i < n) {
    S s[width] = {};
    T t[width] = {};
    copy_few<S, width / 2>(student + i, int(n - i), s);
    copy_few<T, width / 2>(teacher + i, int(n - i), t);
    f(0, load_fp64(s), load_fp64(t), i);
  }
}

// The part of v that belongs to positions below n, from position i on.
template <class A>
AT_FUSED_INLINE void store_positions(A* map, int64_t i, int64_t n, Vec<double> v) {
  constexpr int width = lanes<double>;
  if (i + width <= n) return store_fp64(map + i, v);
  A padded[width];
  store_fp64(padded, v);
  copy_few<A, width / 2>(padded, int(n - i), map + i);
}

AT_FUSED_INLINE double total(const Vec<double> (&sums)[chains]) {
  return sum<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class S, class T>
double sample_loss(const SampleLoss& sample, const S* student, const T* teacher, S* student_result,
                   T* teacher_result) {
  const int64_t N = sample.N;
  Vec<double> student_squares[chains] = {}, teacher_squares[chains] = {};
  for_each_position(student, teacher, N,
                    [&](int u, Vec<double> s, Vec<double> t, int64_t) AT_FUSED_LAMBDA {
                      student_squares[u] += s * s;
                      teacher_squares[u] += t * t;
                    });
  const Divisor ds(std::sqrt(total(student_squares)), sample.eps_mode, sample.eps);
  const Divisor dt(std::sqrt(total(teacher_squares)), sample.eps_mode, sample.eps);

  // A division gives a single position exactly 1, so that its loss is exactly 0; it costs too much
  // elsewhere.
  const bool single = N == 1;
  const auto normalize = [single](Vec<double> raw, const Divisor& by) AT_FUSED_LAMBDA {
    return rounded(single ? raw / by.divisor : raw * by.inverse);
  };

  // The differences are summed as such: 2 - 2 qs.qt would cancel where the maps are alike.
  Vec<double> squares[chains] = {}, along_student[chains] = {}, along_teacher[chains] = {};
  for_each_position(student, teacher, N,
                    [&](int u, Vec<double> s, Vec<double> t, int64_t) AT_FUSED_LAMBDA {
                      const Vec<double> qs = normalize(s, ds), qt = normalize(t, dt);
                      const Vec<double> difference = qs - qt;
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
    for_each_position(student, teacher, N,
                      [&](int, Vec<double> s, Vec<double> t, int64_t i) AT_FUSED_LAMBDA {
                        const Vec<double> qs = normalize(s, ds), qt = normalize(t, dt);
                        const Vec<double> difference = qs - qt;
                        if (student_result)
                          store_positions(student_result, i, N, gs * (difference - qs * ps));
                        if (teacher_result)
                          store_positions(teacher_result, i, N, gt * (qt * pt - difference));
                      });
  }
  return loss;
}

template <class S>
double sample_loss_of(const SampleLoss& sample) {
  const auto with_teacher = [&](auto type) {
    using T = decltype(type);
    return sample_loss(
        sample, static_cast<const S*>(sample.student), static_cast<const T*>(sample.teacher),
        static_cast<S*>(sample.student_result), static_cast<T*>(sample.teacher_result));
  };
  return sample.teacher_fp64 ? with_teacher(double{}) : with_teacher(float{});
}

double sample_loss(const SampleLoss& sample) {
  return sample.student_fp64 ? sample_loss_of<double>(sample) : sample_loss_of<float>(sample);
}

}  // namespace
}  // namespace at_fused
