// Maps of a list of features: of sums, and of maxima.
#include "attention_map.cuh"

namespace at_fused {

// Of a block's task.
__device__ __forceinline__ Tile tile_of(const MapFeature& feature, char* scratch) {
  const int local = blockIdx.x - feature.first_task;
  const int begin = local % feature.pieces * feature.positions;
  return {local / feature.pieces, begin, min(begin + feature.positions, feature.view.N), scratch};
}

// Raw maps of a list of features.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    attention_map_kernel(const __grid_constant__ MapParams params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  const MapFeature& feature = params.features[member_of(params.features, params.count, blockIdx.x)];
  const Tile tile = tile_of(feature, bytes);
  const int64_t size = accumulate_size(feature.view.dtype == Dtype::float64);
  map_tile<E, fp64, false>(
      feature.view, tile, params.p, feature.scale, nullptr,
      static_cast<char*>(feature.map) + (int64_t(tile.b) * feature.view.N + tile.begin) * size);
}

// ---- maxima ------------------------------------------------------------------------------------

// The largest of a position's absolute values, and the channel that has it: the first of several, a
// NaN before all.
template <class A>
struct Largest {
  A value = -1;     // less than any
  int channel = 0;  // of a row of several channels: the row

  // Of channels in ascending order.
  __device__ __forceinline__ void take(A x, int c) {
    if (value == value && !(x <= value)) {
      value = x;
      channel = c;
    }
  }
};

template <class A>
__device__ __forceinline__ void meet(Largest<A>& one, Largest<A> other) {
  const bool nan = one.value != one.value, other_nan = other.value != other.value;
  const bool alike = (nan && other_nan) || one.value == other.value;
  const bool larger = !nan && (other_nan || other.value > one.value);
  if (larger || (alike && other.channel < one.channel)) one = other;
}
template <class A>
__device__ __forceinline__ Largest<A> from_lane(Largest<A> one, int distance) {
  return {__shfl_xor_sync(kAllLanes, one.value, distance),
          __shfl_xor_sync(kAllLanes, one.channel, distance)};
}
template <class A>
__device__ __forceinline__ Largest<A> as_channel(const Largest<A>& one, int f, int per_row) {
  return {one.value, one.channel * per_row + f};
}

// In place of PowerSum: the power is taken of the maximum, once.
template <class A>
struct PowerMaximum {
  using State = Largest<A>;
  static constexpr int rows_in_flight = 4;
  double p;
  A* out;
  int32_t* channels;

  __device__ __forceinline__ void take(State& largest, A x, int c) const {
    largest.take(x < 0 ? -x : x, c);
  }
  __device__ __forceinline__ void put(int n, State largest) const {
    out[n] = AnyPower(opaque(p)).power(largest.value);
    channels[n] = largest.channel;
  }
};

// Maps of maxima of a list of features, and the channels that won.
template <bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    max_map_kernel(const __grid_constant__ MapParams params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  const MapFeature& feature = params.features[member_of(params.features, params.count, blockIdx.x)];
  const Tile tile = tile_of(feature, bytes);
  const int64_t first = int64_t(tile.b) * feature.view.N + tile.begin;
  with_dtype<fp64>(feature.view.dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const PowerMaximum<A> maximum{params.p, static_cast<A*>(feature.map) + first,
                                  feature.channels + first};
    collect_tile<T, false>(feature.view, tile, maximum, nullptr);
  });
}

void launch_attention_map(const MapParams& params, const Launch& launch) {
  if (params.features[0].channels) {
    AT_FUSED_LAUNCH_DTYPES(max_map_kernel, params, launch);
  } else {
    AT_FUSED_LAUNCH_POWERS(attention_map_kernel, params, launch);
  }
}

}  // namespace at_fused
