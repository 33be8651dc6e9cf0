#include "kd.cuh"
#include "launch.cuh"

namespace at_fused {

// The divergence once more, by terms that do not cancel.
template <class A>
__device__ double row_divergence(const KdParams& params, const KdPlace& place, const double* stats,
                                 KdShared& shared) {
  const double temperature = params.options.temperature;
  const A s_max = A(stats[kStudentMax]), t_max = A(stats[kTeacherMax]);
  const A inverse = A(1 / temperature);
  const A s_scale = A(1 / stats[kStudentSum]), t_scale = A(1 / stats[kTeacherSum]);
  const Difference<A> difference(stats, stats[kQuotient], temperature);
  A sum = 0;
  for_each_class<A>(params, place, [&](A s, A t, bool) {
    const A p = exponential((s - s_max) * inverse) * s_scale;
    const A q = exponential((t - t_max) * inverse) * t_scale;
    const A d = difference(s, t);
    const A weighted = q == 0 ? q : q * d;
    const bool small = magnitude(d) < A(0.5) && q > 0;
    sum += small ? weighted * d * g_of(d) : (p - q) + weighted;
  });
  double total[1] = {double(sum)};
  group_reduce<false>(total, params.group, shared);
  return total[0];
}

// The statistics of a row, the same in all threads of its group.
template <class A>
__device__ void row_statistics(const KdParams& params, const KdPlace& place,
                               double (&stats)[kStatistics], KdShared& shared) {
  const KdOptions& options = params.options;
  A top[2] = {least<A>(), least<A>()};
  for_each_class<A>(params, place, [&](A s, A t, bool) {
    if (s > top[0]) top[0] = s;
    if (t > top[1]) top[1] = t;
  });
  group_reduce<true>(top, params.group, shared);
  const A s_max = top[0], t_max = top[1];
#pragma unroll
  for (int i = 0; i < kStatistics; ++i) stats[i] = 0;
  stats[kStudentMax] = double(s_max);
  stats[kTeacherMax] = double(t_max);

  const A inverse = A(1 / options.temperature);
  const bool warm = options.temperature != 1 || !options.divergence;
  const Difference<A> difference(stats, 0, options.temperature);
  // Of e^((s - max) / T), e^((t - max) / T), q (e^-u - 1) and q (e^-u - 1 + u), without the sum
  // under q; u is d but for a constant. Of e^(s - max) below the maximum, how often that is, and
  // of s - max.
  A sum[kMaxSums] = {};
  for_each_class<A>(params, place, [&](A s, A t, bool inside) {
    const A under = s - s_max;
    A s_exp = 0;
    if (options.divergence) {
      s_exp = exponential(under * inverse);
      const A t_exp = exponential((t - t_max) * inverse);
      const A u = difference(s, t);
      const bool small = magnitude(u) < A(0.5) && t_exp > 0;
      const A weighted = t_exp == 0 ? t_exp : t_exp * u;
      const A series = weighted * u * g_of(u), plain = s_exp - t_exp;
      sum[0] += s_exp;
      sum[1] += t_exp;
      sum[2] += small ? series - weighted : plain;
      sum[3] += small ? series : plain + weighted;
    }
    if (options.entropy) {
      const A e = warm ? exponential(under) : s_exp;
      sum[4] += under == 0 ? A(0) : e;
      sum[5] += under == 0 ? A(1) : A(0);
      if (inside) sum[6] += under;
    }
  });
  double total[kMaxSums];
#pragma unroll
  for (int i = 0; i < kMaxSums; ++i) total[i] = double(sum[i]);
  group_reduce<false>(total, params.group, shared);

  if (options.divergence) {
    const double x = total[2] / total[1], most = total[3] / total[1];
    const bool near = x > -0.5;
    stats[kStudentSum] = total[0];
    stats[kTeacherSum] = total[1];
    stats[kQuotient] = near ? log1p(x) : log(total[0] / total[1]);
    stats[kDivergence] = most + (near ? log1p_excess(x) : stats[kQuotient] - x);
    // Where little is left of it, most logits differ by another constant than the largest.
    if (!(stats[kDivergence] >= most / 8)) {
      stats[kDivergence] = row_divergence<A>(params, place, stats, shared);
    }
  }
  if (!options.entropy) return;
  const double rest = total[4] + (total[5] - 1), log_sum = log1p(rest);
  const int64_t label = label_of(params, place.b);
  stats[kEntropySum] = 1 + rest;
  if (label == kWrong) stats[kEntropySum] = stats[kEntropy] = double(NAN);
  if (label < 0) return;
  const Turns<A> only(0, 1, false, label, label + 1);
  A s[kTurn<A>];
  load_turn(params.student.row(place.b), params.student.dtype, only, A(0), s);
  stats[kEntropy] = log_sum - (double(s[0]) - stats[kStudentMax]);
  if (options.label_smoothing > 0) {
    const double even = log_sum - total[6] / double(params.K);
    stats[kEntropy] =
        (1 - options.label_smoothing) * stats[kEntropy] + options.label_smoothing * even;
  }
}

// The sums over all rows, in their order, by the block that ends last.
__device__ inline void finish_loss(const KdParams& params, Control& control) {
  double total[3] = {};  // divergences, cross-entropies, labels that count
  for (int64_t b = threadIdx.x; b < params.B; b += kThreads) {
    const double* stats = params.stats + b * kStatistics;
    total[0] += __ldcg(stats + kDivergence);
    total[1] += __ldcg(stats + kEntropy);
    total[2] += label_of(params, b) == kIgnored ? 0 : 1;
  }
  block_sum(total, control);
  if (threadIdx.x != 0) return;
  const KdOptions& options = params.options;
  double loss = 0;
  if (options.divergence) {
    loss += total[0] * (options.alpha * options.temperature * options.temperature / params.B);
  }
  if (options.entropy) loss += (1 - options.alpha) * total[1] / total[2];
  *params.valid = total[2];
  store_loss(params.loss, params.loss_fp64, 0, loss);
}

// Hinton's loss, and what its gradient needs of each row.
template <bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    kd_loss_kernel(const __grid_constant__ KdParams params) {
  using A = std::conditional_t<fp64, double, float>;
  AT_FUSED_DYNAMIC_SHARED(bytes);
  KdShared& shared = *reinterpret_cast<KdShared*>(bytes);
  const KdPlace place(params);
  if (place.b < params.B) {
    double stats[kStatistics];
    row_statistics<A>(params, place, stats, shared);
    if (place.thread == 0) {
#pragma unroll
      for (int i = 0; i < kStatistics; ++i) params.stats[place.b * kStatistics + i] = stats[i];
    }
  }
  if (arrives_last(params.finished, 1, gridDim.x, shared.control)) {
    finish_loss(params, shared.control);
  }
}

void launch_kd_loss(const KdParams& params, const Launch& launch) {
  launch_instance(AT_FUSED_DTYPES(kd_loss_kernel), launch, params);
}

}  // namespace at_fused
