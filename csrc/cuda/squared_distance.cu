#include "elements.cuh"

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
  return static_cast<const char*>(data) + offset * bytes_of(dtype);
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

// sum |a - b|^2 of every sample of a list of pairs.
template <bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    squared_distance_kernel(const __grid_constant__ DistanceParams params) {
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
  double* result = params.result + int64_t(place.i) * params.B + place.b;
  if (pair.pieces == 1) {
    if (threadIdx.x == 0) *result = sum[0];
    return;
  }
  double* sums = params.sums + pair.first_task + place.b * pair.pieces;
  if (threadIdx.x == 0) sums[place.piece] = sum[0];
  uint32_t* arrived = params.arrived + int64_t(place.i) * params.B + place.b;
  if (!arrives_last(arrived, 1, uint32_t(pair.pieces), control)) return;
  double total[1] = {};
  for (int piece = threadIdx.x; piece < pair.pieces; piece += kThreads) {
    total[0] += __ldcg(sums + piece);
  }
  block_sum(total, control);
  if (threadIdx.x == 0) *result = total[0];
}

// 2 * c[i, b] * (a - b) for a list of pairs.
template <bool fp64>
__global__ void __launch_bounds__(kThreads, 2)
    squared_distance_backward_kernel(const __grid_constant__ DistanceParams params) {
  using A = std::conditional_t<fp64, double, float>;
  const DistancePlace place(params);
  const DistancePair& pair = params.pairs[place.i];
  const double factor = 2 * params.coefficients[int64_t(place.i) * params.B + place.b];
  // In two factors: either is within fp32's range where the product with a - b is.
  const A first = A(factor == 0 ? 1 : sqrt(fabs(factor))), second = A(factor / double(first));
  void* out = const_cast<void*>(sample(pair.out, pair.a_dtype, place.b * pair.out_stride));
  for_each_turn<A>(pair, place, [&](const Turns<A>& turn, A(&x)[kTurn<A>], const A(&y)[kTurn<A>]) {
#pragma unroll
    for (int j = 0; j < kTurn<A>; ++j) x[j] = ((x[j] - y[j]) * first) * second;
    store_turn(out, pair.a_dtype, turn, x);
  });
}

void launch_squared_distance(const DistanceParams& params, const DistillLaunch& launch) {
  launch_for_dtypes(squared_distance_kernel<false>, squared_distance_kernel<true>,
                    "squared_distance_kernel", params, launch, sizeof(Control));
}

void launch_squared_distance_backward(const DistanceParams& params, const DistillLaunch& launch) {
  launch_for_dtypes(squared_distance_backward_kernel<false>, squared_distance_backward_kernel<true>,
                    "squared_distance_backward_kernel", params, launch, 0);
}

}  // namespace at_fused
