#include "kd.cuh"
#include "launch.cuh"

namespace at_fused {

// The gradients of a row's logits.
template <class A>
__device__ void row_gradients(const KdParams& params, const KdPlace& place, double divergence,
                              double entropy, KdShared& shared) {
  const KdOptions& options = params.options;
  const double* stats = params.stats + place.b * kStatistics;
  const int64_t label = label_of(params, place.b);
  const bool counts = label != kIgnored;
  const A s_max = A(stats[kStudentMax]), t_max = A(stats[kTeacherMax]);
  const A inverse = A(1 / options.temperature);
  const A s_scale = A(1 / stats[kStudentSum]), t_scale = A(1 / stats[kTeacherSum]);
  const A e_scale = A(entropy / stats[kEntropySum]);
  const A even = A(entropy * options.label_smoothing / double(params.K));
  const A factor = A(divergence), kl = A(stats[kDivergence]);
  const bool warm = options.temperature != 1 || !options.divergence;
  const Difference<A> difference(stats, stats[kQuotient], options.temperature);
  const void* student = params.student.row(place.b);
  const void* teacher = params.teacher.row(place.b);
  void* to_student = const_cast<void*>(params.student_gradient.row(place.b));
  void* to_teacher = const_cast<void*>(params.teacher_gradient.row(place.b));
  const bool student_grad = params.student_gradient.data != nullptr;
  const bool teacher_grad = params.teacher_gradient.data != nullptr;
  // A class that has more than half: what it has of the teacher's gradient, whose row sums to 0,
  // is less than the rounding of d - KL.
  const bool sure = options.divergence && stats[kTeacherSum] < 2;
  A others = 0;
  int64_t top = -1;
#pragma unroll 1
  for (Turns<A> turn(place.thread, params.group, params.vector, 0, params.K); turn.more();
       turn.next()) {
    A s[kTurn<A>], t[kTurn<A>];
    load_turn(student, params.student.dtype, turn, least<A>(), s);
    load_turn(teacher, params.teacher.dtype, turn, least<A>(), t);
#pragma unroll
    for (int j = 0; j < kTurn<A>; ++j) {
      const A under = s[j] - s_max;
      const bool is_top = t[j] == t_max;
      A s_exp = 0, found = 0, pull = 0;
      if (options.divergence) {
        const A q = exponential((t[j] - t_max) * inverse) * t_scale;
        const A d = difference(s[j], t[j]);
        s_exp = exponential(under * inverse);
        const A weighted = q * d;
        const bool small = magnitude(d) < A(0.5) && q > 0;
        found = factor * (small ? weighted * d * g_of(d) - weighted : s_exp * s_scale - q);
        pull = q == 0 ? q : factor * (q * (d - kl));
        if (is_top) {
          top = turn.at + int64_t(j) * turn.step;
        } else {
          others += pull;
        }
      }
      if (counts) {
        const A e = warm ? exponential(under) : s_exp;
        if (turn.at + int64_t(j) * turn.step == label) {
          // p - 1 as what the other classes have: fp32 would leave nothing of it for a sure
          // student.
          const double rest = (double(e) - stats[kEntropySum]) / stats[kEntropySum];
          found += A(entropy * (rest + options.label_smoothing * (1 - 1 / double(params.K))));
        } else {
          found += e * e_scale - even;
        }
      }
      s[j] = found;
      t[j] = pull;
    }
    if (student_grad) store_turn(to_student, params.student.dtype, turn, s);
    if (teacher_grad) store_turn(to_teacher, params.teacher.dtype, turn, t);
  }
  if (!teacher_grad || !sure) return;
  double total[1] = {double(others)};
  group_reduce<false>(total, params.group, shared);
  if (top < 0) return;
  const Turns<A> only(0, 1, false, top, top + 1);
  const A last[kTurn<A>] = {A(-total[0])};
  store_turn(to_teacher, params.teacher.dtype, only, last);
}

// The gradients of the logits from the statistics of their rows.
template <bool fp64>
__global__ void __launch_bounds__(kThreads, 2)
    kd_loss_backward_kernel(const __grid_constant__ KdParams params) {
  using A = std::conditional_t<fp64, double, float>;
  AT_FUSED_DYNAMIC_SHARED(bytes);
  KdShared& shared = *reinterpret_cast<KdShared*>(bytes);
  const KdPlace place(params);
  if (place.b >= params.B) return;
  const double g = gradient_of(params.gradient, params.gradient_fp64);
  const KdOptions& options = params.options;
  const double valid = *params.valid;
  row_gradients<A>(params, place, g * options.alpha * options.temperature / params.B,
                   g * (1 - options.alpha) / (valid < 1 ? 1.0 : valid), shared);
}

void launch_kd_loss_backward(const KdParams& params, const Launch& launch) {
  launch_instance(AT_FUSED_DTYPES(kd_loss_backward_kernel), launch, params);
}

}  // namespace at_fused
