#include "launch.cuh"
#include "loss.cuh"

namespace at_fused {

// Losses of a list of pairs and the gradients of their students, in one pass where a student's
// sample fits on chip. Where it does not, its gradient is a later task, which reads the sample
// again while the second-level cache has it.
//
// Those tasks wait for the maps of their sample. Tasks are therefore taken in order by a ticket: a
// block only ever waits for tasks that other running blocks have taken before it, so that waiting
// ends, however few blocks the device runs at a time.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kGradientBlocks)
    at_value_and_grad_kernel(const __grid_constant__ LossParams params,
                             const __grid_constant__ GradientParams gradient) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  const SharedMemory shared(bytes, params.map_bytes);
  int number = blockIdx.x;
  if (gradient.queue) {
    number = broadcast(threadIdx.x == 0 ? int(atomicAdd(gradient.ticket, 1u)) : 0, *shared.control);
  }
  const int i = member_of(params.pairs, params.count, number);
  const PairParams& pair = params.pairs[i];
  const Sweep& sweep = gradient.pairs[i].sweep;
  const int local = number - pair.first_task;

  // A task of whole samples does all of it. Shared samples come in steps: the pieces of one's maps,
  // and then those of the gradient of the one `lag` steps before.
  const int sweeps = sweep.row_pieces * sweep.column_pieces, lag = gradient.pairs[i].lag;
  const int step = local / (pair.pieces + sweeps), piece = local % (pair.pieces + sweeps);
  const bool whole = pair.samples > 0, maps = whole || piece < pair.pieces;
  int b0 = 0, b1 = 0;
  if (whole) {
    b0 = local * pair.samples;
    b1 = min(b0 + pair.samples, pair.B);
  } else if (maps ? step < pair.B : step >= lag) {
    b0 = maps ? step : step - lag;
    b1 = b0 + 1;
  }
  bool finished = maps && b0 < b1;
  for (int b = b0; b < b1; ++b) {
    const auto ready = [&] { return gradient.ready + params.pairs[here(i)].first_sample + b; };
    if (maps) {
      finished = run_sample<E, fp64, true>(params, i, b, piece, shared);
      if (!whole) {
        if (finished) announce(ready());
        continue;
      }
      __syncthreads();
    } else {
      wait_for(ready());
    }
    const PairParams& again = params.pairs[here(i)];
    const GradientPair& target = gradient.pairs[here(i)];
    const Span span = whole ? Span{0, rows_of(again.student), 0, columns_of(again.student)}
                            : span_of(again.student, target.sweep, piece - again.pieces);
    const void* k =
        whole ? shared.student_map : map_of<fp64>(again.student, again.student_maps, b, true).data;
    const double factor =
        gradient.scale *
        factor_of(target.loss_gradient, gradient.loss_gradient_fp64, b * gradient.sample_step);
    sweep_piece<E, fp64, true>(again.student, target.sweep, b, span, params.p, factor, k,
                               whole ? shared.kept : nullptr);
  }
  if (finished) finish_loss(params, b1 - b0, *shared.control);
  if (gradient.queue && arrives_last(gradient.done, 1, gridDim.x, *shared.control)) {
    if (threadIdx.x == 0) *gradient.ticket = 0;
    for (int b = threadIdx.x; b < params.samples; b += kThreads) gradient.ready[b] = 0;
  }
}

void launch_at_value_and_grad(const LossParams& params, const GradientParams& gradient,
                              const Launch& launch) {
  launch_instance(AT_FUSED_POWERS(at_value_and_grad_kernel), params.p, launch, params, gradient);
}

}  // namespace at_fused
