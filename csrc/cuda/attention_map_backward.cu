#include "launch.cuh"
#include "sweep.cuh"

namespace at_fused {

// Gradients of a list of features from their coefficient maps.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    attention_map_backward_kernel(const __grid_constant__ SweepParams params) {
  sweep_task(params,
             [&](const SweepFeature& feature, int b, Span span, const char* k, auto gradient) {
               sweep_piece<E, fp64, false>(feature.view, feature.sweep, b, span, params.p, gradient,
                                           k, nullptr);
             });
}

void launch_attention_map_backward(const SweepParams& params, const Launch& launch) {
  AT_FUSED_LAUNCH_POWERS(attention_map_backward_kernel, params, launch);
}

}  // namespace at_fused
