#include "launch.cuh"
#include "sweep.cuh"

namespace at_fused {

// Gradients of a list of features from their coefficient maps.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    attention_map_backward_kernel(const __grid_constant__ SweepParams params) {
  const SweepFeature& feature =
      params.features[member_of(params.features, params.count, blockIdx.x)];
  const double gradient = gradient_of(feature.loss_gradient, params.loss_gradient_fp64);
  const int local = blockIdx.x - feature.first_task;
  const int pieces = feature.sweep.row_pieces * feature.sweep.column_pieces;
  const Span span = span_of(feature.view, feature.sweep, local % pieces);
  const int b0 = local / pieces * feature.samples;
  const int b1 = min(b0 + feature.samples, feature.B);
  const int64_t size = feature.view.dtype == Dtype::float64 ? 8 : 4;
  for (int b = b0; b < b1; ++b) {
    sweep_piece<E, fp64, false>(
        feature.view, feature.sweep, b, span, params.p, gradient,
        static_cast<const char*>(feature.k) + int64_t(b) * feature.view.N * size, nullptr);
  }
}

void launch_attention_map_backward(const SweepParams& params, const Launch& launch) {
  launch_instance(AT_FUSED_INSTANCES(attention_map_backward_kernel), params.p, launch, params);
}

}  // namespace at_fused
