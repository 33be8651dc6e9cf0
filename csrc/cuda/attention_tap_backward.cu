#include "launch.cuh"
#include "sweep.cuh"

namespace at_fused {

// A feature's gradient from its own map, added to what came from the layers behind it.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    attention_tap_backward_kernel(const __grid_constant__ TapParams params) {
  const SweepFeature& feature = params.feature;
  sweep_samples(feature, blockIdx.x, [&](int b, Span span, const char* k) {
    sweep_piece<E, fp64, false>(
        feature.view, feature.sweep, b, span, params.p, [&] { return params.scale; }, k, nullptr,
        Addend{params.gradient, params.batch, params.line});
  });
}

void launch_attention_tap_backward(const TapParams& params, const Launch& launch) {
  AT_FUSED_LAUNCH_POWERS(attention_tap_backward_kernel, params, launch);
}

}  // namespace at_fused
