#include "launch.cuh"
#include "loss.cuh"

namespace at_fused {

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
