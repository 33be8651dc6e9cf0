// Hinton's loss of a row of logits, by a group of threads, a warp or a block; kd.h says how.
#pragma once

#include "elements.cuh"

namespace at_fused {

constexpr int kMaxSums = 7;

// The shared memory of a block.
struct KdShared {
  Control control;
  double sums[kMaxSums * kWarps];
};
static_assert(sizeof(KdShared) <= kKdBytes);

// ---- groups -------------------------------------------------------------------------------------

// The sum, or with `largest` the maximum, over the group of each of n values, the same bits in
// every thread.
template <bool largest, class V, int n>
__device__ __forceinline__ void group_reduce(V (&value)[n], int group, KdShared& shared) {
  static_assert(n <= kMaxSums);
  const auto combine = [](V a, V b) { return !largest ? a + b : b > a ? b : a; };
#pragma unroll
  for (int i = 0; i < n; ++i) {
    for (int d = 16; d > 0; d /= 2) {
      value[i] = combine(value[i], __shfl_xor_sync(kAllLanes, value[i], d));
    }
  }
  if (group == 32) return;
  __syncthreads();  // the last ones may still be read
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < n; ++i) shared.sums[threadIdx.x / 32 * n + i] = double(value[i]);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    value[i] = V(shared.sums[i]);
    for (int warp = 1; warp < kWarps; ++warp) {
      value[i] = combine(value[i], V(shared.sums[warp * n + i]));
    }
  }
}

// ---- functions ----------------------------------------------------------------------------------

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// g(d) = (e^-d - 1 + d) / d^2 for |d| < 1/2.
__device__ __forceinline__ float g_of(float d) {
  return 0.500000012f + d * (-0.166666668f +
                             d * (0.0416657912f + d * (-0.00833323613f +
                                                       d * (0.0013982186f - d * 0.000199448744f))));
}
__device__ __forceinline__ double g_of(double d) {
  double sum = 0, factorial = 355687428096000.0;  // 17!
#pragma unroll
  for (int n = 15; n >= 0; --n) {
    sum = 1 / factorial - d * sum;
    factorial /= n + 2;
  }
  return sum;
}

template <class A>
__device__ __forceinline__ A magnitude(A x) {
  return x < 0 ? -x : x;
}

// (t - s - c) / T, with the digits that t - s has beyond those of A.
template <class A>
struct Difference {
  Shift<A> c;
  A inverse;

  __device__ Difference(const double* stats, double quotient, double temperature)
      : c(stats, quotient, temperature), inverse(A(1 / temperature)) {}

  __device__ __forceinline__ A operator()(A s, A t) const {
    const A difference = t - s, part = difference - t;
    const A rest = (t - (difference - part)) - (s + part);
    const A small = difference * 0 == 0 ? (rest - c.low) - c.least : A(0);
    return ((difference - c.high) + small) * inverse;
  }
};

// ---- a row --------------------------------------------------------------------------------------

template <class A>
__device__ __forceinline__ A least() {
  return -A(INFINITY);
}

// The row of a group, and its threads' shares.
struct KdPlace {
  int64_t b;
  int thread;

  __device__ explicit KdPlace(const KdParams& params)
      : b(int64_t(blockIdx.x) * (kThreads / params.group) + threadIdx.x / params.group),
        thread(threadIdx.x % params.group) {}
};

__device__ __forceinline__ int64_t label_of(const KdParams& params, int64_t b) {
  if (!params.options.entropy) return kIgnored;
  return class_of(params.labels[b * params.label_stride], params.K, params.options.ignore_index);
}

// f(s, t, j) for every element of the row that is a thread's, with the turn it is in.
template <class A, class F>
__device__ __forceinline__ void for_each_class(const KdParams& params, const KdPlace& place, F f) {
  const void* student = params.student.row(place.b);
  const void* teacher = params.teacher.row(place.b);
#pragma unroll 1
  for (Turns<A> turn(place.thread, params.group, params.vector, 0, params.K); turn.more();
       turn.next()) {
    A s[kTurn<A>], t[kTurn<A>];
    load_turn(student, params.student.dtype, turn, least<A>(), s);
    load_turn(teacher, params.teacher.dtype, turn, least<A>(), t);
#pragma unroll
    for (int j = 0; j < kTurn<A>; ++j) f(s[j], t[j], turn.has(j));
  }
}

}  // namespace at_fused
