// Adaptive average pooling of features while they are read: windows, their sums, and how the
// threads of a block share them.
#pragma once

#include "block.cuh"
#include "numbers.cuh"
#include "plan_pool.h"
#include "power.cuh"

namespace at_fused {

struct Range {
  int begin, end;

  __device__ __forceinline__ int count() const { return end - begin; }
};

__device__ __forceinline__ int quotient(unsigned long long a, unsigned b) {
  return int(a >> 32 ? a / b : unsigned(a) / b);
}

// Which of `from` numbers belong to number i of `to`: floor(i from / to) to ceil((i + 1) from /
// to). It is its own inverse: with `from` and `to` exchanged, the outputs whose windows hold input
// i.
__device__ __forceinline__ Range range_of(int i, int from, int to) {
  const unsigned long long first = (unsigned long long)(i) * unsigned(from);
  return {quotient(first, to), quotient(first + unsigned(from) + unsigned(to) - 1, to)};
}

// Positions of (D, H, W), by rows.
struct Ranges {
  Range d, h, w;

  __device__ __forceinline__ int count() const { return d.count() * h.count() * w.count(); }
};

struct Cell {
  int d, h, w;
};

__device__ __forceinline__ Cell cell_of(int n, int height, int width) {
  return {n / width / height, n / width % height, n % width};
}

// The inputs of an output, and the outputs of an input.
__device__ __forceinline__ Ranges inputs_of(Cell o, const Pool& pool) {
  return {range_of(o.d, pool.in[0], pool.out[0]), range_of(o.h, pool.in[1], pool.out[1]),
          range_of(o.w, pool.in[2], pool.out[2])};
}
__device__ __forceinline__ Ranges outputs_of(Cell i, const Pool& pool) {
  return {range_of(i.d, pool.out[0], pool.in[0]), range_of(i.h, pool.out[1], pool.in[1]),
          range_of(i.w, pool.out[2], pool.in[2])};
}

// Where a thread sits: `places` positions are under way at a time. At each, `members` take channels
// of their own, and in planar features `share` neighbours add up a window together, so that they
// read adjacent elements. Threads side by side are at adjacent positions in planar features, at
// adjacent channels in interleaved ones.
struct Seat {
  int place, places, member, members, sub, share;

  __device__ Seat(bool planar, int places, int share) : places(places), share(share) {
    members = kThreads / (places * share);
    sub = threadIdx.x & (share - 1);
    const int seat = threadIdx.x / share;
    place = planar ? seat & (places - 1) : seat / members;
    member = planar ? seat / places : seat & (members - 1);
  }
};

// A sample's elements by channel and position.
template <class T>
struct Sample {
  const T* data;
  int64_t channel, position;  // strides

  __device__ Sample(const View& x, int b)
      : data(static_cast<const T*>(x.data) + int64_t(b) * x.batch),
        channel(x.layout == Layout::planar ? x.line : 1),
        position(x.layout == Layout::planar ? 1 : x.line) {}
};

constexpr int kPoolUnroll = 4;  // channels that a thread reads at once

// The sums of a window for kPoolUnroll channels, `step` apart, of which only the `wanted` are read.
// All threads that share the window call it, and have its sums.
template <class T, class A>
__device__ __forceinline__ void window_sums(A (&sum)[kPoolUnroll], const Sample<T>& x, int channel,
                                            int step, unsigned wanted, const Ranges& window,
                                            const Pool& pool, const Seat& seat) {
#pragma unroll
  for (int u = 0; u < kPoolUnroll; ++u) sum[u] = 0;
  const int begin = window.w.begin + seat.sub;
  const T* first = x.data + channel * x.channel;
  const int64_t next = step * x.channel, across = seat.share * x.position;
  if (wanted) {
#pragma unroll 1
    for (int d = window.d.begin; d < window.d.end; ++d) {
#pragma unroll 1
      for (int h = window.h.begin; h < window.h.end; ++h) {
        const T* from = first + ((d * pool.in[1] + h) * pool.in[2] + begin) * x.position;
        for (int w = begin; w < window.w.end; w += seat.share, from += across) {
          Pack<T, 1> pack[kPoolUnroll];
#pragma unroll
          for (int u = 0; u < kPoolUnroll; ++u) {
            pack[u] = {};
            if (wanted >> u & 1) pack[u] = load_constant<T, 1>(from + u * next);
          }
#pragma unroll
          for (int u = 0; u < kPoolUnroll; ++u) {
            A value[1];
            pack[u].get(value);
            sum[u] += value[0];
          }
        }
      }
    }
  }
  for (int d = 1; d < seat.share; d *= 2) {
#pragma unroll
    for (int u = 0; u < kPoolUnroll; ++u) sum[u] += __shfl_xor_sync(kAllLanes, sum[u], d);
  }
}

// |x|^p, or x^p with its sign.
struct EitherPower {
  static constexpr int rows_in_flight = kPoolUnroll;
  SignedPower power_;
  bool absolute;

  __device__ EitherPower(double p, bool absolute) : power_(p), absolute(absolute) {}
  template <class A>
  __device__ __forceinline__ A power(A x) const {
    const A magnitude = power_.any.power(x);
    return !absolute && x < 0 ? -magnitude : magnitude;
  }
  template <class A>
  __device__ __forceinline__ A slope(A x) const {
    return absolute ? power_.any.slope(x) : power_.slope(x);
  }
};

}  // namespace at_fused
