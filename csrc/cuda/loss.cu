// The loss of a list of pairs: maps, norms, losses and coefficient maps; at_value_and_grad also
// sweeps students that it keeps on chip.
#include "attention_map.cuh"
#include "sweep.cuh"

namespace at_fused {

// ---- a sample's maps --------------------------------------------------------------------------

// One side's map, in fp64 for fp64 features, and where it or its coefficients are left; null:
// nowhere. Both may be one place.
struct SampleMap {
  const void* from;
  void* to;
  bool wide;

  __device__ __forceinline__ double get(int n) const { return factor_of(from, wide, n); }
  __device__ __forceinline__ void set(int n, double value) const { store_loss(to, wide, n, value); }
};

// Position n of sample b in maps (B, N) of x.
__device__ __forceinline__ char* position_of(const View& x, const void* maps, int64_t b, int n) {
  char* const first = static_cast<char*>(const_cast<void*>(maps));
  return first ? first + (b * x.N + n) * accumulate_size(x.dtype == Dtype::float64) : nullptr;
}

// The sample's share of the loss; all in fp64: maps are small, and their squares overflow fp32 from
// features of 1e10 on.
__device__ __forceinline__ double finish_sample(const LossParams& params, const PairParams& pair,
                                                int b, const SampleMap (&maps)[2],
                                                Control& control) {
  const int N = pair.sides[kStudent].view.N;
  const auto mask = [&](int n) {
    return factor_of(pair.mask, maps[0].wide || maps[1].wide, int64_t(b) * N + n);
  };
  // Each position belongs to one thread, which may leave its result where it reads.
  const auto read = [&](int side, int n) { return maps[side].get(n) * mask(n); };
  double squares[2] = {};
#pragma unroll 4
  for (int n = threadIdx.x; n < N; n += kThreads) {
    const double s = read(kStudent, n), t = read(kTeacher, n);
    squares[kStudent] += s * s;
    squares[kTeacher] += t * t;
  }
  block_sum(squares, control);
  const Divisor by[] = {Divisor(sqrt(squares[kStudent]), params.eps_mode, params.eps),
                        Divisor(sqrt(squares[kTeacher]), params.eps_mode, params.eps)};

  // A division gives a single position exactly 1, so that its loss is exactly 0.
  const auto normalize = [&](int side, double raw) {
    return N == 1 ? raw / by[side].divisor : raw * by[side].inverse;
  };
  // The differences are summed as such: 2 - 2 qs.qt would cancel where the maps are alike.
  double sums[3] = {};
  for (int n = threadIdx.x; n < N; n += kThreads) {
    const double qs = normalize(kStudent, read(kStudent, n));
    const double qt = normalize(kTeacher, read(kTeacher, n));
    const double difference = qs - qt;
    sums[kStudent] += difference * qs;
    sums[kTeacher] += difference * qt;
    sums[2] += difference * difference;
  }
  block_sum(sums, control);
  const double distance = sqrt(sums[2]);
  const bool code = params.form == Form::code;
  const double mean = code ? pair.weight / double(N) : pair.weight;

  if (maps[kStudent].to || maps[kTeacher].to) {
    // dL/dq = slope * difference; at difference = 0 the norm of the paper's form takes 0.
    const double slope =
        (code            ? 2 * mean
         : distance == 0 ? 0.0
                         : mean / distance) *
        params.scale *
        factor_of(pair.loss_gradient, params.loss_gradient_fp64, b * params.sample_step);
    double g[2], along[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const double slope_of_side = side == kStudent ? slope : -slope;
      g[side] = slope_of_side * by[side].inverse * params.p * pair.sides[side].scale;
      // Where a map is divided by a constant there is nothing to project out.
      along[side] = by[side].to_unit == 0 ? 0.0 : sums[side] * by[side].to_unit;
    }
    for (int n = threadIdx.x; n < N; n += kThreads) {
      const double raw[] = {read(kStudent, n), read(kTeacher, n)};
      const double q[] = {normalize(kStudent, raw[0]), normalize(kTeacher, raw[1])};
      const double difference = q[kStudent] - q[kTeacher];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (!maps[side].to) continue;
        const double k = g[side] * (difference - q[side] * along[side]) * mask(n);
        maps[side].set(n, params.gradient[side] ? k : raw[side]);
      }
    }
  }
  return mean * (code ? sums[2] : distance);
}

// ---- losses of samples ------------------------------------------------------------------------

__device__ __forceinline__ void store_sample_loss(const LossParams& params, int i, int b,
                                                  double loss) {
  if (threadIdx.x > 0) return;
  const PairParams& pair = params.pairs[i];
  if (params.of_samples) {
    store_loss(params.loss, params.loss_fp64, int64_t(pair.number) * pair.B + b, loss);
  } else {
    params.sample_losses[pair.first_sample + b] = loss;
  }
}

// The losses of `samples` more samples are in. The block that brings the launch's last adds them
// all up, those of a pair by one warp: in the same order whatever the schedule was.
__device__ inline void finish_loss(const LossParams& params, int samples, Control& control) {
  if (params.of_samples) return;
  if (!arrives_last(params.finished, uint32_t(samples), uint32_t(params.samples), control)) return;
  for (int i = threadIdx.x / 32; i < params.count; i += kWarps) {
    const PairParams& pair = params.pairs[i];
    double sum = 0;
#pragma unroll 4
    for (int b = threadIdx.x % 32; b < pair.B; b += 32) {
      sum += params.sample_losses[pair.first_sample + b];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) control.sums[i] = sum;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  double total = params.continues ? *params.sum : 0.0;
  for (int i = 0; i < params.count; ++i) {
    total += control.sums[i];
    if (!params.add) {
      store_loss(params.loss, params.loss_fp64, params.pairs[i].number, control.sums[i]);
    }
  }
  if (!params.add) return;
  store_loss(params.loss, params.loss_fp64, 0, total);
  *params.sum = total;
}

// ---- samples of features ----------------------------------------------------------------------

// What a block holds in shared memory.
struct SharedMemory {
  Control* control;
  char* scratch;
  int map_bytes;

  __device__ SharedMemory(char* shared, int map_bytes)
      : control(reinterpret_cast<Control*>(shared)),
        scratch(shared + kControlBytes),
        map_bytes(map_bytes) {}
  __device__ __forceinline__ char* map(int side) const {
    return scratch + kScratchBytes + side * (map_bytes / 2);
  }
  __device__ __forceinline__ char* kept() const { return map(2); }  // a whole student sample
};

// Maps a sample, or piece `number` of one, and finishes it: its loss, and what is left of its maps.
// A whole sample's maps stay on chip. Blocks that share a sample meet in global memory, and the one
// that brings the last piece finishes it. In kernels that `keep`, a student that is to be swept
// stays on chip as well, and its coefficients. False where another block finishes the sample.
template <class E, bool fp64, bool keeps>
__device__ __forceinline__ bool run_sample(const LossParams& params, int i, int b, int number,
                                           const SharedMemory& shared) {
  const bool whole = params.pairs[i].samples > 0;
  const int pieces = params.pairs[i].pieces;
  __syncthreads();  // the last sample's maps may still be read
  // One piece of code for both sides: unrolled it would be twice as long.
#pragma unroll 1
  for (int at = whole ? 0 : number; at < (whole ? 2 : number + 1); at += 1) {
    const PairParams& pair = params.pairs[opaque(i)];
    const int side = at / pieces, begin = at % pieces * pair.positions;
    const View& x = pair.sides[side].view;
    map_tile<E, fp64, keeps>(
        x, {b, begin, min(begin + pair.positions, x.N), shared.scratch}, params.p,
        pair.sides[side].scale, side == kStudent && pair.out.data ? shared.kept() : nullptr,
        whole ? shared.map(side) : position_of(x, pair.sides[side].maps, b, begin));
  }
  const PairParams& pair = params.pairs[opaque(i)];
  if (whole) {
    __syncthreads();
  } else {
    uint32_t* arrived = params.arrived + pair.first_sample + b;
    if (!arrives_last(arrived, 1, uint32_t(2 * pieces), *shared.control)) return false;
  }
  const bool swept = keeps && pair.out.data;
  SampleMap maps[2];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const View& x = pair.sides[side].view;
    char* const result = position_of(x, pair.sides[side].maps, b, 0);
    maps[side].from = whole ? shared.map(side) : result;
    maps[side].to = swept && side == kStudent ? shared.map(side) : result;
    maps[side].wide = fp64 && x.dtype == Dtype::float64;
  }
  store_sample_loss(params, i, b, finish_sample(params, pair, b, maps, *shared.control));
  if constexpr (keeps) {
    if (!swept) return true;
    __syncthreads();  // the coefficients are written
    const View& x = pair.sides[kStudent].view;
    sweep_piece<E, fp64, true, false>(x, pair.out, pair.out, b, {0, rows_of(x), 0, columns_of(x)},
                                      params.p, 1, shared.map(kStudent), shared.kept());
  }
  return true;
}

// The block's task: samples, or a piece of one.
template <class E, bool fp64, bool keeps>
__device__ __forceinline__ void run_task(const LossParams& params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  const SharedMemory shared(bytes, params.map_bytes);
  const int i = member_of(params.pairs, params.count, blockIdx.x);
  const PairParams& pair = params.pairs[i];
  const int local = blockIdx.x - pair.first_task, pieces = 2 * pair.pieces;
  const int b0 = pair.samples ? local * pair.samples : local / pieces;
  const int b1 = pair.samples ? min(b0 + pair.samples, pair.B) : b0 + 1;
  bool finished = true;
  for (int b = b0; b < b1; ++b) {
    finished = run_sample<E, fp64, keeps>(params, i, b, local % pieces, shared);
  }
  if (finished) finish_loss(params, b1 - b0, *shared.control);
}

// ---- kernels -----------------------------------------------------------------------------------

// Losses, and maps where they are kept, of a list of pairs, in one pass over the features.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    at_loss_kernel(const __grid_constant__ LossParams params) {
  run_task<E, fp64, false>(params);
}

void launch_at_loss(const LossParams& params, const Launch& launch) {
  AT_FUSED_LAUNCH_POWERS(at_loss_kernel, params, launch);
}

// at_loss_kernel that keeps students on chip where they fit, and sweeps them there: their gradient
// takes no second read. Of the others it leaves the coefficients.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kGradientBlocks)
    at_value_and_grad_kernel(const __grid_constant__ LossParams params) {
  run_task<E, fp64, true>(params);
}

void launch_at_value_and_grad(const LossParams& params, const Launch& launch) {
  AT_FUSED_LAUNCH_POWERS(at_value_and_grad_kernel, params, launch);
}

// Losses, and dL/dQ where it is wanted, of a list of pairs of raw maps. It computes in fp64
// whatever the maps are, and has the registers for it.
__global__ void __launch_bounds__(kThreads, kBlocks<true>)
    map_loss_kernel(const __grid_constant__ LossParams params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  Control& control = *reinterpret_cast<Control*>(bytes);
  const int i = member_of(params.pairs, params.count, blockIdx.x);
  const PairParams& pair = params.pairs[i];
  const int b0 = (int(blockIdx.x) - pair.first_task) * pair.samples;
  const int b1 = min(b0 + pair.samples, pair.B);
  for (int b = b0; b < b1; ++b) {
    SampleMap maps[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const View& x = pair.sides[side].view;
      maps[side] = {position_of(x, x.data, b, 0), position_of(x, pair.sides[side].maps, b, 0),
                    x.dtype == Dtype::float64};
    }
    store_sample_loss(params, i, b, finish_sample(params, pair, b, maps, control));
  }
  finish_loss(params, b1 - b0, control);
}

void launch_map_loss(const LossParams& params, const Launch& launch) {
  launch_kernel("map_loss_kernel", map_loss_kernel, params, launch);
}

}  // namespace at_fused
