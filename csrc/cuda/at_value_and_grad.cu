#include "launch.cuh"
#include "loss.cuh"

namespace at_fused {

// at_loss_kernel that keeps students on chip where they fit, and sweeps them there: their gradient
// takes no second read. Of the others it leaves the coefficients.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, E::short_code ? kBlocks<fp64> : kGradientBlocks)
    at_value_and_grad_kernel(const __grid_constant__ LossParams params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  const SharedMemory shared(bytes, params.map_bytes);
  run_task<E, fp64, true>(params, shared, [&](int i, int b) {
    const PairParams& pair = params.pairs[here(i)];
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

}  // namespace at_fused
