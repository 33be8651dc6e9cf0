// The loss of a list of pairs: maps, norms, losses and coefficient maps.
#pragma once

#include "attention_map.cuh"
#include "sweep.cuh"

namespace at_fused {

// A sample's map, in fp64 for fp64 features. Maps that other blocks wrote are `remote`: this
// multiprocessor's first-level cache may know nothing of them.
template <bool fp64>
struct SampleMap {
  void* data;
  bool wide, remote;

  __device__ __forceinline__ void* at(int64_t n) const {
    return static_cast<char*>(data) + n * accumulate_size(wide);
  }
  __device__ __forceinline__ double get(int n) const {
    if constexpr (fp64) {
      if (wide) return value(static_cast<double*>(data) + n);
    }
    return double(value(static_cast<float*>(data) + n));
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

 private:
  template <class A>
  __device__ __forceinline__ A value(A* from) const {
    return remote ? __ldcg(from) : *from;
  }
};

template <bool fp64>
__device__ __forceinline__ SampleMap<fp64> map_of(const View& x, void* maps, int64_t b,
                                                  bool remote) {
  const bool wide = x.dtype == Dtype::float64;
  char* data = static_cast<char*>(maps);
  if (data) data += b * x.N * accumulate_size(wide);
  return {data, wide, remote};
}

// The two maps of a sample and what becomes of them. Without data a result is not wanted.
template <bool fp64>
struct SampleMaps {
  SampleMap<fp64> student, teacher;
  SampleMap<fp64> student_result, teacher_result;
  bool student_grad, teacher_grad;  // the result is the coefficient map k; else the raw map
};

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
__device__ double finish_sample(const LossParams& params, const PairParams& pair,
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
    const double slope = code ? 2 * mean : distance == 0 ? 0.0 : mean / distance;
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

// Adds the samples' losses of this launch, in the same order whatever the schedule was.
__device__ inline void total_losses(const LossParams& params, Control& control) {
  double total = params.continues ? __ldcg(params.sum) : 0.0;
  for (int i = 0; i < params.count; ++i) {
    const PairParams& pair = params.pairs[i];
    double sum[1] = {};
    for (int b = threadIdx.x; b < pair.B; b += kThreads) {
      sum[0] += __ldcg(params.sample_losses + pair.first_sample + b);
    }
    block_sum(sum, control);
    total = params.add ? total + sum[0] : sum[0];
    if (threadIdx.x == 0 && (!params.add || i + 1 == params.count)) {
      store_loss(params.loss, params.loss_fp64, params.add ? 0 : params.first_pair + i, total);
      if (params.add) *params.sum = total;
    }
  }
}

__device__ __forceinline__ void store_sample_loss(const LossParams& params, int i, int b,
                                                  double loss) {
  if (threadIdx.x > 0) return;
  const PairParams& pair = params.pairs[i];
  if (params.of_samples) {
    store_loss(params.loss, params.loss_fp64, int64_t(params.first_pair + i) * pair.B + b, loss);
  } else {
    params.sample_losses[pair.first_sample + b] = loss;
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
// Maps are made on chip where they fit; blocks that share a sample meet in global memory, and the
// one that brings the last piece finishes it. With `keeps` a whole student sample stays on chip as
// well, and its coefficient map beside it.
template <class E, bool fp64, bool keeps>
__device__ __forceinline__ bool run_sample(const LossParams& params, int i, int b, int number,
                                           const SharedMemory& shared) {
  const auto fits = [&](const PairParams& pair) {
    return pair.student.N * accumulate_size(fp64) <= params.map_bytes / 2;
  };
  // In shared memory: it is the same in all threads, whose registers are needed for other things.
  SampleMaps<fp64>& maps = *reinterpret_cast<SampleMaps<fp64>*>(shared.control->maps);
  static_assert(sizeof(maps) <= sizeof(shared.control->maps));
  __syncthreads();  // the last sample's maps may still be read
  if (threadIdx.x == 0) {
    const PairParams& pair = params.pairs[here(i)];
    const bool whole = pair.samples > 0;
    maps.student_result = map_of<fp64>(pair.student, pair.student_maps, b, true);
    maps.teacher_result = map_of<fp64>(pair.teacher, pair.teacher_maps, b, true);
    maps.student =
        fits(pair) ? map_of<fp64>(pair.student, shared.student_map, 0, false) : maps.student_result;
    maps.teacher =
        fits(pair) ? map_of<fp64>(pair.teacher, shared.teacher_map, 0, false) : maps.teacher_result;
    if (keeps && whole) maps.student_result = maps.student;
    maps.student_grad = params.student_grad;
    maps.teacher_grad = params.teacher_grad;
  }
  __syncthreads();
  // One piece of code for both: unrolled it would be twice as long.
  const Piece sides = piece_of(params.pairs[here(i)], here(number));
#pragma unroll 1
  for (int side = sides.side_begin; side < sides.side_end; ++side) {
    const PairParams& pair = params.pairs[here(i)];
    const Piece tile = piece_of(pair, here(number));
    const SampleMap<fp64>& map = side ? maps.teacher : maps.student;
    map_tile<E, fp64, keeps>(
        side ? pair.teacher : pair.student, {b, tile.begin, tile.end, shared.scratch}, params.p,
        side ? pair.teacher_scale : pair.student_scale,
        side == 0 && pair.samples > 0 ? shared.kept : nullptr, map.at(tile.begin));
  }
  const PairParams& pair = params.pairs[here(i)];
  const bool whole = pair.samples > 0;
  __syncthreads();
  if (!whole) {
    const Piece piece = piece_of(pair, here(number));
    const bool teacher = piece.side_begin;
    if (fits(pair)) {
      const SampleMap<fp64>& from = teacher ? maps.teacher : maps.student;
      const SampleMap<fp64>& to = teacher ? maps.teacher_result : maps.student_result;
      for (int n = piece.begin + threadIdx.x; n < piece.end; n += kThreads) to.set(n, from.get(n));
    }
    uint32_t* arrived = params.arrived + pair.first_sample + b;
    if (!arrives_last(arrived, 1, uint32_t(pair.pieces), *shared.control)) return false;
    if (fits(pair)) {  // each position by the thread that will finish it
      for (int n = threadIdx.x; n < pair.student.N; n += kThreads) {
        const bool own = n >= piece.begin && n < piece.end;
        if (teacher || !own) maps.student.set(n, maps.student_result.get(n));
        if (!teacher || !own) maps.teacher.set(n, maps.teacher_result.get(n));
      }
    }
  }
  const bool masked = pair.mask;
  if (masked) {
    apply_mask(pair, b, maps.student);
    apply_mask(pair, b, maps.teacher);
  }
  // Masked maps on chip are not yet where a raw map is kept.
  const double loss = finish_sample(params, pair, maps, !whole && !masked, *shared.control);
  if (masked) {
    if (maps.student_grad) apply_mask(pair, b, maps.student_result);
    if (maps.teacher_grad) apply_mask(pair, b, maps.teacher_result);
  }
  store_sample_loss(params, i, b, loss);
  return true;
}

// The losses of `samples` more samples are in; whoever brings the launch's last adds them all up.
__device__ inline void finish_loss(const LossParams& params, int samples, Control& control) {
  if (params.of_samples) return;
  if (arrives_last(params.finished, uint32_t(samples), uint32_t(params.samples), control)) {
    total_losses(params, control);
  }
}

}  // namespace at_fused
