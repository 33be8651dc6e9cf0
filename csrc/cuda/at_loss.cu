#include "launch.cuh"
#include "loss.cuh"

namespace at_fused {

// Losses, and maps where they are kept, of a list of pairs, in one pass over the features.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    at_loss_kernel(const __grid_constant__ LossParams params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  const SharedMemory shared(bytes, params.map_bytes);
  const int i = member_of(params.pairs, params.count, blockIdx.x);
  const PairParams& pair = params.pairs[i];
  const int local = blockIdx.x - pair.first_task;
  const int b0 = pair.samples ? local * pair.samples : local / pair.pieces;
  const int b1 = pair.samples ? min(b0 + pair.samples, pair.B) : b0 + 1;
  bool finished = true;
  for (int b = b0; b < b1; ++b) {
    finished = run_sample<E, fp64, false>(params, i, b, local % pair.pieces, shared);
  }
  if (finished) finish_loss(params, b1 - b0, *shared.control);
}

void launch_at_loss(const LossParams& params, const Launch& launch) {
  launch_instance(AT_FUSED_POWERS(at_loss_kernel), params.p, launch, params);
}

}  // namespace at_fused
