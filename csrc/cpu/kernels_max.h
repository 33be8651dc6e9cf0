// Attention maps of `collapse="max"`: maxima over channels.
#pragma once

#include "elements.h"

namespace at_fused {
namespace {

// The running maximum of |x| and its channel. Compares the bits of |x| as integers: they have the
// order of the values, with NaN above infinity. The first of equal values is kept.
template <class A>
struct Maximum {
  using Index = MaskOf<Vec<A>>;
  Index bits, channel;

  static AT_FUSED_INLINE Maximum lowest() { return {~Index{}, Index{}}; }

  AT_FUSED_INLINE void update(Vec<A> x, Index x_channel) {
    // All NaNs get the same bits, so that the first one is kept.
    x = x != x ? Vec<A>{} + A(__builtin_nan("")) : absolute(x);
    const Index x_bits = bit_cast<Index>(x), larger = x_bits > bits;
    bits = larger ? x_bits : bits;
    channel = larger ? x_channel : channel;
  }
};

template <int segment, int begin, class A, int... i>
AT_FUSED_INLINE Maximum<A> join_halves(Maximum<A> a, Maximum<A> b,
                                       std::integer_sequence<int, i...> lanes) {
  return {join_halves<segment, begin>(a.bits, b.bits, lanes),
          join_halves<segment, begin>(a.channel, b.channel, lanes)};
}

// Computes the map and the argmax channels of n positions.
template <class T, class A, class P>
void max_map(const Feature& feature, const T* x, int64_t n, P p, A* map, int32_t* channels) {
  using Index = typename Maximum<A>::Index;
  constexpr int width = lanes<A>;
  const int64_t C = feature.C, stride = feature.line_stride;
  Index lane;
  for (int i = 0; i < width; ++i) lane[i] = i;
  for (int64_t i = 0; i < n; i += width) {
    const int count = n - i < width ? int(n - i) : width;
    auto maximum = Maximum<A>::lowest();
    if (feature.layout == Layout::planar) {
      for (int64_t c = 0; c < C; ++c) {
        maximum.update(load_up_to(x + c * stride + i, count), Index{} + int(c));
      }
    } else {
      Maximum<A> maxima[width] = {};
      for (int j = 0; j < count; ++j) {
        maxima[j] = Maximum<A>::lowest();
        // Zero padding never wins: its channel numbers are higher than those of any channel.
        for (int64_t c = 0; c < C; c += width) {
          const int rest = C - c < width ? int(C - c) : width;
          maxima[j].update(load_up_to(x + (i + j) * stride + c, rest), lane + int(c));
        }
      }
      maximum =
          reduce_each<width>(maxima, [](Maximum<A> a, Maximum<A> b) AT_FUSED_LAMBDA -> Maximum<A> {
            const auto b_wins = (b.bits > a.bits) | ((b.bits == a.bits) & (b.channel < a.channel));
            return {b_wins ? b.bits : a.bits, b_wins ? b.channel : a.channel};
          });
    }
    const auto argmax =
        __builtin_convertvector(maximum.channel, typename VectorOf<int32_t, width>::type);
    store_up_to(map + i, p.power(bit_cast<Vec<A>>(maximum.bits)), count);
    std::memcpy(channels + i, &argmax, count * sizeof(int32_t));
  }
}

}  // namespace
}  // namespace at_fused
