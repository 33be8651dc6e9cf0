#include "launch.cuh"
#include "maximum.cuh"

namespace at_fused {

// Maps of maxima of a list of features, and the channels that won.
template <bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    max_map_kernel(const __grid_constant__ MapParams params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  const MapFeature& feature = params.features[member_of(params.features, params.count, blockIdx.x)];
  const Tile tile = tile_of(feature, blockIdx.x, bytes);
  const int64_t first = int64_t(tile.b) * feature.view.N + tile.begin;
  with_dtype<fp64>(feature.view.dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const PowerMaximum<A> maximum{params.p, static_cast<A*>(feature.map) + first,
                                  feature.channels + first};
    collect_tile<T, false>(feature.view, tile, maximum, nullptr);
  });
}

void launch_max_map(const MapParams& params, const Launch& launch) {
  AT_FUSED_LAUNCH_DTYPES(max_map_kernel, params, launch);
}

}  // namespace at_fused
