#include "launch.cuh"
#include "maximum.cuh"
#include "pool.cuh"

namespace at_fused {

// The map of a tile of pooled positions.
template <class T, class C>
__device__ __forceinline__ void map_tile_pooled(const PooledFeature& feature, const Tile& tile,
                                                const C& collect) {
  using A = Accumulator<T>;
  using State = typename C::State;
  const View& view = feature.view;
  const Pool& pool = feature.pool;
  const Seat seat(view.layout == Layout::planar, here(feature.places), here(feature.share));
  const Sample<T> x(view, here(tile.b));
  State* scratch = reinterpret_cast<State*>(tile.scratch);
#pragma unroll 1
  for (int begin = tile.begin; begin < tile.end; begin += seat.places) {
    const int n = begin + seat.place;
    const bool inside = n < tile.end;
    const Ranges window = inputs_of(cell_of(n, pool.out[1], pool.out[2]), pool);
    const A inverse = A(1) / A(window.count());
    State total{};
    // As many turns in all threads: they meet.
#pragma unroll 1
    for (int turn = 0; turn < view.C; turn += kPoolUnroll * seat.members) {
      const int channel = turn + seat.member;
      unsigned wanted = 0;
#pragma unroll
      for (int u = 0; u < kPoolUnroll; ++u) {
        if (inside && channel + u * seat.members < view.C) wanted |= 1u << u;
      }
      A sum[kPoolUnroll];
      window_sums(sum, x, channel, seat.members, wanted, window, pool, seat);
#pragma unroll
      for (int u = 0; u < kPoolUnroll; ++u) {
        if (wanted >> u & 1) collect.take(total, sum[u] * inverse, channel + u * seat.members);
      }
    }
    __syncthreads();  // the last places' may still be read
    if (seat.sub == 0) scratch[seat.member * seat.places + seat.place] = total;
    __syncthreads();
    const int place = threadIdx.x;
    if (place < seat.places && begin + place < tile.end) {
      State all{};
      for (int m = 0; m < seat.members; ++m) {
        meet(all, of_fold(scratch[m * seat.places + place], 0, 1));
      }
      collect.put(begin + place - tile.begin, all);
    }
  }
}

// Raw maps of a list of features that are pooled on their way, and the channels of maxima.
template <bool maximum, bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    pooled_map_kernel(const __grid_constant__ PooledParams params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  const PooledFeature& feature =
      params.features[member_of(params.features, params.count, blockIdx.x)];
  const Pool& pool = feature.pool;
  const int positions = pool.out[0] * pool.out[1] * pool.out[2];
  const Tile tile = tile_of(feature, positions, blockIdx.x, bytes);
  const int64_t first = int64_t(tile.b) * positions + tile.begin;
  with_dtype<fp64>(feature.view.dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    A* map = static_cast<A*>(feature.map) + first;
    if constexpr (maximum) {
      const PowerMaximum<A> collect{params.p, map, feature.channels + first};
      map_tile_pooled<T>(feature, tile, collect);
    } else {
      const EitherPower e(here(params.p), params.absolute);
      const PowerSum<EitherPower, A> collect{e, A(feature.scale), map};
      map_tile_pooled<T>(feature, tile, collect);
    }
  });
}

void launch_pooled_map(const PooledParams& params, const Launch& launch) {
  const bool maximum = params.features[0].channels;
  launch_instance(maximum ? pooled_map_kernel<true, false> : pooled_map_kernel<false, false>,
                  maximum ? pooled_map_kernel<true, true> : pooled_map_kernel<false, true>,
                  "pooled_map_kernel", launch, params);
}

}  // namespace at_fused
