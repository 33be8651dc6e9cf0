// Losses and coefficient maps of a list of pairs. at_value_and_grad also writes the gradients of
// students that it caches in shared memory.
#include "attention_map.cuh"
#include "sweep.cuh"

namespace at_fused {

// ---- a sample's maps --------------------------------------------------------------------------

struct SampleMap {
  const void* input;
  void* output;  // the map or its coefficients; may be `input`; null if not needed
  bool fp64;

  __device__ __forceinline__ double load(int n) const { return value_or_one(input, fp64, n); }
  __device__ __forceinline__ void store(int n, double value) const {
    store_value(output, fp64, n, value);
  }
};

// The address of position n of sample b in maps (B, N) of x; null if `maps` is.
__device__ __forceinline__ char* map_address(const View& x, const void* maps, int64_t b, int n) {
  char* const first = static_cast<char*>(const_cast<void*>(maps));
  return first ? first + (b * x.N + n) * accumulate_size(x.dtype == Dtype::float64) : nullptr;
}

// Returns the sample's share of the loss, and writes its maps or coefficients. All arithmetic is in
// fp64: maps are small, and their squares overflow fp32 if features exceed 1e10.
__device__ __forceinline__ double finish_sample(const LossParams& params, const PairParams& pair,
                                                int b, const SampleMap (&maps)[2],
                                                Control& control) {
  const int N = pair.sides[kStudent].view.N;
  const auto mask = [&](int n) {
    return value_or_one(pair.mask, maps[0].fp64 || maps[1].fp64, int64_t(b) * N + n);
  };
  // Each position belongs to one thread, so a result may overwrite its input.
  const auto read = [&](int side, int n) { return maps[side].load(n) * mask(n); };
  double squares[2] = {};
#pragma unroll 4
  for (int n = threadIdx.x; n < N; n += kThreads) {
    const double s = read(kStudent, n), t = read(kTeacher, n);
    squares[kStudent] += s * s;
    squares[kTeacher] += t * t;
  }
  block_sum(squares, control);
  const Divisor divisors[] = {Divisor(sqrt(squares[kStudent]), params.eps_mode, params.eps),
                              Divisor(sqrt(squares[kTeacher]), params.eps_mode, params.eps)};

  // For a single position, division yields exactly 1, so the loss is exactly 0.
  const auto normalize = [&](int side, double raw) {
    return N == 1 ? raw / divisors[side].value : raw * divisors[side].inverse;
  };
  // Sums squared differences, because 2 - 2 qs.qt cancels for similar maps.
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
  const double weight = code ? pair.weight / double(N) : pair.weight;

  if (maps[kStudent].output || maps[kTeacher].output) {
    // dL/dq = slope * difference. The paper's form takes the subgradient 0 of the norm at 0.
    const double slope =
        (code            ? 2 * weight
         : distance == 0 ? 0.0
                         : weight / distance) *
        params.scale *
        value_or_one(pair.loss_gradient, params.loss_gradient_fp64, b * params.sample_stride);
    double g[2], projection[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const double slope_of_side = side == kStudent ? slope : -slope;
      g[side] = slope_of_side * divisors[side].inverse * params.p * pair.sides[side].scale;
      // With a constant divisor, the gradient has no component along q to remove.
      projection[side] = divisors[side].to_unit == 0 ? 0.0 : sums[side] * divisors[side].to_unit;
    }
    for (int n = threadIdx.x; n < N; n += kThreads) {
      const double raw[] = {read(kStudent, n), read(kTeacher, n)};
      const double q[] = {normalize(kStudent, raw[0]), normalize(kTeacher, raw[1])};
      const double difference = q[kStudent] - q[kTeacher];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (!maps[side].output) continue;
        const double k = g[side] * (difference - q[side] * projection[side]) * mask(n);
        maps[side].store(n, params.gradient[side] ? k : raw[side]);
      }
    }
  }
  return weight * (code ? sums[2] : distance);
}

// ---- losses of samples ------------------------------------------------------------------------

__device__ __forceinline__ void store_sample_loss(const LossParams& params, int i, int b,
                                                  double loss) {
  if (threadIdx.x > 0) return;
  const PairParams& pair = params.pairs[i];
  if (params.per_sample) {
    store_value(params.loss, params.loss_fp64, int64_t(pair.index) * pair.B + b, loss);
  } else {
    params.sample_losses[pair.first_sample + b] = loss;
  }
}

// Counts `samples` finished samples. The block that finishes the last one sums all losses, each
// pair's in one warp. The order is fixed, so the result does not depend on the order of blocks.
__device__ inline void finish_loss(const LossParams& params, int samples, Control& control) {
  if (params.per_sample) return;
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
  double total = params.continues_sum ? *params.sum : 0.0;
  for (int i = 0; i < params.count; ++i) {
    total += control.sums[i];
    if (!params.sums_pairs) {
      store_value(params.loss, params.loss_fp64, params.pairs[i].index, control.sums[i]);
    }
  }
  if (!params.sums_pairs) return;
  store_value(params.loss, params.loss_fp64, 0, total);
  *params.sum = total;
}

// ---- samples of features ----------------------------------------------------------------------

// Layout of a block's shared memory: control, scratch, the two maps, a student sample.
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
  __device__ __forceinline__ char* student() const { return map(2); }
};

// Computes the maps of sample b, or of one piece of it, then its loss and coefficients. The maps of
// a whole sample stay in shared memory. Blocks that share a sample write its maps to global memory,
// and the block with the last piece computes the loss; the others return false. If `caches` and the
// pair has `out`, the student's sample and its coefficients are cached in shared memory, and its
// gradient is written.
template <class E, bool fp64, bool caches>
__device__ __forceinline__ bool run_sample(const LossParams& params, int i, int b, int piece,
                                           const SharedMemory& shared) {
  const bool whole = params.pairs[i].samples_per_task > 0;
  const int pieces = params.pairs[i].pieces;
  __syncthreads();  // other threads may still read the previous sample's maps
  // Not unrolled over the two sides, which would double the code.
#pragma unroll 1
  for (int part = whole ? 0 : piece; part < (whole ? 2 : piece + 1); part += 1) {
    const PairParams& pair = params.pairs[opaque(i)];
    const int side = part / pieces, begin = part % pieces * pair.positions_per_piece;
    const View& x = pair.sides[side].view;
    map_tile<E, fp64, caches>(
        x, {b, begin, min(begin + pair.positions_per_piece, x.N), shared.scratch}, params.p,
        pair.sides[side].scale, side == kStudent && pair.out.data ? shared.student() : nullptr,
        whole ? shared.map(side) : map_address(x, pair.sides[side].maps, b, begin));
  }
  const PairParams& pair = params.pairs[opaque(i)];
  if (whole) {
    __syncthreads();
  } else {
    uint32_t* arrived = params.arrived + pair.first_sample + b;
    if (!arrives_last(arrived, 1, uint32_t(2 * pieces), *shared.control)) return false;
  }
  const bool is_swept = caches && pair.out.data;
  SampleMap maps[2];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const View& x = pair.sides[side].view;
    char* const result = map_address(x, pair.sides[side].maps, b, 0);
    maps[side].input = whole ? shared.map(side) : result;
    maps[side].output = is_swept && side == kStudent ? shared.map(side) : result;
    maps[side].fp64 = fp64 && x.dtype == Dtype::float64;
  }
  store_sample_loss(params, i, b, finish_sample(params, pair, b, maps, *shared.control));
  if constexpr (caches) {
    if (!is_swept) return true;
    __syncthreads();  // makes the coefficients visible to all threads
    const View& x = pair.sides[kStudent].view;
    sweep_piece<E, fp64, true, false>(x, pair.out, pair.out, b, {0, rows_of(x), 0, columns_of(x)},
                                      params.p, 1, shared.map(kStudent), shared.student());
  }
  return true;
}

// Runs the block's task: several samples, or a piece of one.
template <class E, bool fp64, bool caches>
__device__ __forceinline__ void run_task(const LossParams& params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  const SharedMemory shared(bytes, params.map_bytes);
  const int i = member_of(params.pairs, params.count, blockIdx.x);
  const PairParams& pair = params.pairs[i];
  const int local = blockIdx.x - pair.first_task, pieces = 2 * pair.pieces;
  const int b0 = pair.samples_per_task ? local * pair.samples_per_task : local / pieces;
  const int b1 = pair.samples_per_task ? min(b0 + pair.samples_per_task, pair.B) : b0 + 1;
  bool finished = true;
  for (int b = b0; b < b1; ++b) {
    finished = run_sample<E, fp64, caches>(params, i, b, local % pieces, shared);
  }
  if (finished) finish_loss(params, b1 - b0, *shared.control);
}

// ---- kernels -----------------------------------------------------------------------------------

// Losses of a list of pairs and, if requested, their maps, in one pass over the features.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kMinBlocks<fp64>)
    at_loss_kernel(const __grid_constant__ LossParams params) {
  run_task<E, fp64, false>(params);
}

void launch_at_loss(const LossParams& params, const Launch& launch) {
  AT_FUSED_LAUNCH_POWERS(at_loss_kernel, params, launch);
}

// at_loss_kernel that also caches students in shared memory if they fit, so that their gradients
// take no second read. For other students it writes the coefficients.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kGradientBlocks)
    at_value_and_grad_kernel(const __grid_constant__ LossParams params) {
  run_task<E, fp64, true>(params);
}

void launch_at_value_and_grad(const LossParams& params, const Launch& launch) {
  AT_FUSED_LAUNCH_POWERS(at_value_and_grad_kernel, params, launch);
}

// Losses of a list of pairs of raw maps and, if requested, dL/dQ. The arithmetic is in fp64, which
// needs the registers of kMinBlocks<true>.
__global__ void __launch_bounds__(kThreads, kMinBlocks<true>)
    map_loss_kernel(const __grid_constant__ LossParams params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  Control& control = *reinterpret_cast<Control*>(bytes);
  const int i = member_of(params.pairs, params.count, blockIdx.x);
  const PairParams& pair = params.pairs[i];
  const int b0 = (int(blockIdx.x) - pair.first_task) * pair.samples_per_task;
  const int b1 = min(b0 + pair.samples_per_task, pair.B);
  for (int b = b0; b < b1; ++b) {
    SampleMap maps[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const View& x = pair.sides[side].view;
      maps[side] = {map_address(x, x.data, b, 0), map_address(x, pair.sides[side].maps, b, 0),
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
