#include "attention_map.cuh"
#include "launch.cuh"

namespace at_fused {

// Raw maps of a list of features.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    attention_map_kernel(const __grid_constant__ MapParams params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  const MapFeature& feature = params.features[member_of(params.features, params.count, blockIdx.x)];
  const Tile tile = tile_of(feature, blockIdx.x, bytes);
  const int64_t size = accumulate_size(feature.view.dtype == Dtype::float64);
  map_tile<E, fp64, false>(
      feature.view, tile, params.p, feature.scale, nullptr,
      static_cast<char*>(feature.map) + (int64_t(tile.b) * feature.view.N + tile.begin) * size);
}

void launch_attention_map(const MapParams& params, const Launch& launch) {
  AT_FUSED_LAUNCH_POWERS(attention_map_kernel, params, launch);
}

}  // namespace at_fused
