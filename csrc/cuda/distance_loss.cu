#include "../distance.h"
#include "elements.cuh"
#include "launch.cuh"

namespace at_fused {

// A block's share: a piece of one sample of one pair.
struct DistancePlace {
  int i;
  int64_t b;
  int piece;
  int64_t begin, end;

  __device__ explicit DistancePlace(const DistanceParams& params)
      : i(member_of(params.pairs, params.count, blockIdx.x)) {
    const DistancePair& pair = params.pairs[i];
    const int64_t local = blockIdx.x - pair.first_task;
    b = local / pair.pieces;
    piece = int(local % pair.pieces);
    begin = int64_t(piece) * pair.piece;
    end = begin + pair.piece < pair.M ? begin + pair.piece : pair.M;
  }
};

__device__ __forceinline__ const void* sample(const void* data, Dtype dtype, int64_t offset) {
  return static_cast<const char*>(data) + offset * element_size(dtype);
}

// f(turn, a, b) for every turn of the thread.
template <class A, class F>
__device__ __forceinline__ void for_each_turn(const DistancePair& pair, const DistancePlace& place,
                                              F f) {
  const void* a = sample(pair.a, pair.a_dtype, place.b * pair.a_stride);
  const void* b = sample(pair.b, pair.b_dtype, place.b * pair.b_stride);
#pragma unroll 1
  for (Turns<A> turn(threadIdx.x, kThreads, pair.vector, place.begin, place.end); turn.more();
       turn.next()) {
    A x[kTurn<A>], y[kTurn<A>];
    load_turn(a, pair.a_dtype, turn, A(0), x);
    load_turn(b, pair.b_dtype, turn, A(0), y);
    f(turn, x, y);
  }
}

// Adds up the samples of this launch, always in the same order, in the block that ends last.
__device__ inline void finish_loss(const DistanceParams& params, Control& control) {
  double total = params.continues ? __ldcg(params.sum) : 0.0;
  for (int i = 0; i < params.count; ++i) {
    const DistancePair& pair = params.pairs[i];
    const double* squares = params.squares + int64_t(pair.row) * params.B;
    double sum[1] = {};
    for (int b = threadIdx.x; b < params.B; b += kThreads) {
      const double square = __ldcg(squares + b);
      sum[0] += params.root ? sqrt(square) : square;
    }
    block_sum(sum, control);
    total = params.add ? total + pair.weight * sum[0] : pair.weight * sum[0];
    if (threadIdx.x != 0 || (params.add && i + 1 < params.count)) continue;
    store_loss(params.loss, params.loss_fp64, params.add ? 0 : params.first_pair + i, total);
    if (params.add) *params.sum = total;
  }
}

// The weighted distances of a list of pairs, added up, and the square of each.
template <bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    distance_loss_kernel(const __grid_constant__ DistanceParams params) {
  using A = std::conditional_t<fp64, double, float>;
  AT_FUSED_DYNAMIC_SHARED(bytes);
  Control& control = *reinterpret_cast<Control*>(bytes);
  const DistancePlace place(params);
  const DistancePair& pair = params.pairs[place.i];
  // In fp64: squares of fp32 overflow from 2e19 on.
  double sum[1] = {};
  for_each_turn<A>(pair, place, [&](const Turns<A>&, const A(&x)[kTurn<A>], const A(&y)[kTurn<A>]) {
#pragma unroll
    for (int j = 0; j < kTurn<A>; ++j) {
      const double d = double(x[j] - y[j]);
      sum[0] += d * d;
    }
  });
  block_sum(sum, control);
  double* square = params.squares + int64_t(pair.row) * params.B + place.b;
  if (pair.pieces == 1) {
    if (threadIdx.x == 0) *square = sum[0];
  } else {
    double* sums = params.sums + pair.first_task + place.b * pair.pieces;
    if (threadIdx.x == 0) sums[place.piece] = sum[0];
    uint32_t* arrived = params.arrived + int64_t(place.i) * params.B + place.b;
    if (!arrives_last(arrived, 1, uint32_t(pair.pieces), control)) return;
    double total[1] = {};
    for (int piece = threadIdx.x; piece < pair.pieces; piece += kThreads) {
      total[0] += __ldcg(sums + piece);
    }
    block_sum(total, control);
    if (threadIdx.x == 0) *square = total[0];
  }
  if (arrives_last(params.finished, 1, uint32_t(params.count) * uint32_t(params.B), control)) {
    finish_loss(params, control);
  }
}

// The gradients of the a of a list of pairs.
template <bool fp64>
__global__ void __launch_bounds__(kThreads, 2)
    distance_loss_backward_kernel(const __grid_constant__ DistanceParams params) {
  using A = std::conditional_t<fp64, double, float>;
  const DistancePlace place(params);
  const DistancePair& pair = params.pairs[place.i];
  const double square = params.squares[int64_t(pair.row) * params.B + place.b];
  const double factor = gradient_of(pair.gradient, params.gradient_fp64) * pair.weight *
                        distance_slope(square, params.root);
  // In two factors: either is within fp32's range where the product with a - b is.
  const A first = A(factor == 0 ? 1 : sqrt(fabs(factor))), second = A(factor / double(first));
  void* out = const_cast<void*>(sample(pair.out, pair.a_dtype, place.b * pair.out_stride));
  for_each_turn<A>(pair, place, [&](const Turns<A>& turn, A(&x)[kTurn<A>], const A(&y)[kTurn<A>]) {
#pragma unroll
    for (int j = 0; j < kTurn<A>; ++j) x[j] = ((x[j] - y[j]) * first) * second;
    store_turn(out, pair.a_dtype, turn, x);
  });
}

void launch_distance_loss(const DistanceParams& params, const Launch& launch) {
  launch_instance(AT_FUSED_DTYPES(distance_loss_kernel), launch, params);
}

void launch_distance_loss_backward(const DistanceParams& params, const Launch& launch) {
  launch_instance(AT_FUSED_DTYPES(distance_loss_backward_kernel), launch, params);
}

}  // namespace at_fused
