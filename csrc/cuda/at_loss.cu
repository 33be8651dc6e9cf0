#include "launch.cuh"
#include "loss.cuh"

namespace at_fused {

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

}  // namespace at_fused
