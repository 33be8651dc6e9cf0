// The loss of a list of pairs: maps, norms, losses and coefficient maps; at_value_and_grad also
// sweeps students that it keeps on chip.
#include "attention_map.cuh"
#include "launch.cuh"
#include "sweep.cuh"

namespace at_fused {

// A sample's map, in fp64 for fp64 features.
template <bool fp64>
struct SampleMap {
  void* data;
  bool wide;

  __device__ __forceinline__ void* at(int64_t n) const {
    return static_cast<char*>(data) + n * accumulate_size(wide);
  }
  __device__ __forceinline__ double get(int n) const {
    if constexpr (fp64) {
      if (wide) return static_cast<const double*>(data)[n];
    }
    return double(static_cast<const float*>(data)[n]);
  }
  __device__ __forceinline__ void set(int n, double v) const {
    if constexpr (fp64) {
      if (wide) {
        static_cast<double*>(data)[n] = v;
        return;
      }
    }
    static_cast<float*>(data)[n] = float(v);
  }
};

template <bool fp64>
__device__ __forceinline__ SampleMap<fp64> map_of(const View& x, void* maps, int64_t b) {
  const bool wide = x.dtype == Dtype::float64;
  char* data = static_cast<char*>(maps);
  if (data) data += b * x.N * accumulate_size(wide);
  return {data, wide};
}

// The two maps of a sample, and where in global memory (of a student on chip: where it is) they or
// their coefficients are left. Without data a result is not wanted.
template <bool fp64>
struct SampleMaps {
  SampleMap<fp64> student, teacher;
  SampleMap<fp64> student_result, teacher_result;
  bool student_grad, teacher_grad;  // the result is the coefficient map k; else the raw map
};

// Copies a sample's maps, each position by the thread that will finish it. A load takes as long as
// the memory's latency, so eight are under way before the first is stored.
template <bool fp64>
__device__ __forceinline__ void copy_maps(const SampleMaps<fp64>& maps, int N) {
  constexpr int U = 4;
#pragma unroll 1
  for (int begin = threadIdx.x; begin < N; begin += U * kThreads) {
    std::conditional_t<fp64, double, float> student[U] = {}, teacher[U] = {};
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (begin + u * kThreads < N) {
        student[u] = maps.student_result.get(begin + u * kThreads);
        teacher[u] = maps.teacher_result.get(begin + u * kThreads);
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (begin + u * kThreads < N) {
        maps.student.set(begin + u * kThreads, student[u]);
        maps.teacher.set(begin + u * kThreads, teacher[u]);
      }
    }
  }
}

// Multiplies a map, or its coefficients, by the sample's mask. Each position belongs to one thread,
// here as in finish_sample.
template <bool fp64>
__device__ __forceinline__ void apply_mask(const PairParams& pair, int b,
                                           const SampleMap<fp64>& map) {
  const bool wide = pair.student.dtype == Dtype::float64 || pair.teacher.dtype == Dtype::float64;
  const int64_t first = int64_t(b) * pair.student.N;
#pragma unroll 1
  for (int n = threadIdx.x; n < pair.student.N; n += kThreads) {
    map.set(n, map.get(n) * factor_of(pair.mask, fp64 && wide, first + n));
  }
}

// The sample's share of the loss; all in fp64: maps are small, and their squares overflow fp32 from
// features of 1e10 on.
template <bool fp64>
__device__ double finish_sample(const LossParams& params, const PairParams& pair, int b,
                                const SampleMaps<fp64>& maps, bool in_place, Control& control) {
  const int N = pair.student.N;
  double squares[2] = {};
  for (int n = threadIdx.x; n < N; n += kThreads) {
    const double s = maps.student.get(n), t = maps.teacher.get(n);
    squares[0] += s * s;
    squares[1] += t * t;
  }
  block_sum(squares, control);
  const Divisor ds(sqrt(squares[0]), params.eps_mode, params.eps);
  const Divisor dt(sqrt(squares[1]), params.eps_mode, params.eps);

  // A division gives a single position exactly 1, so that its loss is exactly 0.
  const auto normalize = [N](double raw, const Divisor& by) {
    return N == 1 ? raw / by.divisor : raw * by.inverse;
  };
  // The differences are summed as such: 2 - 2 qs.qt would cancel where the maps are alike.
  double sums[3] = {};
  for (int n = threadIdx.x; n < N; n += kThreads) {
    const double qs = normalize(maps.student.get(n), ds);
    const double qt = normalize(maps.teacher.get(n), dt);
    const double difference = qs - qt;
    sums[0] += difference * difference;
    sums[1] += difference * qs;
    sums[2] += difference * qt;
  }
  block_sum(sums, control);
  const double distance = sqrt(sums[0]);
  const bool code = params.form == Form::code;
  const double mean = code ? pair.weight / double(N) : pair.weight;

  // Raw maps that were shared by blocks are where they should be already.
  const bool student = maps.student_result.data && (maps.student_grad || !in_place);
  const bool teacher = maps.teacher_result.data && (maps.teacher_grad || !in_place);
  if (student || teacher) {
    // dL/dq = slope * difference; at difference = 0 the norm of the paper's form takes 0.
    const double slope =
        (code            ? 2 * mean
         : distance == 0 ? 0.0
                         : mean / distance) *
        params.scale *
        factor_of(pair.loss_gradient, params.loss_gradient_fp64, b * params.sample_step);
    // Where a map is divided by a constant there is nothing to project out.
    const double along_student = ds.to_unit == 0 ? 0.0 : sums[1] * ds.to_unit;
    const double along_teacher = dt.to_unit == 0 ? 0.0 : sums[2] * dt.to_unit;
    const double gs = slope * ds.inverse * params.p * pair.student_scale;
    const double gt = slope * dt.inverse * params.p * pair.teacher_scale;
    for (int n = threadIdx.x; n < N; n += kThreads) {
      const double s = maps.student.get(n), t = maps.teacher.get(n);
      const double qs = normalize(s, ds), qt = normalize(t, dt);
      const double difference = qs - qt;
      if (student) {
        maps.student_result.set(n, maps.student_grad ? gs * (difference - qs * along_student) : s);
      }
      if (teacher) {
        maps.teacher_result.set(n, maps.teacher_grad ? gt * (qt * along_teacher - difference) : t);
      }
    }
  }
  return mean * (code ? sums[0] : distance);
}

// What a block holds in shared memory.
struct SharedMemory {
  Control* control;
  char* scratch;
  char* student_map;
  char* teacher_map;
  char* kept;  // a whole student sample

  __device__ SharedMemory(char* shared, int map_bytes)
      : control(reinterpret_cast<Control*>(shared)),
        scratch(shared + kControlBytes),
        student_map(scratch + kScratchBytes),
        teacher_map(student_map + map_bytes / 2),
        kept(student_map + map_bytes) {}
};

// Adds the samples' losses of this launch, in the same order whatever the schedule was: those of a
// pair by one warp, or by several where there are fewer pairs.
__device__ inline void total_losses(const LossParams& params, Control& control) {
  static_assert(kMaxPairs <= 3 * kWarps);
  const int lane = threadIdx.x % 32, parts = max(1, kWarps / params.count);
  for (int job = threadIdx.x / 32; job < params.count * parts; job += kWarps) {
    const PairParams& pair = params.pairs[job / parts];
    double sum = 0;
#pragma unroll 4
    for (int b = job % parts * 32 + lane; b < pair.B; b += 32 * parts) {
      sum += params.sample_losses[pair.first_sample + b];
    }
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
    if (lane == 0) control.sums[job] = sum;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  double total = params.add && params.continues ? *params.sum : 0.0;
  for (int i = 0; i < params.count; ++i) {
    double sum = 0;
    for (int part = 0; part < parts; ++part) sum += control.sums[i * parts + part];
    total += sum;
    if (!params.add) store_loss(params.loss, params.loss_fp64, params.pairs[i].number, sum);
  }
  if (!params.add) return;
  store_loss(params.loss, params.loss_fp64, 0, total);
  *params.sum = total;
}

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

// The losses of `samples` more samples are in; the block that brings the launch's last adds them
// all up.
__device__ inline void finish_loss(const LossParams& params, int samples, Control& control) {
  if (params.of_samples) return;
  if (arrives_last(params.finished, uint32_t(samples), uint32_t(params.samples), control)) {
    total_losses(params, control);
  }
}

// What a block maps of a sample: all of both sides, or a piece of one where several blocks share
// it.
struct Piece {
  int32_t side_begin, side_end;  // 0: student, 1: teacher
  int32_t begin, end;            // positions
};

__device__ __forceinline__ Piece piece_of(const PairParams& pair, int number) {
  if (pair.samples) return {0, 2, 0, pair.student.N};
  const int of_a_map = pair.pieces / 2;
  const int side = number / of_a_map, begin = number % of_a_map * pair.positions;
  return {side, side + 1, begin, min(begin + pair.positions, pair.student.N)};
}

// Maps and loss of sample b, or piece `number` of it; false where other blocks still have pieces.
// Whole samples have their maps on chip. Blocks that share a sample meet in global memory, and the
// one that brings the last piece finishes it. In kernels that `keep`, a student that is to be swept
// stays on chip as well, and its coefficients.
template <class E, bool fp64, bool keeps>
__device__ __forceinline__ bool run_sample(const LossParams& params, int i, int b, int number,
                                           const SharedMemory& shared) {
  // In shared memory: it is the same in all threads, whose registers are needed for other things.
  SampleMaps<fp64>& maps = *reinterpret_cast<SampleMaps<fp64>*>(shared.control->maps);
  static_assert(sizeof(maps) <= sizeof(shared.control->maps));
  __syncthreads();  // the last sample's maps may still be read
  if (threadIdx.x == 0) {
    const PairParams& pair = params.pairs[opaque(i)];
    const bool fits = pair.student.N * accumulate_size(fp64) <= params.map_bytes / 2;
    maps.student_result = map_of<fp64>(pair.student, pair.student_maps, b);
    maps.teacher_result = map_of<fp64>(pair.teacher, pair.teacher_maps, b);
    maps.student = fits ? map_of<fp64>(pair.student, shared.student_map, 0) : maps.student_result;
    maps.teacher = fits ? map_of<fp64>(pair.teacher, shared.teacher_map, 0) : maps.teacher_result;
    if (keeps && pair.sweep.out) maps.student_result = maps.student;
    maps.student_grad = params.student_grad;
    maps.teacher_grad = params.teacher_grad;
  }
  __syncthreads();
  // One piece of code for both: unrolled it would be twice as long.
  const Piece sides = piece_of(params.pairs[opaque(i)], opaque(number));
#pragma unroll 1
  for (int side = sides.side_begin; side < sides.side_end; ++side) {
    const PairParams& pair = params.pairs[opaque(i)];
    const Piece tile = piece_of(pair, opaque(number));
    const bool whole = pair.samples > 0;
    const SampleMap<fp64>& map = whole ? (side ? maps.teacher : maps.student)
                                       : (side ? maps.teacher_result : maps.student_result);
    map_tile<E, fp64, keeps>(
        side ? pair.teacher : pair.student, {b, tile.begin, tile.end, shared.scratch}, params.p,
        side ? pair.teacher_scale : pair.student_scale,
        side == 0 && pair.sweep.out ? shared.kept : nullptr, map.at(tile.begin));
  }
  const PairParams& pair = params.pairs[opaque(i)];
  const bool whole = pair.samples > 0;
  if (!whole) {
    uint32_t* arrived = params.arrived + pair.first_sample + b;
    if (!arrives_last(arrived, 1, uint32_t(pair.pieces), *shared.control)) return false;
    if (maps.student.data != maps.student_result.data) copy_maps(maps, pair.student.N);
  } else {
    __syncthreads();
  }
  const bool masked = pair.mask;
  if (masked) {
    apply_mask(pair, b, maps.student);
    apply_mask(pair, b, maps.teacher);
  }
  // Masked maps on chip are not yet where a raw map is kept.
  const double loss = finish_sample(params, pair, b, maps, !whole && !masked, *shared.control);
  if (masked) {
    if (maps.student_grad) apply_mask(pair, b, maps.student_result);
    if (maps.teacher_grad) apply_mask(pair, b, maps.teacher_result);
  }
  store_sample_loss(params, i, b, loss);
  return true;
}

// The block's task: samples, or a piece of one. Calls then(i, b) after each.
template <class E, bool fp64, bool keeps, class F>
__device__ __forceinline__ void run_task(const LossParams& params, const SharedMemory& shared,
                                         F then) {
  const int i = member_of(params.pairs, params.count, blockIdx.x);
  const PairParams& pair = params.pairs[i];
  const int local = blockIdx.x - pair.first_task;
  const int b0 = pair.samples ? local * pair.samples : local / pair.pieces;
  const int b1 = pair.samples ? min(b0 + pair.samples, pair.B) : b0 + 1;
  bool finished = true;
  for (int b = b0; b < b1; ++b) {
    finished = run_sample<E, fp64, keeps>(params, i, b, local % pair.pieces, shared);
    then(i, b);
  }
  if (finished) finish_loss(params, b1 - b0, *shared.control);
}

// ---- kernels -----------------------------------------------------------------------------------

// Losses, and maps where they are kept, of a list of pairs, in one pass over the features.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    at_loss_kernel(const __grid_constant__ LossParams params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  run_task<E, fp64, false>(params, SharedMemory(bytes, params.map_bytes), [](int, int) {});
}

void launch_at_loss(const LossParams& params, const Launch& launch) {
  AT_FUSED_LAUNCH_POWERS(at_loss_kernel, params, launch);
}

// at_loss_kernel that keeps students on chip where they fit, and sweeps them there: their gradient
// takes no second read. Of the others it leaves the coefficients.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, E::short_code ? kBlocks<fp64> : kGradientBlocks)
    at_value_and_grad_kernel(const __grid_constant__ LossParams params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  const SharedMemory shared(bytes, params.map_bytes);
  run_task<E, fp64, true>(params, shared, [&](int i, int b) {
    const PairParams& pair = params.pairs[opaque(i)];
    if (!pair.sweep.out) return;
    __syncthreads();  // the coefficients are written
    const Span all{0, rows_of(pair.student), 0, columns_of(pair.student)};
    sweep_piece<E, fp64, true>(
        pair.student, pair.sweep, b, all, params.p, [] { return 1.0; }, shared.student_map,
        shared.kept);
  });
}

void launch_at_value_and_grad(const LossParams& params, const Launch& launch) {
  AT_FUSED_LAUNCH_POWERS(at_value_and_grad_kernel, params, launch);
}

// Losses, and dL/dQ where it is wanted, of a list of pairs of raw maps. It computes in fp64
// whatever the maps are, and has the registers for it.
template <bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<true>)
    map_loss_kernel(const __grid_constant__ LossParams params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  Control& control = *reinterpret_cast<Control*>(bytes);
  const int i = member_of(params.pairs, params.count, blockIdx.x);
  const PairParams& pair = params.pairs[i];
  const int b0 = (int(blockIdx.x) - pair.first_task) * pair.samples;
  const int b1 = min(b0 + pair.samples, pair.B);
  for (int b = b0; b < b1; ++b) {
    const auto given = [&](const View& map) {
      return map_of<fp64>(map, const_cast<void*>(map.data), b);
    };
    const SampleMaps<fp64> maps{given(pair.student),
                                given(pair.teacher),
                                map_of<fp64>(pair.student, pair.student_maps, b),
                                map_of<fp64>(pair.teacher, pair.teacher_maps, b),
                                true,
                                true};
    store_sample_loss(params, i, b, finish_sample<fp64>(params, pair, b, maps, false, control));
  }
  finish_loss(params, b1 - b0, control);
}

void launch_map_loss(const LossParams& params, const Launch& launch) {
  AT_FUSED_LAUNCH_DTYPES(map_loss_kernel, params, launch);
}

}  // namespace at_fused
