// Attention maps of a list of features: sums over channels, or maxima.
#include "attention_map.cuh"

namespace at_fused {

__device__ __forceinline__ Tile tile_of(const MapFeature& feature, char* scratch) {
  const int local = blockIdx.x - feature.first_task;
  const int begin = local % feature.pieces * feature.positions_per_piece;
  return {local / feature.pieces, begin, min(begin + feature.positions_per_piece, feature.view.N),
          scratch};
}

// Raw maps of a list of features.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kMinBlocks<fp64>)
    attention_map_kernel(const __grid_constant__ MapParams params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  const MapFeature& feature = params.features[member_of(params.features, params.count, blockIdx.x)];
  const Tile tile = tile_of(feature, bytes);
  const int64_t size = accumulate_size(feature.view.dtype == Dtype::float64);
  map_tile<E, fp64, false>(
      feature.view, tile, params.p, feature.scale, nullptr,
      static_cast<char*>(feature.map) + (int64_t(tile.b) * feature.view.N + tile.begin) * size);
}

// ---- collapse="max" -----------------------------------------------------------------------------

// The running maximum of |x| and its channel. NaN is the largest value; the first of equals wins.
template <class A>
struct Maximum {
  A value = -1;     // below every |x|
  int channel = 0;  // the row number in rows of several channels

  // Channels must come in ascending order.
  __device__ __forceinline__ void add(A x, int c) {
    if (value == value && !(x <= value)) {
      value = x;
      channel = c;
    }
  }
};

template <class A>
__device__ __forceinline__ void combine(Maximum<A>& one, Maximum<A> other) {
  const bool nan = one.value != one.value, other_nan = other.value != other.value;
  const bool equal = (nan && other_nan) || one.value == other.value;
  const bool larger = !nan && (other_nan || other.value > one.value);
  if (larger || (equal && other.channel < one.channel)) one = other;
}
template <class A>
__device__ __forceinline__ Maximum<A> shuffle_xor(Maximum<A> one, int distance) {
  return {__shfl_xor_sync(kAllLanes, one.value, distance),
          __shfl_xor_sync(kAllLanes, one.channel, distance)};
}
template <class A>
__device__ __forceinline__ Maximum<A> to_channel(const Maximum<A>& one, int f, int per_row) {
  return {one.value, one.channel * per_row + f};
}

// Counterpart of PowerSum: raises the maximum to the power p at the end.
template <class A>
struct MaximumPower {
  using State = Maximum<A>;
  static constexpr int rows_in_flight = 4;
  double p;
  A* out;
  int32_t* channels;

  __device__ __forceinline__ void add(State& largest, A x, int c) const {
    largest.add(x < 0 ? -x : x, c);
  }
  __device__ __forceinline__ void write(int n, State largest) const {
    out[n] = AnyPower(opaque(p)).power(largest.value);
    channels[n] = largest.channel;
  }
};

// Maps of collapse="max" of a list of features, and the argmax channels.
template <bool fp64>
__global__ void __launch_bounds__(kThreads, kMinBlocks<fp64>)
    max_map_kernel(const __grid_constant__ MapParams params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  const MapFeature& feature = params.features[member_of(params.features, params.count, blockIdx.x)];
  const Tile tile = tile_of(feature, bytes);
  const int64_t first = int64_t(tile.b) * feature.view.N + tile.begin;
  with_dtype<fp64>(feature.view.dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const MaximumPower<A> maximum{params.p, static_cast<A*>(feature.map) + first,
                                  feature.channels + first};
    reduce_tile<T, false>(feature.view, tile, maximum, nullptr);
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
