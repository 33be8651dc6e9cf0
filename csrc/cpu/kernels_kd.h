// Hinton's loss of one row of logits; kd.h says how.
#pragma once

#include <array>
#include <cmath>

#include "elements.h"
#include "kernels.h"

namespace at_fused {
namespace {

// ---- functions ----------------------------------------------------------------------------------

// e^x for x <= 0, to a unit of the last place or so; 0 from -87.3 on. A NaN stays.
AT_FUSED_INLINE Vec<float> exp_negative(Vec<float> x) {
  const auto none = x < -87.3f;
  const Vec<float> y = select(none, Vec<float>{}, x);
  // The sum has its whole part in the lowest bits.
  const Vec<float> shifted = y * 1.44269504f + 0x1.8p23f;
  const Vec<float> whole = shifted - 0x1.8p23f;
  const Vec<float> f = (y - whole * 0x1.62e4p-1f) - whole * 0x1.7f7d1cp-20f;
  const Vec<float> e =
      0.500000001f +
      f * (0.166666667f +
           f * (0.0416664569f + f * (0.00833331003f + f * (0.00139345317f + f * 0.000198919699f))));
  const Vec<float> scale = bit_cast<Vec<float>>((bit_cast<Word>(shifted) << 23) + 0x3f800000u);
  return select(none, Vec<float>{}, (1 + f * (1 + f * e)) * scale);
}

AT_FUSED_INLINE Vec<double> exp_negative(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// g(d) = (e^-d - 1 + d) / d^2 for |d| < 1/2.
AT_FUSED_INLINE Vec<float> g_of(Vec<float> d) {
  return 0.500000012f + d * (-0.166666668f +
                             d * (0.0416657912f + d * (-0.00833323613f +
                                                       d * (0.0013982186f - d * 0.000199448744f))));
}

AT_FUSED_INLINE Vec<double> g_of(Vec<double> d) {
  Vec<double> sum = {};
  double factorial = 355687428096000.0;  // 17!
  for (int n = 15; n >= 0; --n) {
    sum = 1 / factorial - d * sum;
    factorial /= n + 2;
  }
  return sum;
}

template <class V>
AT_FUSED_INLINE V largest(V a, V b) {
  return select(b > a, b, a);
}

template <int step, class A, int... i>
AT_FUSED_INLINE Vec<A> rotated(Vec<A> v, std::integer_sequence<int, i...>) {
  return shuffle<((i + step) % lanes<A>)...>(v, v);
}

template <class A, int step = lanes<A> / 2>
AT_FUSED_INLINE A largest_lane(Vec<A> v) {
  v = largest(v, rotated<step, A>(v, std::make_integer_sequence<int, lanes<A>>{}));
  if constexpr (step > 1) return largest_lane<A, step / 2>(v);
  return v[0];
}

// ---- one row ------------------------------------------------------------------------------------

template <class A>
constexpr A infinity = A(__builtin_inf());

// (t - s - c) / T, with the digits that t - s has beyond those of A.
template <class A>
struct Difference {
  Shift<A> c;
  A inverse;

  Difference(const double* stats, double quotient, double temperature)
      : c(stats, quotient, temperature), inverse(A(1 / temperature)) {}

  AT_FUSED_INLINE Vec<A> operator()(Vec<A> s, Vec<A> t) const {
    const Vec<A> difference = t - s, part = difference - t;
    const Vec<A> rest = (t - (difference - part)) - (s + part);
    const auto finite = absolute(difference) < infinity<A>;
    const Vec<A> small = select(finite, (rest - c.low) - c.least, Vec<A>{});
    return ((difference - c.high) + small) * inverse;
  }
};

// e^x from x and e^(x / T): where T is a small power of two, by squaring, which costs a few units
// of the last place.
template <class A, bool given>
struct Cold {
  int squarings;

  explicit Cold(double temperature)
      : squarings(temperature == 1   ? 0
                  : temperature == 2 ? 1
                  : temperature == 4 ? 2
                                     : -1) {}

  AT_FUSED_INLINE Vec<A> operator()(Vec<A> x, Vec<A> warm) const {
    if (!given || squarings < 0) return exp_negative(x);
    for (int i = 0; i < squarings; ++i) warm *= warm;
    return warm;
  }
};

// f(s, t, k, count) for every vector of the row, -infinity behind its end; `turn(k, n)` after every
// tile, for sums that would lose digits in longer ones.
template <class A, class F, class G>
AT_FUSED_INLINE void for_each_class(const KdRow& row, F f, G turn) {
  alignas(64) A student[kTile], teacher[kTile];
  for (int64_t at = 0; at < row.K; at += kTile) {
    const int n = int(row.K - at < kTile ? row.K - at : kTile);
    const A* s = read_tile(row.student, row.student_dtype, at, n, student);
    const A* t = read_tile(row.teacher, row.teacher_dtype, at, n, teacher);
    for_each_vector(s, t, n, -infinity<A>, f);
    turn(at, n);
  }
}

// Sums of a tile's terms, and of a row's in fp64.
template <class A>
struct Sum {
  Vec<A> tile = {};
  Vec<double> row = {};
  AT_FUSED_INLINE void add(Vec<A> v) { tile += v; }
  AT_FUSED_INLINE void turn() {
    row += wide(tile);
    tile = Vec<A>{};
  }
};

// The row's totals of several sums.
template <class A, size_t n>
AT_FUSED_INLINE std::array<double, n> totals(const Sum<A> (&sums)[n]) {
  constexpr size_t width = lanes<double>;
  std::array<double, n> result;
  for (size_t at = 0; at < n; at += width) {
    Vec<double> rows[width] = {};
    for (size_t i = at; i < n && i < at + width; ++i) rows[i - at] = sums[i].row;
    const Vec<double> found = sum_each<double>(rows);
    for (size_t i = at; i < n && i < at + width; ++i) result[i] = found[i - at];
  }
  return result;
}

template <class A>
void kd_row_maxima(const KdRow& row, double* stats) {
  Vec<A> s_max = splat(-infinity<A>), t_max = s_max;
  for_each_class<A>(
      row,
      [&](Vec<A> s, Vec<A> t, int, int) AT_FUSED_LAMBDA {
        s_max = largest(s_max, s);
        t_max = largest(t_max, t);
      },
      [](int64_t, int) {});
  stats[kStudentMax] = double(largest_lane<A>(s_max));
  stats[kTeacherMax] = double(largest_lane<A>(t_max));
}

// The divergence once more, by terms that do not cancel.
template <class A>
double kd_row_divergence(const KdRow& row, const double* stats) {
  const A s_max = A(stats[kStudentMax]), t_max = A(stats[kTeacherMax]);
  const A inverse = A(1 / row.options->temperature);
  const A s_scale = A(1 / stats[kStudentSum]), t_scale = A(1 / stats[kTeacherSum]);
  const Difference<A> difference(stats, stats[kQuotient], row.options->temperature);
  Sum<A> total[1];
  for_each_class<A>(
      row,
      [&](Vec<A> s, Vec<A> t, int, int) AT_FUSED_LAMBDA {
        const Vec<A> p = exp_negative((s - s_max) * inverse) * s_scale;
        const Vec<A> q = exp_negative((t - t_max) * inverse) * t_scale;
        const Vec<A> d = difference(s, t);
        const auto small = (absolute(d) < A(0.5)) & (q > 0);
        const Vec<A> weighted = select(q == 0, q, q * d);
        total[0].add(select(small, weighted * d * g_of(d), (p - q) + weighted));
      },
      [&](int64_t, int) AT_FUSED_LAMBDA { total[0].turn(); });
  return totals(total)[0];
}

template <class A, bool divergence, bool entropy>
void kd_row(const KdRow& row, double* stats) {
  kd_row_maxima<A>(row, stats);
  const KdOptions& options = *row.options;
  const A s_max = A(stats[kStudentMax]), t_max = A(stats[kTeacherMax]);
  const A inverse = A(1 / options.temperature);
  const Cold<A, divergence> cold(options.temperature);
  const bool smooths = options.label_smoothing > 0;
  const Difference<A> difference(stats, 0, options.temperature);
  // Of e^((s - max) / T), e^((t - max) / T), q (e^-u - 1) and q (e^-u - 1 + u), without the sum
  // under q, u being d but for a constant; of e^(s - max) below the maximum, how often that
  // is, and of s - max.
  enum { s_sum, t_sum, excess, curve, others, tops, below, kSums };
  Sum<A> sums[kSums];
  for_each_class<A>(
      row,
      [&](Vec<A> s, Vec<A> t, int, int count) AT_FUSED_LAMBDA {
        const Vec<A> under = s - s_max;
        Vec<A> s_exp = {};
        if (divergence) {
          s_exp = exp_negative(under * inverse);
          const Vec<A> t_exp = exp_negative((t - t_max) * inverse);
          const Vec<A> u = difference(s, t);
          const auto small = (absolute(u) < A(0.5)) & (t_exp > 0);
          const Vec<A> weighted = select(t_exp == 0, t_exp, t_exp * u);
          const Vec<A> series = weighted * u * g_of(u), plain = s_exp - t_exp;
          sums[s_sum].add(s_exp);
          sums[t_sum].add(t_exp);
          sums[excess].add(select(small, series - weighted, plain));
          sums[curve].add(select(small, series, plain + weighted));
        }
        if (entropy) {
          const auto top = under == 0;
          sums[tops].add(select(top, splat(A(1)), Vec<A>{}));
          sums[others].add(select(top, Vec<A>{}, cold(under, s_exp)));
          if (smooths) sums[below].add(select(first_lanes<A>(count), under, Vec<A>{}));
        }
      },
      [&](int64_t, int) AT_FUSED_LAMBDA {
        for (Sum<A>& sum : sums) sum.turn();
      });
  const std::array<double, kSums> total = totals(sums);
  stats[kStudentSum] = total[s_sum];
  stats[kTeacherSum] = total[t_sum];
  if (divergence) {
    const double x = total[excess] / total[t_sum];
    const bool near = x > -0.5;
    const double quotient = near ? std::log1p(x) : std::log(total[s_sum] / total[t_sum]);
    stats[kQuotient] = quotient;
    const double most = total[curve] / total[t_sum];
    const double kl = most + (near ? log1p_excess(x) : quotient - x);
    // Where little is left of it, most logits differ by another constant than the largest.
    stats[kDivergence] = kl >= most / 8 ? kl : kd_row_divergence<A>(row, stats);
  } else {
    stats[kQuotient] = stats[kDivergence] = 0;
  }
  stats[kEntropySum] = stats[kEntropy] = 0;
  if (entropy) {
    const double rest = total[others] + (total[tops] - 1);
    const double log_sum = std::log1p(rest);
    stats[kEntropySum] = 1 + rest;
    if (row.label == kWrong) stats[kEntropySum] = stats[kEntropy] = __builtin_nan("");
    if (row.label >= 0) {
      A buffer[kTile];
      const A s = *read_tile(row.student, row.student_dtype, row.label, 1, buffer);
      const double loss = log_sum - (double(s) - stats[kStudentMax]);
      const double even = log_sum - total[below] / double(row.K);
      stats[kEntropy] = options.label_smoothing > 0
                            ? (1 - options.label_smoothing) * loss + options.label_smoothing * even
                            : loss;
    }
  }
}

// ---- the gradients of one row -------------------------------------------------------------------

template <class A, bool divergence, bool entropy>
void kd_row_backward(const KdRow& row, const double* stats, const KdRowGradient& gradient) {
  const KdOptions& options = *row.options;
  const A s_max = A(stats[kStudentMax]), t_max = A(stats[kTeacherMax]);
  const A inverse = A(1 / options.temperature);
  const A s_scale = A(1 / stats[kStudentSum]), t_scale = A(1 / stats[kTeacherSum]);
  const A e_scale = A(gradient.entropy / stats[kEntropySum]);
  const A even = A(gradient.entropy * options.label_smoothing / double(row.K));
  const A factor = A(gradient.divergence), kl = A(stats[kDivergence]);
  const Cold<A, divergence> cold(options.temperature);
  const Difference<A> difference(stats, stats[kQuotient], options.temperature);
  const bool sure = stats[kTeacherSum] < 2;  // one class has more than half
  Sum<A> others[1];
  int64_t top = -1;

  const auto from_divergence = [&](Vec<A> s_exp, Vec<A> q, Vec<A> d) AT_FUSED_LAMBDA {
    const Vec<A> weighted = q * d;
    const auto small = (absolute(d) < A(0.5)) & (q > 0);
    return factor * select(small, weighted * d * g_of(d) - weighted, s_exp * s_scale - q);
  };
  alignas(64) A student[kTile], teacher[kTile];
  alignas(64) A student_buffer[kTile], teacher_buffer[kTile];
  for (int64_t at = 0; at < row.K; at += kTile) {
    const int n = int(row.K - at < kTile ? row.K - at : kTile);
    const A* from_s = read_tile(row.student, row.student_dtype, at, n, student);
    const A* from_t = read_tile(row.teacher, row.teacher_dtype, at, n, teacher);
    A* to_s = begin_tile(gradient.student, row.student_dtype, at, student_buffer);
    A* to_t = begin_tile(gradient.teacher, row.teacher_dtype, at, teacher_buffer);
    const auto write = [](A* to, Vec<A> v, int count) AT_FUSED_LAMBDA {
      count == lanes<A> ? store(to, v) : store_partial(to, v, count);
    };
    for_each_vector(from_s, from_t, n, -infinity<A>,
                    [&](Vec<A> s, Vec<A> t, int i, int count) AT_FUSED_LAMBDA {
                      const Vec<A> under = s - s_max;
                      Vec<A> s_exp = {}, result = {};
                      if (divergence) {
                        const Vec<A> q = exp_negative((t - t_max) * inverse) * t_scale;
                        const Vec<A> d = difference(s, t);
                        if (gradient.teacher) {
                          const Vec<A> pull = factor * select(q == 0, q, q * (d - kl));
                          write(to_t + i, pull, count);
                          if (sure) {
                            const auto is_top = t == t_max;
                            others[0].add(select(is_top, Vec<A>{}, pull));
                            for (int j = 0; j < count; ++j) top = is_top[j] ? at + i + j : top;
                          }
                        }
                        s_exp = exp_negative(under * inverse);
                        result = from_divergence(s_exp, q, d);
                      }
                      if (entropy) {
                        result += cold(under, s_exp) * e_scale - even;
                      }
                      if (gradient.student) write(to_s + i, result, count);
                    });
    others[0].turn();
    if (entropy && row.label >= at && row.label < at + n) {
      // p - 1 as what the other classes have: fp32 would leave nothing of it for a sure student.
      const int i = int(row.label - at);
      const double e = std::exp(double(from_s[i]) - stats[kStudentMax]);
      double found = gradient.entropy * ((e - stats[kEntropySum]) / stats[kEntropySum] +
                                         options.label_smoothing * (1 - 1 / double(row.K)));
      if (divergence) {
        const Vec<A> s = splat(from_s[i]), t = splat(from_t[i]);
        found += double(from_divergence(exp_negative((s - s_max) * inverse),
                                        exp_negative((t - t_max) * inverse) * t_scale,
                                        difference(s, t))[0]);
      }
      if (gradient.student) to_s[i] = A(found);
    }
    if (gradient.student) end_tile(gradient.student, row.student_dtype, at, n, to_s);
    if (gradient.teacher && divergence) {
      end_tile(gradient.teacher, row.teacher_dtype, at, n, to_t);
    }
  }
  if (gradient.teacher && divergence && sure && top >= 0) {
    // The row sums to 0; what the likeliest class has is less than the rounding of d - KL.
    A* to = begin_tile(gradient.teacher, row.teacher_dtype, top, teacher_buffer);
    *to = A(-totals(others)[0]);
    end_tile(gradient.teacher, row.teacher_dtype, top, 1, to);
  }
  if (gradient.teacher && !divergence) {
    std::memset(gradient.teacher, 0, size_t(row.K * element_size(row.teacher_dtype)));
  }
}

// ---- the table's entries ------------------------------------------------------------------------

template <class A, class F>
AT_FUSED_INLINE void with_terms(const KdRow& row, bool entropy, F f) {
  if (!row.options->divergence) return f(A(), std::false_type(), std::true_type());
  if (entropy) return f(A(), std::true_type(), std::true_type());
  return f(A(), std::true_type(), std::false_type());
}

template <class F>
AT_FUSED_INLINE void with_precision(const KdRow& row, bool entropy, F f) {
  if (computes_fp64(row.student_dtype, row.teacher_dtype)) {
    with_terms<double>(row, entropy, f);
  } else {
    with_terms<float>(row, entropy, f);
  }
}

void kd_row_statistics(const KdRow& row, double* stats) {
  with_precision(row, row.options->entropy, [&](auto a, auto divergence, auto entropy) {
    kd_row<decltype(a), divergence(), entropy()>(row, stats);
  });
}

void kd_row_gradients(const KdRow& row, const double* stats, const KdRowGradient& gradient) {
  const bool entropy = row.options->entropy && row.label != kIgnored;
  if (!entropy && !row.options->divergence) {
    const auto clear = [&](void* to, Dtype dtype) {
      if (to) std::memset(to, 0, size_t(row.K * element_size(dtype)));
    };
    clear(gradient.student, row.student_dtype);
    clear(gradient.teacher, row.teacher_dtype);
    return;
  }
  with_precision(row, entropy, [&](auto a, auto divergence, auto entropy) {
    kd_row_backward<decltype(a), divergence(), entropy()>(row, stats, gradient);
  });
}

}  // namespace
}  // namespace at_fused
