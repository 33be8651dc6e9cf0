// The largest of a position's absolute values, and the channel that has it: the first of several, a
// NaN before all.
#pragma once

#include "attention_map.cuh"
#include "power.cuh"

namespace at_fused {

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
__device__ __forceinline__ Largest<A> of_fold(const Largest<A>& one, int f, int fold) {
  return {one.value, one.channel * fold + f};
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
    out[n] = AnyPower(here(p)).power(largest.value);
    channels[n] = largest.channel;
  }
};

}  // namespace at_fused
